"""A non-finite loss or gradient never reaches the weights."""

import math

from puna.errors import NumericError
from puna.log import log


class Guard:
    """Counts the steps that were skipped; too many in a row end the run."""

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
