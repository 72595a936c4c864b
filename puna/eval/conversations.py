"""How a model does on conversations: loss on held-out ones, answers to fixed prompts."""

from collections.abc import Iterator, Sequence

import torch

from puna.data.packing import PackedLoader
from puna.infer.llama import Llama
from puna.log import Progress
from puna.model.transformer import Transformer
from puna.train.objectives import next_token

_AT_ONCE = 64


@torch.no_grad()
def mean_loss(model: Transformer, conversations: PackedLoader) -> float:
    """Mean of -log p over the trained tokens of all conversations, each read once; nats."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, n = 0.0, 0
    for start in range(0, len(conversations.packs), conversations.batch_size):
        batch = conversations.batch(conversations.packs[start : start + conversations.batch_size]).to(device)
        total, n = total + float(next_token(model, batch).sum), n + batch.n
    model.train(training)
    return total / n


def rehearsal(llama: Llama, count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of `count` questions that the model asks itself, and its own answers.

    A chat model that is given the start of a user's turn writes a user's question (Magpie, Xu et al. 2024). Trained
    along with new tasks its own words keep what it could say before and cost little loss to keep (self-synthesized
    rehearsal, Huang et al. 2024). Long questions are cut, which is question enough; an answer that was cut has no
    stop id, so it teaches to go on and not to stop.
    """
    before, after = llama.template.around_user()
    pairs: list[tuple[list[int], list[int]]] = []
    with Progress("rehearsal", count) as progress:
        for start in range(0, count, _AT_ONCE):
            blank = [before] * min(_AT_ONCE, count - start)
            asked = llama.continue_ids(blank, 32, temperature=0.9, seed=seed + start)
            prompts = [[*before, *(i for i in ids if i not in llama.stop_ids), *after] for ids in asked]
            pairs += zip(prompts, llama.continue_ids(prompts, 64, temperature=0.7, seed=seed + start), strict=True)
            progress.update(start + len(blank))
    return pairs


def replies(llama: Llama, prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[str, str]]:
    """(prompt, the most likely answer) of each prompt, asked alone."""
    training = llama.model.training
    llama.model.eval()
    rows = [llama.template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    answers = llama.continue_ids(rows, max_tokens) if rows else []
    llama.model.train(training)
    yield from ((prompt, llama.tokenizer.decode(row)) for prompt, row in zip(prompts, answers, strict=True))
