"""How a model does on conversations: loss on held-out ones, answers to fixed prompts."""

from collections.abc import Iterator, Sequence

import torch

from puna.data.conversations import ChatSource, read_conversations
from puna.data.packing import PackedLoader
from puna.infer.llama import Llama
from puna.log import Progress
from puna.model.transformer import Transformer
from puna.train.objectives import next_token


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


def rehearsal(
    llama: Llama, source: ChatSource, max_tokens: int = 64, batch_size: int = 32
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of the model's own answers to the first message of each conversation, temperature 0.7.

    Trained along with new tasks they keep what the model could say before (self-synthesized rehearsal, Huang et al.
    2024): no data of another's making is needed, and its own words cost little loss to keep. An answer that was cut
    has no stop id at its end, so it teaches to go on, not to stop.
    """
    asked = [next(m for m in c.messages if m["role"] == "user") for c in read_conversations(source)]
    prompts = [llama.template.prompt([m]) for m in {m["content"]: m for m in asked}.values()]
    answers: list[list[int]] = []
    with Progress("rehearsal", len(prompts)) as progress:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            answers += llama.continue_ids(part, max_tokens, temperature=0.7, seed=start)
            progress.update(len(answers))
    return list(zip(prompts, answers, strict=True))


def replies(llama: Llama, prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[str, str]]:
    """(prompt, the most likely answer) of each prompt, asked alone."""
    training = llama.model.training
    llama.model.eval()
    rows = [llama.template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    answers = llama.continue_ids(rows, max_tokens) if rows else []
    llama.model.train(training)
    yield from ((prompt, llama.tokenizer.decode(row)) for prompt, row in zip(prompts, answers, strict=True))
