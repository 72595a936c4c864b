"""Writes docs/support.md: what works together, measured by puna's doctor on small models.

python docs/support.py
"""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.model_directory import save_model
from puna.eval.doctor.case import Case, open_case
from puna.eval.doctor.diagnose import CHECKS, Check, diagnose, exact
from puna.eval.doctor.training_checks import resume
from puna.files import atomic_folder
from puna.log import log
from puna.lora import LoraConfig, add_lora, lora_parameters
from puna.model.config import ModelConfig, RopeScaling
from puna.model.init import build_model, init_weights, materialize
from puna.tokenizer.bpe import save_bpe, train_bpe
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.blocks import compile_blocks
from puna.train.optim import OptimizerConfig

PAGE = Path(__file__).with_suffix(".md")
TEXT = "In the high puna the llamas graze; a llama does not count the stars: 1, 2, 3, 12 and 345. "
BASE = {
    "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 6, "ffn_dim": 40, "vocab_size": 540,
    "max_seq_len": 300, "rope_theta": 10000.0, "rope_scaling": None, "norm_eps": 1e-5, "tie_embeddings": False,
}  # fmt: skip

SIZES = ("dim", "ffn_dim", "n_layers", "vocab_size", "max_seq_len", "norm_eps")  # of every row


class Row(NamedTuple):
    """A kind of model or of computing; `covers` are the fields and choices of configs that it stands for."""

    shape: dict[str, Any]
    covers: tuple[str, ...] = ()
    dtype: str = "auto"
    compiled: bool = False
    adapter: bool = False
    only: tuple[str, ...] = ()


ROWS = {
    "MHA, untied (Llama 1)": Row(
        {}, ("n_heads", "dim", "ffn_dim", "n_layers", "vocab_size", "max_seq_len", "norm_eps")
    ),
    "GQA (Llama 2 70B, 3)": Row({"n_kv_heads": 2}, ("n_kv_heads",)),
    "MQA": Row({"n_kv_heads": 1}),
    "RoPE theta 500,000": Row({"n_kv_heads": 2, "rope_theta": 500000.0}, ("rope_theta",)),
    "RoPE scaling (3.1, 3.2)": Row(
        {"n_kv_heads": 2, "rope_scaling": RopeScaling(factor=8, original_max_seq_len=64)}, ("rope_scaling",)
    ),
    "tied embeddings": Row({"n_kv_heads": 2, "tie_embeddings": True}, ("tie_embeddings",)),
    "explicit head_dim": Row({"n_kv_heads": 2, "head_dim": 16}, ("head_dim",)),
    "LoRA on its base": Row({"n_kv_heads": 2}, adapter=True),
    "fp32": Row({"n_kv_heads": 2}, ("fp32",), dtype="fp32"),
    "bf16 compute, fp32 weights": Row({"n_kv_heads": 2}, ("bf16",), dtype="bf16"),
    "compile": Row({"n_kv_heads": 2}, compiled=True, only=("gradients", "accumulation", "packing", "resume, AdamW")),
}


def _resumed(kind: Any, lora: bool) -> Any:
    optimizer = OptimizerConfig(kind=kind, lr=1e-3, warmup_steps=2)
    return lambda case: resume(case, optimizer, lora)


OPTIMIZERS = {
    f"resume, {name}{', LoRA' if lora else ''}": Check(
        f"resume-{kind}-{lora}", "stopped and resumed = straight", _resumed(kind, lora), exact, "moments"
    )
    for name, kind in (("AdamW", "adamw"), ("8-bit AdamW", "adamw8bit"), ("Muon", "muon"))
    for lora in (False, True)
    if not (lora and kind != "adamw")
}
CHECKED = {c.name: c for c in CHECKS}
LEFT_OUT = ("round-trip", "control", "bos", "mask", "stop", "prompt", "labels", "positions", "clipping", "decay",
            "resume", "resume-all")  # fmt: skip
COLUMNS: dict[str, Check] = {n: c for n, c in CHECKED.items() if n not in LEFT_OUT} | OPTIMIZERS


def patients(folder: Path) -> Iterator[tuple[str, Case]]:
    """A case for each row: a tiny model with random weights and four texts."""
    (folder / "tokenizer").mkdir()
    save_bpe(train_bpe([TEXT * 20], 540), folder / "tokenizer")
    tokenizer = Tokenizer(folder / "tokenizer")
    data = folder / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i}: {TEXT[: 40 + 9 * i]}"}) + "\n" for i in range(8)))
    for number, (name, row) in enumerate(ROWS.items()):
        log.warning("%s", name)
        place = folder / str(number)
        place.mkdir()
        model = _model(ModelConfig(**{**BASE, **row.shape}))
        with atomic_folder(place / "model") as target:
            save_model(target, model, tokenizer, "fp32", {})
        if row.adapter:
            _adapter(model, tokenizer, place)
        (place / "scratch").mkdir()
        case = open_case(place / ("adapter" if row.adapter else "model"), data, place / "scratch", dtype=row.dtype)
        if row.compiled:
            _compile(case)
        yield name, case


def measured(row: str, case: Case) -> dict[str, str]:
    """The difference that each column's check finds, as text; FAIL beyond the tolerance."""
    told = {}
    tried = ROWS[row].only or tuple(COLUMNS)
    for name, check in COLUMNS.items():
        if name not in tried:
            told[name] = "not tried"
            continue
        (finding,) = diagnose(case, checks=[dataclasses.replace(check, applies=lambda case: True)])
        number = "exact" if finding.difference == 0 else f"{finding.difference:.0e}"
        told[name] = number if finding.ok else f"FAIL {number}"
        if finding.error:
            log.warning("%s, %s: %s", row, name, finding.error)
    return told


def write(page: Path = PAGE) -> None:
    """Measure everything and write the page."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = {name: measured(name, case) for name, case in patients(Path(scratch))}
    compared = "\n".join(f"- **{name}**: {check.compares}" for name, check in COLUMNS.items())
    head = f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}"
    table = "\n".join(f"| {name} | {' | '.join(told[c] for c in COLUMNS)} |" for name, told in rows.items())
    page.write_text(_PAGE.format(head=head, table=table, compared=compared), encoding="utf-8")


_PAGE = """# What works together

Written by `python docs/support.py`, which runs the checks of `puna doctor` on tiny models with random weights; do not
edit it. A number is the largest difference found, as a share of the largest value; *exact* is bit for bit. Rows are in
fp64, where more than 1e-9 is a mistake, unless they say otherwise (fp32: 1e-3, bf16: 0.08).

{head}
{table}

{compared}

Everything that a row names works with everything that a column names, where there is a number. `puna doctor MODEL
--data FILE` says the same of your own model on your own rows.
"""


def _model(config: ModelConfig) -> Any:
    model = build_model(config)
    materialize(model, torch.device("cpu"))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # no zero matrices: every weight matters
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _compile(case: Case) -> None:
    """Compiled functions belong to one model: a copy is compiled anew, or it would compute with the other's weights."""
    plain = copy.deepcopy(case.model)

    def twin() -> Any:
        model = copy.deepcopy(plain)
        compile_blocks(model)
        return model

    case.model, case.twin = twin(), twin  # type: ignore[method-assign]


def _adapter(model: Any, tokenizer: Tokenizer, place: Path) -> None:
    config = LoraConfig(rank=4, alpha=12)
    add_lora(model, config)
    for name, parameter in lora_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    (place / "adapter").mkdir()
    save_adapter(place / "adapter", model, config, tokenizer, str(place / "model"), {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
    print(PAGE)
