"""The memory ladder of fine-tuning: peak memory above import and tokens a second, a rung at a time, SmolLM2-135M.

python bench/ladder.py ROWS.jsonl [--steps 4] [--batch 4] [--length 512] [--write docs/memory.md]

A rung is a list of `key=value` words of `puna run sft`, run in a process of its own. Peak memory is what metrics.jsonl
says of the steps: the process's resident set, less what a process has that only imported the recipe.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from puna.log import Metrics

START, END = "<!-- bench/ladder.py -->", "<!-- end -->"
ALWAYS = [
    "model=smollm2-135m",
    "template=chatml",
    "valid_fraction=0",
    "train.evaluate_every=999",
    "train.save_every=999",
]
FULL = ["lora=null", "train.optimizer.lr=2e-5"]
FREE = ["train.optimizer.in_backward=true", "train.optimizer.clip=0", "train.skip_budget=0"]
RUNGS = {
    "full fine-tuning: packed rows, chunked loss (always)": FULL,
    "+ compile": [*FULL, "compile=true"],
    "+ selective checkpointing": [*FULL, "train.checkpoint_activations=selective"],
    "+ full checkpointing": [*FULL, "train.checkpoint_activations=full"],
    "+ full checkpointing, optimizer in backward": [*FULL, "train.checkpoint_activations=full", *FREE],
    "+ full checkpointing, optimizer in backward, 8-bit AdamW": [
        *FULL, "train.checkpoint_activations=full", *FREE, "train.optimizer.kind=adamw8bit",
    ],
    "+ the same with a quarter of the rows at a time": [
        *FULL, "train.checkpoint_activations=full", *FREE, "train.optimizer.kind=adamw8bit", "batch_size={quarter}",
    ],
    "LoRA": [],
    "LoRA, selective checkpointing": ["train.checkpoint_activations=selective"],
    "LoRA, full checkpointing": ["train.checkpoint_activations=full"],
    "QLoRA, full checkpointing": ["train.checkpoint_activations=full", "quantize=nf4"],
}  # fmt: skip


def imported() -> int:
    """Peak bytes of a process that only imported the recipe."""
    code = (
        "import puna.recipes.sft, torch\nfrom puna.device import peak_memory\nprint(peak_memory(torch.device('cpu')))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def climb(words: list[str]) -> tuple[int, float] | str:
    """(peak bytes, tokens a second in the median step after the first) of a run, or why there was none."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "puna", "run", "sft", *words, f"output={output}"]
        done = subprocess.run(command, capture_output=True, text=True)
        rows = [row for row in Metrics(output / "metrics.jsonl").read() if "loss" in row]
    if done.returncode:
        return next((line for line in done.stderr.splitlines() if line.startswith("puna: ")), done.stderr[-200:])
    return max(row["memory"] for row in rows), statistics.median(row["tok_s"] for row in rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="conversations, as data.path takes them")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", default="", help="rungs whose name has this in it")
    parser.add_argument("--write", type=Path, help="put the table into this document, between its two marks")
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    common = [*ALWAYS, f"data.path={given.rows}", f"steps={given.steps}", f"seq_len={given.length}"]
    common.append(f"batch_size={given.batch}")
    floor = imported()
    lines = ["| rung | peak GB above import | tokens/s |", "|---|---|---|"]
    for name, words in RUNGS.items():
        if given.only not in name:
            continue
        quarter = max(1, given.batch // 4)
        found = climb([*common, *(word.format(quarter=quarter) for word in words)])
        told = found if isinstance(found, str) else f"{(found[0] - floor) / 1e9:.2f} | {found[1]:,.0f}"
        lines.append(f"| {name} | {told} |" + (" |" if isinstance(found, str) else ""))
        print(lines[-1], flush=True)
    told = f"`python bench/ladder.py ROWS.jsonl --steps {given.steps} --batch {given.batch} --length {given.length}`"
    if given.write:
        text = given.write.read_text(encoding="utf-8")
        table = f"{START}\n{told}\n\n" + "\n".join(lines) + f"\n{END}"
        given.write.write_text(re.sub(f"{START}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
