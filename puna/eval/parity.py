"""Do two models say the same? Trained, merged, saved and served ones have to."""

from collections.abc import Sequence
from typing import NamedTuple

from puna.infer.llama import Llama


class Parity(NamedTuple):
    """Largest difference of any logit, and in how many of the prompts the most likely answer is the same text."""

    max_difference: float
    same: int
    prompts: int


def compare_models(a: Llama, b: Llama, prompts: Sequence[str], max_tokens: int = 32) -> Parity:
    """Ask both the same chat messages, each by its own template; logits are compared over `a`'s prompt and answer."""
    worst, same = 0.0, 0
    for prompt in prompts:
        asked = [llama.template.prompt([{"role": "user", "content": prompt}]) for llama in (a, b)]
        ours, theirs = (llama.continue_ids([ids], max_tokens)[0] for llama, ids in zip((a, b), asked, strict=True))
        whole = [[*asked[0], *ours]]
        worst = max(worst, (a.logits(whole) - b.logits(whole)).abs().max().item())
        same += ours == theirs and asked[0] == asked[1]
    return Parity(worst, same, len(prompts))
