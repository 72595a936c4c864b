"""Greedy decoding of SmolLM2-135M: puna's engine in bf16 beside transformers, in the GGUF's Q4_1 beside llama.cpp.

python bench/generate.py [--weights bf16|q4_1] [--batch 1] [--tokens 64] [--rounds 5]
Tokens are those generated; reading the prompt of 32 ids is in the time of all. llama.cpp runs in the interpreter that
PUNA_LLAMA_CPP names, one prompt at a time. Weights read a second stand beside what reading memory alone gives.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from side_by_side import Work, compare

MODEL = "smollm2-135m"


def prompts(rows: int):
    import torch

    return torch.randint(1000, 40000, (rows, 32), generator=torch.Generator().manual_seed(0))


def puna_side(rows: int, tokens: int, packed: bool) -> Work:
    import puna
    from puna.infer.request import Request
    from puna.infer.sampling import Sampling

    engine = puna.load(MODEL, dtype="bf16", packed=packed).engine
    requests = [Request(ids, Sampling(max_tokens=tokens)) for ids in prompts(rows).tolist()]

    def step() -> float:
        results = engine.run(requests)
        engine.release()  # or the next round would have its prompts already
        return float(len(results[0].completions[0].token_ids))

    return Work(step)


LLAMA_CPP = """
import json, os, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=len(os.sched_getaffinity(0)), verbose=False)
print("ready", flush=True)
for line in sys.stdin:
    ids, tokens = json.loads(line)
    model.reset()
    made = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        made.append(token)
        if len(made) == tokens:
            break
    print(len(made), flush=True)
"""


def llama_cpp_side(tokens: int, file: str) -> Work:
    command = [os.environ.get("PUNA_LLAMA_CPP", sys.executable), "-c", LLAMA_CPP, file]
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}  # its threads are 2.5 times as fast spinning
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert peer.stdin is not None
    assert peer.stdout is not None
    if peer.stdout.readline() != "ready\n":
        raise ImportError("llama_cpp: name an interpreter that has it in PUNA_LLAMA_CPP")
    asked, told = peer.stdin, peer.stdout

    def step() -> float:
        print(json.dumps([prompts(1).tolist()[0], tokens]), file=asked, flush=True)
        return float(told.readline())

    return Work(step)


def read_bandwidth() -> float:
    """GB/s of adding up half a gigabyte that was written before, by all threads; median of 9."""
    import torch

    memory = torch.ones(2**26, dtype=torch.int64)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - started)
    return memory.nbytes / statistics.median(times) / 1e9


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
    parser.add_argument("--weights", choices=("bf16", "q4_1"), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    import puna
    from puna.checkpoint.registry import find_model

    packed = given.weights == "q4_1"
    ours = {"puna": partial(puna_side, given.batch, given.tokens, packed)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        if packed:
            if given.batch > 1:
                parser.error("llama.cpp is asked one prompt at a time: --batch 1")
            path = find_model(MODEL)
            peers = {"llama.cpp": partial(llama_cpp_side, given.tokens, str(path))}
        else:
            puna.load(MODEL, dtype="bf16").save(path)
            peers = {"transformers": partial(transformers_side, given.batch, given.tokens, str(path))}
        size = path.stat().st_size if packed else sum(p.stat().st_size for p in path.glob("*.safetensors"))
        speeds = compare({**ours, **peers}, given.batch * given.tokens, given.rounds)
    for name, speed in speeds.items():
        print(f"{name}: {size * speed / given.batch / 1e9:.1f} GB/s of weights")
    print(f"reading memory alone: {read_bandwidth():.1f} GB/s")


if __name__ == "__main__":
    main()
