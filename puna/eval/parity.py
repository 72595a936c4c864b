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
    """Ask both the same chat messages; logits are compared over each prompt with `a`'s answer."""
    worst, same = 0.0, 0
    for prompt in prompts:
        ids = a.template.prompt([{"role": "user", "content": prompt}])
        ours, theirs = (llama.continue_ids([ids], max_tokens)[0] for llama in (a, b))
        whole = [[*ids, *ours]]
        worst = max(worst, (a.logits(whole) - b.logits(whole)).abs().max().item())
        same += ours == theirs and a.tokenizer.decode(ours) == b.tokenizer.decode(theirs)
    return Parity(worst, same, len(prompts))
