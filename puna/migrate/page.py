"""The page that a migration writes: lines of YAML that say which way they push, under what was not carried over."""

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

DEFAULT = "torchtune's default"
_PLAIN = re.compile(r"(?:[A-Za-z/]|~/)[\w/.~+-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off"}
_COLUMN, _WIDTH = 36, 110

KNOBS = {
    "recipe": "",
    "output": "the run folder: metrics, checkpoints and final/",
    "seed": "another: other adapters' starts and another order of rows",
    "dtype": "of the computation; bf16: faster where the hardware has it, fp32: exact",
    "device": "auto: cuda, then mps, then cpu",
    "model": "what to start from: a folder of weights, or org/name in the Hugging Face cache",
    "template": "how turns are written as ids; the tuned model keeps it",
    "quantize": "nf4: the frozen base in a quarter of the memory, a little slower; null: as stored",
    "lora": "adapters on a frozen base; null: every weight is trained, with about eight times the memory",
    "lora.rank": "higher: closer to full fine-tuning, more memory",
    "lora.alpha": "higher: what adapters add weighs more (times alpha / rank)",
    "lora.dropout": "higher: less learned by heart where rows are few, slower",
    "lora.targets": "more layers: closer to full fine-tuning, more memory",
    "lora.dora": "true: rows' lengths trained apart; better at low ranks, slower",
    "qat.scheme": "what the model is rounded to after training",
    "qat.group": "smaller: nearer to the unrounded model, a larger file",
    "distill.teacher": "a better model with the same vocabulary; held in memory beside this one",
    "distill.ratio": "higher: more of the teacher, less of the rows' own answers",
    "distill.divergence": "forward: covers all the teacher would say; reverse: keeps to its likeliest",
    "distill.temperature": "higher: more weight on what the teacher finds unlikely",
    "data": "",
    "valid": "",
    "train_on": "all: the assistant's turns; last: its last one; a list: those of these roles",
    "too_long": "cut: the end of a long conversation is lost; drop: all of it",
    "seq_len": "longer: fewer conversations are cut, more memory",
    "packed": "true: several conversations a row, faster; a step then sees more of them",
    "batch_size": "rows over all devices; higher: faster, more memory",
    "valid_fraction": "higher: a surer validation loss, fewer rows to learn from",
    "epochs": "passes over the rows; more: learned better, in the end by heart",
    "steps": "optimizer steps; more: learned better, in the end by heart",
    "compile": "true: faster and less memory after a minute of compiling",
    "train.accumulate": "higher: a larger batch in the same memory, slower steps",
    "train.checkpoint_activations": "full: least memory, a third slower; selective: between; none: fastest",
    "train.offload_activations": "true: less memory on the card, slower",
    "train.save_every": "steps; lower: less is lost in a crash, more writing",
    "train.evaluate_every": "steps; lower: a closer look, slower",
    "train.keep": "checkpoints on disk",
    "train.skip_budget": "bad steps in a row that may be skipped; 0: the first one stops the run",
    "train.track": "where metrics go besides metrics.jsonl",
    "train.optimizer.kind": "adamw8bit: a quarter of the optimizer's memory; adamw: exact",
    "train.optimizer.in_backward": "true: no gradients kept, less memory; needs accumulate 1, clip 0, skip_budget 0",
    "train.optimizer.lr": "higher: learns faster until it diverges; adapters take ten times what full training does",
    "train.optimizer.betas": "higher: steadier and slower to follow",
    "train.optimizer.eps": "higher: damps steps of weights with small gradients",
    "train.optimizer.weight_decay": "higher: smaller weights, less learned by heart",
    "train.optimizer.clip": "lower: steadier; 0: gradients are never clipped",
    "train.optimizer.warmup_steps": "more: a gentler start",
    "train.optimizer.final_lr": "where the cosine ends, as a share of lr; 1: a constant rate",
}
"""In the order of the page. Each says which way it pushes: what torchtune's users liked best about its configs."""

_SOURCE = {
    "hub": "a data set in the Hugging Face cache",
    "path": "a file, a folder or a pattern of files",
    "file": "which of its files",
    "split": "which of its parts",
    "format": "the shape of its rows",
    "columns": "what its columns are called",
    "limit": "only the first so many rows",
    "passes": "how often it is read in an epoch: more weight in the mixture",
}


@dataclass
class Page:
    """A puna config in the making, and what a reader of it should know."""

    method: str = ""
    ranks: int = 1
    lines: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Dotted key of puna's -> value, and where it came from."""
    lost: dict[str, str] = field(default_factory=dict)
    """torchtune's key -> why it is not carried over."""
    same: list[str] = field(default_factory=list)
    """What puna does anyway."""
    before: dict[str, str] = field(default_factory=dict)
    """Why -> what to type before the run,"""
    after: dict[str, str] = field(default_factory=dict)
    """and when it has ended."""

    def put(self, key: str, value: Any, source: str = DEFAULT) -> None:
        self.lines[key] = (value, source)

    def given(self) -> dict[str, Any]:
        """The values alone, as `puna.recipes.load` takes them."""
        return {key: value for key, (value, _) in self.lines.items()}


def written(page: Page, source: str, target: str) -> str:
    """The page as a YAML file."""
    nproc = f" --nproc {page.ranks}" if page.ranks > 1 else ""
    lines = [f"# {page.method}, from torchtune's {source} by `puna migrate`.", "#"]
    commands = {**page.before, "To train:": f"puna run sft --config {quote(target)}{nproc}", **page.after}
    for why, command in commands.items():
        lines += [f"# {why}", f"#   {command}"]
    lines.append("#")
    if page.lost:
        lines.append("# Not carried over:")
        lines += [line for key, why in page.lost.items() for line in _wrapped(f"{key}: {why}")]
    if page.same:
        lines += _wrapped("puna does anyway: " + ", ".join(page.same), "# ")
    ordered = sorted(page.lines, key=lambda key: _place(key))
    tree: dict[str, Any] = {}
    for key in ordered:
        *outer, last = key.split(".")
        inner = tree
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = key
    return "\n".join([*lines, *_yaml(tree, page, "")]) + "\n"


def _place(key: str) -> int:
    known = next((k for k in (key, key.split(".")[0]) if k in KNOBS), "")
    return list(KNOBS).index(known) if known else len(KNOBS)


def _yaml(tree: dict[str, Any], page: Page, indent: str) -> Iterator[str]:
    for name, inner in tree.items():
        if isinstance(inner, dict):
            yield f"{indent}{name}:"
            yield from _yaml(inner, page, indent + "  ")
            continue
        value, source = page.lines[inner]
        knob = KNOBS.get(inner, "") or _SOURCE.get(name, "")
        from_where = f" ({source})" if source and source.rpartition(".")[2] != name else ""
        why = f"# {knob}{from_where}" if knob else ""
        line = f"{indent}{name}: {scalar(value)}"
        if len(line) + 2 > _COLUMN and why:
            yield f"{indent}{why}"
            yield line
        else:
            yield f"{line:<{_COLUMN}}{why}".rstrip()


def scalar(value: Any) -> str:
    """A value as YAML 1.2 on one line."""
    if isinstance(value, list):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(k)}: {scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        digits, _, power = f"{value:e}".partition("e")
        return f"{float(digits)}e{int(power)}"
    return json.dumps(value, ensure_ascii=False)


def _wrapped(text: str, indent: str = "#   ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent="#     ", break_on_hyphens=False)
