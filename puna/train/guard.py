"""What a run goes on through, and what ends it: numbers that are not finite, memory that ends, learning that has."""

import math
from collections.abc import Mapping, Sequence

from puna.data.loader import Batch
from puna.errors import NumericError, ResourceError, out_of_memory
from puna.log import log


class Guard:
    """A non-finite loss or gradient never reaches the weights; too many skipped steps in a row end the run."""

    def __init__(self, budget: int):
        self.budget, self.in_a_row = budget, 0

    def admits(self, step: int, position: object, loss: float, grad_norm: float) -> bool:
        """Whether this step may update the weights.

        Raises:
            NumericError: more than `budget` steps in a row were not finite.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        log.warning("step %d skipped: loss %s, gradient norm %s, data position %s", step, loss, grad_norm, position)
        if self.in_a_row > self.budget:
            raise NumericError(
                f"{self.in_a_row} steps in a row were not finite, the last at data position {position}",
                where=f"step {step}",
                cause="a learning rate that is too high, or damaged data",
                fix="a smaller optimizer.lr; the newest checkpoint is from before",
            )
        return False


class Halving:
    """Micro-batches in halves, quarters, ... once memory has run out: the same sums, fewer rows at a time.

    Args:
        times: how often they were halved before.
        refused: why this run cannot do a step over again; empty where it can.
    """

    def __init__(self, times: int = 0, refused: str = ""):
        self.times, self.refused = times, refused

    def parts(self, micro: Sequence[Batch]) -> list[Batch]:
        """What is computed one after the other."""
        return [part for batch in micro for part in _parts(batch, self.times)]

    def helps(self, error: Exception, micro: Sequence[Batch]) -> bool:
        """Whether the step can be done over again, halved once more.

        Raises:
            ResourceError: memory ran out, and there is nothing to halve.
        """
        if not out_of_memory(error):
            return False
        before, self.times = len(self.parts(micro)), self.times + 1
        after = len(self.parts(micro))
        if self.refused or before == after:
            raise ResourceError(
                "out of memory in a step" if self.refused else "out of memory with a single row at a time",
                cause=self.refused or (str(error).splitlines() or [type(error).__name__])[0][:200],
                fix=("a smaller batch_size" if self.refused else "a smaller seq_len")
                + ", train.checkpoint_activations=full, train.optimizer.kind=adamw8bit, lora with quantize=nf4, or a "
                "smaller model",
            ) from None
        log.warning("out of memory: from here on a step is computed in %d parts instead of %d, its sums are the same",
                    after, before)  # fmt: skip
        return True


def _parts(batch: Batch, times: int) -> list[Batch]:
    halves = batch.halves() if times else None
    return [batch] if halves is None else [part for half in halves for part in _parts(half, times - 1)]


def best_step(losses: Mapping[int, float]) -> int | None:
    """The step of the lowest validation loss, the first of equal ones; None before the first validation."""
    return min(sorted(losses), key=lambda step: losses[step]) if losses else None


def worn_out(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether the last `patience` validations were no better than one before them."""
    best = best_step(losses)
    return patience is not None and best is not None and sum(step > best for step in losses) >= patience
