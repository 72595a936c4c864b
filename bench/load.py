"""From a model directory to its first logits, beside transformers: `python bench/load.py [MODEL]`.

Each measurement is a process of its own, by turns, with the file in the system's cache. The clock starts after the
imports and stops when a prompt was tokenized and its logits are there. Memory is the peak of everything the process
holds (its own pages and those of the file) beyond what it held before, without the tokenizer, by the size of the
tensors. Both sides keep the dtype on disk (their default) or convert to fp32.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROUNDS, PROMPT = 7, "The llama is"


def resident(field: str) -> float:
    """MB of this process, from Linux's books: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e3


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(side: str, folder: str, dtype: str) -> None:
    """Print seconds, MB at the peak, MB of tensors, and the likeliest next id."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    numbers = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if side == "puna":
        import puna.infer.llama
        from puna.checkpoint.registry import open_model

        def whole():
            llama = puna.infer.llama.load(folder, dtype=dtype, device="cpu")
            return llama.logits([llama.encode(PROMPT)])

        def weights():
            return open_model(folder).load(numbers, torch.device("cpu"))

        def call(model, ids):
            return model(ids)
    else:
        import transformers.models.llama.modeling_llama  # noqa: F401, imports are not on the clock
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def whole():
            ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
            return weights()(ids).logits.float()

        def weights():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=numbers)

        def call(model, ids):
            return model(ids).logits

    with torch.inference_mode():
        if os.environ.get("PUNA_LOAD_PEAK"):
            before = reset_peak()
            model = weights()
            call(model, torch.arange(4)[None])
            size = sum(p.nbytes for p in model.parameters())
            print(0, resident("VmHWM") - before, size / 1e6, 0)
            return
        started = time.perf_counter()
        logits = whole()
        print(time.perf_counter() - started, 0, 0, int(logits[0, -1].argmax()))


def ask(side: str, folder: str, dtype: str, **environment: str) -> list[float]:
    words = [sys.executable, __file__, folder, side, dtype]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.stderr)
    return [float(x) for x in done.stdout.split()]


def main(model: str) -> None:
    import puna

    with tempfile.TemporaryDirectory() as place:
        puna.load(model).save(folder := f"{place}/model")
        print(f"{'':22} {'seconds':>8} {'ratio':>6} {'peak / tensors':>15}")
        for dtype in ("bf16", "fp32"):
            turns = [{side: ask(side, folder, dtype) for side in ("puna", "transformers")} for _ in range(ROUNDS)]
            if len({turn[side][3] for turn in turns for side in turn}) > 1:
                raise SystemExit(f"not the same work: {turns}")
            for side in turns[0]:
                seconds = statistics.median(turn[side][0] for turn in turns)
                ratio = statistics.median(turn[side][0] / turn["transformers"][0] for turn in turns)
                _, peak, size, _ = ask(side, folder, dtype, PUNA_LOAD_PEAK="1")
                print(f"{side + ' ' + dtype:22} {seconds:8.3f} {ratio:6.2f} {peak / size:15.2f}")
        print(f"ratio: to transformers, median of {ROUNDS} turns; {os.cpu_count()} cores")


if __name__ == "__main__":
    if len(sys.argv) > 3:  # one measurement, asked for by `ask`
        measure(sys.argv[2], sys.argv[1], sys.argv[3])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("model", nargs="?", default="smollm2-135m")
        main(parser.parse_args().model)
