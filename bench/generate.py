"""Greedy decoding of SmolLM2-135M in bf16: puna's `generate` beside transformers'.

python bench/generate.py [--batch 1] [--tokens 64] [--rounds 5]
Tokens are those generated; reading the prompt of 32 ids is in the time of both.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from side_by_side import Work, compare

MODEL = "smollm2-135m"


def prompts(rows: int):
    import torch

    return torch.randint(1000, 40000, (rows, 32), generator=torch.Generator().manual_seed(0))


def puna_side(rows: int, tokens: int) -> Work:
    import puna
    from puna.infer.generate import generate

    model, ids = puna.load(MODEL, dtype="bf16").model, prompts(rows).tolist()
    return Work(lambda: float(len(generate(model, ids, max_tokens=tokens)[0])))


def transformers_side(rows: int, tokens: int, folder: str) -> Work:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = prompts(rows)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def step() -> float:
        return float(model.generate(ids, attention_mask=torch.ones_like(ids), **options).shape[1] - ids.shape[1])

    return Work(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    import puna

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        puna.load(MODEL, dtype="bf16").save(path)
        sides = {
            "puna": partial(puna_side, given.batch, given.tokens),
            "transformers": partial(transformers_side, given.batch, given.tokens, str(path)),
        }
        compare(sides, given.batch * given.tokens, given.rounds)


if __name__ == "__main__":
    main()
