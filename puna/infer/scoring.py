"""Log-probabilities of ids that are given: of a prompt, and beside the ids that were chosen."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from puna.infer.request import TokenLogprob
from puna.infer.scheduler import Chunk

_LOGITS = 2**23  # values of logits that are held at a time


def score_prompts(chunks: Sequence[Chunk], hidden: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int) -> None:
    """Give each sample the log-probabilities of those ids of its prompt that this step's tokens predict.

    Args:
        hidden: (N, dim) of the chunks' tokens, one chunk after another.
        head: (rows, dim) -> (rows, vocab_size) logits.
    """
    first, rows, targets, owners = 0, list[int](), list[int](), []
    for each, start, length in chunks:
        places = range(max(start, each.unscored.start), min(start + length, each.unscored.stop))
        rows += [first + p - start for p in places]
        targets += [each.text.ids[p + 1] for p in places]
        owners += [each] * len(places)
        first += length
    size = max(1, _LOGITS // vocab_size)
    for at in range(0, len(rows), size):
        logits = head(hidden[rows[at : at + size]])
        wanted = torch.tensor(targets[at : at + size], device=logits.device)
        best = (logits.argmax(-1) == wanted).tolist()
        told = zip(owners[at : at + size], _logprob(logits, wanted).tolist(), best, strict=True)
        for each, logprob, is_best in told:
            each.prompt_logprobs.append(logprob)
            each.prompt_greedy &= is_best


def logprobs(logits: Tensor, chosen: Tensor, counts: Sequence[int | None]) -> list[TokenLogprob | None]:
    """What each row of logits (B, V) asked for: None, or the chosen id's and those of that many most likely ids."""
    told: list[TokenLogprob | None] = [None] * len(counts)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if rows:
        asked = logits[rows]
        best, ids = asked.topk(min(max(counts[row] or 0 for row in rows), asked.shape[-1]))
        best = _wide(best) - _wide(asked).logsumexp(-1, keepdim=True)
        taken = _logprob(asked, chosen[rows]).tolist()
        for row, logprob, top, values in zip(rows, taken, ids.tolist(), best.tolist(), strict=True):
            told[row] = TokenLogprob(logprob, tuple(zip(top, values, strict=True))[: counts[row]])
    return told


def _logprob(logits: Tensor, ids: Tensor) -> Tensor:
    """Of one id a row, without a copy of all log-probabilities: (B, V), (B,) -> (B,)."""
    wide = _wide(logits)
    return wide.gather(-1, ids[:, None])[:, 0] - wide.logsumexp(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
