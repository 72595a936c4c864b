"""What one model says, kept so that another can be held against it when this one is no longer in memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puna.errors import CheckpointError
from puna.eval.perplexity import text_bits_per_byte
from puna.infer.llama import Llama
from puna.tokenizer.chat.format import has_template


class Observed(NamedTuple):
    """A model's answers to prompts; `logits` are those of the rows it was shown, its own or another model's."""

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    """Of each answer."""
    rows: list[list[int]]
    """What was shown: prompt and answer."""
    logits: list[Tensor]
    """(T, V) fp32 of each row, on the CPU."""
    bits_per_byte: float
    perplexity: float
    """Per token of its own tokenizer."""


class Apart(NamedTuple):
    """How far two models are from one another on the same rows."""

    max_logit: float
    mean_logit: float
    max_logprob: float
    mean_kl: float
    """Nats a position, of the second from the first."""
    max_kl: float
    where: tuple[int, int, int]
    """(prompt, position, id) of the largest difference of a log-probability."""


class Parity(NamedTuple):
    """Largest difference of any logit, and in how many of the prompts the most likely answer is the same text."""

    max_difference: float
    same: int
    prompts: int


def compare_models(a: Llama, b: Llama, prompts: Sequence[str], max_tokens: int = 32) -> Parity:
    """Ask both the same, each by its own template; logits are compared over `a`'s prompts and answers."""
    one = observe(a, prompts, max_tokens)
    two = observe(b, prompts, max_tokens, rows=one.rows)
    return Parity(apart(one, two).max_logit, sum(same_answers(one, two)), len(prompts))


def observe(
    llama: Llama, prompts: Sequence[str], max_tokens: int = 32, text: str = "", limit: int | None = None,
    rows: list[list[int]] | None = None,
) -> Observed:  # fmt: skip
    """Let a model answer greedily and read a text.

    Args:
        prompts: users' messages where the model has a template, else text to continue.
        limit: ids it may see at once; its context by default.
        rows: of which the logits are taken; by default of its own prompts and answers.

    Raises:
        CheckpointError: rows with ids that it does not have.
    """
    limit = min(limit or llama.model.config.max_seq_len, llama.model.config.max_seq_len)
    asked = [_ids(llama, prompt)[: max(1, limit // 2)] for prompt in prompts]
    answers = llama.continue_ids(asked, min(max_tokens, limit - max(map(len, asked))))
    texts = [llama.tokenizer.decode_after(ids, answer) for ids, answer in zip(asked, answers, strict=True)]
    rows = rows or [ids + answer for ids, answer in zip(asked, answers, strict=True)]
    if max(map(max, rows)) >= llama.model.config.vocab_size:
        raise CheckpointError("cannot be compared: it lacks ids of the other model", where=llama.path)
    logits = [llama.logits([row])[0].cpu() for row in rows]
    bits, perplexity, _ = text_bits_per_byte(llama.model, llama.tokenizer, text, limit) if text else (0.0, 0.0, 0)
    return Observed(asked, answers, texts, rows, logits, bits, perplexity)


def apart(one: Observed, two: Observed) -> Apart:
    """Differences over all positions of all rows; of two vocabularies what both have."""
    largest, total, count, kl_sum, kl_max, positions = 0.0, 0.0, 0, 0.0, 0.0, 0
    worst, where = -1.0, (0, 0, 0)
    for number, pair in enumerate(zip(one.logits, two.logits, strict=True)):
        width = min(logits.shape[1] for logits in pair)
        a, b = (logits[:, :width].double() for logits in pair)
        gaps = (a - b).abs()
        largest, total, count = larger(largest, gaps.max().item()), total + gaps.sum().item(), count + gaps.numel()
        a, b = (torch.log_softmax(logits, -1) for logits in (a, b))
        kl = (a.exp() * (a - b)).sum(-1)
        kl_sum, kl_max, positions = kl_sum + kl.sum().item(), larger(kl_max, kl.max().item()), positions + len(kl)
        gaps = (a - b).abs()
        if not gaps.max().item() <= worst:
            place = int(gaps.argmax())  # a NaN counts as the largest
            worst, where = gaps.flatten()[place].item(), (number, place // width, place % width)
    return Apart(largest, total / count, worst, kl_sum / positions, kl_max, where)


def same_answers(one: Observed, two: Observed) -> list[bool]:
    """Of each prompt: the same ids asked, the same ids answered."""
    asked = [a == b for a, b in zip(one.prompts, two.prompts, strict=True)]
    return [same and a == b for same, a, b in zip(asked, one.answers, two.answers, strict=True)]


def _ids(llama: Llama, prompt: str) -> list[int]:
    if has_template(llama.tokenizer):
        return llama.template.prompt([{"role": "user", "content": prompt}])
    return llama.encode(prompt) or [llama.tokenizer.bos_id]


def larger(a: float, b: float) -> float:
    """The maximum, but NaN if either is: a comparison that hides it passes."""
    return b if b != b or b > a else a
