"""Whether a model's weights are still the ones that were seen last."""

from weakref import ref

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = [0]


class WeightWatch:
    """Notices weights that were written to in place, replaced, added, taken away, or stepped by an optimizer.

    What is written through `.data` goes past autograd's counters and is not seen. Fused optimizers go past them too, so
    every optimizer's steps are counted, whatever they train.
    """

    def __init__(self, model: nn.Module):
        self._model, self._seen, self._steps = model, _versions(model), _steps[0]

    def changed(self) -> bool:
        """Since this was last asked."""
        now, before, stepped = _versions(self._model), self._seen, self._steps != _steps[0]
        self._seen, self._steps = now, _steps[0]
        same = (a() is b() and m == n for (a, m), (b, n) in zip(now, before, strict=False))
        return stepped or len(now) != len(before) or not all(same)


def _versions(model: nn.Module) -> list[tuple["ref[Tensor]", int]]:
    """Weakly, so that weights a model has dropped are freed. Inference tensors have no counter, and are not trained."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(ref(t), 0 if t.is_inference() else t._version) for t in tensors]


def _count_step(optimizer: object, args: object, kwargs: object) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)
