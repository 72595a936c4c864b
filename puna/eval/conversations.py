"""How a model does on conversations: loss on held-out ones, answers to fixed prompts."""

from collections.abc import Iterator, Sequence

import torch

from puna.data.packing import PackedLoader
from puna.infer.llama import Llama
from puna.model.mode import evaluating
from puna.model.transformer import Transformer
from puna.train.objectives import next_token


@torch.no_grad()
def mean_loss(model: Transformer, conversations: PackedLoader) -> float:
    """Mean of -log p over the trained tokens of all conversations, each read once; nats."""
    device = next(model.parameters()).device
    total, n = 0.0, 0
    with evaluating(model):
        for start in range(0, len(conversations.packs), conversations.batch_size):
            batch = conversations.batch(conversations.packs[start : start + conversations.batch_size]).to(device)
            total, n = total + float(next_token(model, batch).sum), n + batch.n
    return total / n


def replies(llama: Llama, prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[str, str]]:
    """(prompt, the most likely answer) of each prompt, asked alone."""
    rows = [llama.template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    answers = llama.continue_ids(rows, max_tokens) if rows else []
    yield from ((prompt, llama.tokenizer.decode(row)) for prompt, row in zip(prompts, answers, strict=True))
