"""SmolLM2-135M in bf16: 32 ragged requests at once, and the reading of 512 ids, beside transformers.

python bench/serve.py [--requests 32] [--rounds 3] [--prefill]
Prompts have 16 to 256 ids and answers 16 to 128, all greedy and none stopped early. transformers' batched `generate`
pads prompts on the left and writes until the longest answer is done.
Tokens are those asked for; reading the prompts is in the time of all. With --prefill: 512 ids and one more.
"""

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import Work, compare

MODEL = "smollm2-135m"


def requests(count: int) -> list[tuple[list[int], int]]:
    """(prompt, most tokens) of each."""
    r = random.Random(0)
    return [([r.randrange(1000, 40000) for _ in range(r.randint(16, 256))], r.randint(16, 128)) for _ in range(count)]


def long_prompt() -> list[tuple[list[int], int]]:
    """512 ids and one more."""
    r = random.Random(0)
    return [([r.randrange(1000, 40000) for _ in range(512)], 1)]


def puna_side(asked: list[tuple[list[int], int]]) -> Work:
    import puna
    from puna.infer.request import Request, Sampling

    engine = puna.load(MODEL, dtype="bf16").engine

    def step() -> float:
        engine.forget()  # the same prompts again are not read again
        results = engine.run([Request(prompt, Sampling(max_tokens=count)) for prompt, count in asked])
        return float(sum(len(result.completions[0].token_ids) for result in results))

    return Work(step)


def transformers_side(asked: list[tuple[list[int], int]], folder: str) -> Work:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    longest, most = (max(sizes) for sizes in zip(*((len(prompt), count) for prompt, count in asked), strict=True))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in asked])
    options: dict[str, Any] = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def step() -> float:
        model.generate(ids, attention_mask=mask, **options)
        return float(sum(count for _, count in asked))  # of the others it wrote too much

    return Work(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", action="store_true")
    given = parser.parse_args()
    import puna

    asked = long_prompt() if given.prefill else requests(given.requests)
    units = len(asked[0][0]) if given.prefill else sum(count for _, count in asked)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        puna.load(MODEL, dtype="bf16").save(path)
        sides = {"puna": partial(puna_side, asked), "transformers": partial(transformers_side, asked, str(path))}
        compare(sides, units, given.rounds)


if __name__ == "__main__":
    main()
