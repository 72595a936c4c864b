"""Generation on a CUDA card, puna's engine beside transformers: `bench/gpu.sh` runs it all.

python bench/gpu_serve.py decode|throughput|prefill|prefix --model PRESET [--requests N] [--prompt N] [--tokens N]
decode: one text; transformers eager, and compiled over a static cache. throughput: many, beside `generate_batch`.
prefill: one long prompt and one id. prefix: prompts with 90 % in common, beside as long ones with nothing in common.
Random weights in bf16 and random ids; greedy, nothing stops early. GB/s: weights read once a step, keys and values once
a token, beside what the card's memory gives on paper. `--device cpu` with a small preset tries it without a card.
"""

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from gpu import puna_model, write_model
from side_by_side import Work, compare

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12, "L40S": 0.864e12, "4090": 1.008e12}  # bytes/s
PARTS = {"decode": (1, 16, 256), "throughput": (128, 32, 512), "prefill": (1, 8192, 1), "prefix": (64, 2048, 32)}
"""Requests, ids of a prompt, ids to write."""


def prompts(given: argparse.Namespace, common: float) -> list[list[int]]:
    """Of which the first part is the same."""
    r, shared = random.Random(0), int(common * given.prompt)
    first = [r.randrange(3, 256) for _ in range(shared)]
    return [first + [r.randrange(3, 256) for _ in range(given.prompt - shared)] for _ in range(given.requests)]


def engine_side(given: argparse.Namespace, folder: str, common: float) -> Work:
    import torch

    from puna.infer.engine import Engine
    from puna.infer.request import Request, Sampling

    model = puna_model(folder, given.device, torch.bfloat16)
    tokens = (given.requests + 1) * (given.prompt + given.tokens + 64)
    engine = Engine(model, tokens=tokens, batch=given.requests, chunk=2048)
    asked = [Request(prompt, Sampling(max_tokens=given.tokens)) for prompt in prompts(given, common)]

    def step() -> float:
        engine.forget()  # what one run read the next reads again
        return float(sum(len(result.completions[0].token_ids) for result in engine.run(asked)))

    return Work(step)


def transformers_side(given: argparse.Namespace, folder: str, common: float, static: bool = False) -> Work:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(given.device)
    ids = torch.tensor(prompts(given, common), device=given.device)
    limits: dict[str, Any] = {"max_new_tokens": given.tokens, "do_sample": False, "pad_token_id": 0}
    if static:  # `generate` compiles the forward of a single token over it
        limits["cache_implementation"] = "static"

    @torch.inference_mode()
    def step() -> float:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=given.tokens, **limits)
        return float(out[:, given.prompt :].numel())

    return Work(step)


def continuous_side(given: argparse.Namespace, folder: str, common: float) -> Work:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(given.device)
    asked = prompts(given, common)
    config = GenerationConfig(max_new_tokens=given.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = (given.requests + 1) * -(
        -(given.prompt + given.tokens) // 256
    )  # left alone it takes all memory that is free
    batching = ContinuousBatchingConfig(page_size=256, num_blocks=pages, max_batch_tokens=2048)

    def step() -> float:
        done = model.generate_batch(asked, generation_config=config, continuous_batching_config=batching)
        return float(sum(len(each.generated_tokens) for each in done.values()))

    return Work(step)


def read_per_token(given: argparse.Namespace) -> float:
    """Bytes that writing a token takes from the card's memory."""
    from puna.model.config import count_parameters
    from puna.model.presets import PRESETS

    shape = PRESETS[given.model]
    weights = count_parameters(shape) - (0 if shape.tie_embeddings else shape.vocab_size * shape.dim)
    held = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * (given.prompt + given.tokens / 2)
    return 2 * (weights / given.requests + held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(PARTS))
    parser.add_argument("--model", default="llama3.2-1b")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    for name, value in zip(("requests", "prompt", "tokens"), PARTS[given.what], strict=True):
        setattr(given, name, getattr(given, name) or value)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), given.model)
        print(f"{given.what} {given.model}: {given.requests} x ({given.prompt} read, {given.tokens} written)")
        units = given.prompt if given.what == "prefill" else given.requests * given.tokens
        speeds = compare(sides(given, folder), units, given.rounds, device=given.device)
    if given.what in ("decode", "throughput"):
        for name, speed in speeds.items():
            print(f"{name}: {_share(speed * read_per_token(given), given.device)}")


def sides(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Puna first."""
    common = 0.9 if given.what == "prefix" else 0.0
    found = {"puna": partial(engine_side, given, folder, common)}
    if given.what == "prefix":
        found["puna, nothing shared"] = partial(engine_side, given, folder, 0.0)
    if given.what in ("decode", "prefill"):
        found["generate"] = partial(transformers_side, given, folder, common)
    if given.what == "decode":
        found["generate, static"] = partial(transformers_side, given, folder, common, static=True)
    if given.what in ("throughput", "prefix") and given.device != "cpu":  # on a CPU it did not come to an end
        found["generate_batch"] = partial(continuous_side, given, folder, common)
    return found


def _share(rate: float, device: str) -> str:
    import torch

    card = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else device
    peak = next((value for name, value in BANDWIDTH.items() if name in card), None)
    return f"{rate / 1e9:.1f} GB/s" + (f", {rate / peak:.0%} of {peak / 1e12} TB/s" if peak else f" ({card})")


if __name__ == "__main__":
    main()
