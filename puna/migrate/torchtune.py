"""From a torchtune config to puna's: `migrated(file)` is the page, `puna migrate` writes it."""

import re
from pathlib import Path

from puna.migrate import model, rows, training
from puna.migrate.asked import read
from puna.migrate.page import Page
from puna.migrate.refused import check

_RANKS = re.compile(r"--nproc[_-]per[_-]node[ =](\d+)")
_DOWNLOAD = re.compile(r"tune download ([\w.-]+/[\w.-]+)")
_DISTRIBUTED = ("custom_sharded_layers", "fsdp", "fsdp_cpu_offload", "tensor_parallel_dim")


def migrated(file: Path, ranks: int | None = None) -> Page:
    """The config of `file` as lines of puna's `sft`, with all that it asked for and cannot have.

    Args:
        ranks: devices it ran on; by default those of the `tune run` line in its comments, or one.

    Raises:
        UsageError: it is no torchtune config, or one that puna has no recipe for; the message says what to type.
    """
    asked = read(file)
    check(asked)
    comments = file.read_text(encoding="utf-8")
    named = _RANKS.search(comments)
    page = Page(ranks=ranks or (int(named[1]) if named else 1))
    if not ranks and not named and asked.values.keys() & {*_DISTRIBUTED}:
        page.lost["devices"] = "their number is not in the file, and batch_size counts the rows of all: --nproc N"
    if fetched := _DOWNLOAD.search(comments):
        page.before[f"Where the folder of weights is not there; then model={fetched[1]}:"] = (
            f"puna download {fetched[1]}"
        )
    page.put("recipe", "sft", "")
    output = asked.take("output_dir") or asked.take("checkpointer.output_dir") or f"runs/{file.stem}"
    page.put("output", output, "output_dir")
    model.model(asked, page)
    model.tokenizer(asked, page)
    rows.rows(asked, page)
    model.quantizer(asked, page)
    model.teacher(asked, page)
    training.length(asked, page)
    training.devices(asked, page)
    training.loss(asked, page)
    training.optimizer(asked, page)
    training.memory(asked, page)
    training.logging(asked, page)
    for key, value in asked.left():
        page.lost[key] = f"{value}: not understood"
    return page
