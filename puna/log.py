"""Logging to stderr, metrics to `metrics.jsonl`, progress as a bar on a terminal and as plain lines elsewhere."""

import json
import logging
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from puna.files import disk_errors, write_text
from puna.ranks import rank

log = logging.getLogger("puna")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def setup_logging(verbosity: int = 0) -> None:
    """-1: warnings only, 0: information, 1: debugging. Everything goes to stderr; stdout is for results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    log.setLevel(level)
    log.propagate = False


def harmless(text: str, instead: str = "") -> str:
    """`text` without what a terminal would obey: a model's words, and people's data, are not to be trusted."""
    return _CONTROL.sub(instead, text)


class Metrics:
    """Appends one JSON object a line, on rank 0. Rows past `step` are dropped: a resumed run logs no step twice."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: float = math.inf) -> None:
        """Drop the rows past `step`, and a last one that was cut short."""
        if self.path.exists() and rank() == 0:
            kept = [row for row in self.read() if row.get("step", 0) <= step]
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def write(self, **row: Any) -> None:
        if rank():
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All rows. A last line cut short by a crash is left out; a damaged line is named and left out."""
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            row = parse_row(line)
            if row is None:
                log.warning("%s:%d: left out a damaged row", self.path, number)
            else:
                rows.append(row)
        return rows

    def sync(self) -> None:
        """Have the rows on the disk: a checkpoint that outlives a power cut must not have lost those of its steps."""
        if self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line of a metrics file; None for one that is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Progress:
    """Shows how far `total` units of work are: `with Progress("training", 500) as p: p.update(7, "loss 3.2")`.

    On a terminal a bar; elsewhere at most one line in `interval` seconds, so that logs stay short.
    """

    def __init__(self, label: str, total: int | None, done: int = 0, interval: float = 10.0):
        self.label, self.total, self.done, self.interval = label, total, done, interval
        self.text = ""
        self._started = self._last = time.monotonic()
        self._first = done
        self._bar: Any = None
        self._handlers: list[logging.Handler] = []

    def __enter__(self) -> "Progress":
        if sys.stderr is not None and sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            self._start_bar()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            log.handlers[:] = self._handlers

    def update(self, done: int, text: str = "") -> None:
        """Report `done` units finished in all, with a short status text."""
        self.done, self.text = done, text
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif now - self._last >= self.interval:
            self._last = now
            log.info("%s", self.line())

    def line(self) -> str:
        """The plain form: `training 120/500  loss 3.21  0:34 left`."""
        if not self.total:
            return f"{self.label} {self.done:,}  {self.text}".rstrip()
        fresh = self.done - self._first
        left = (time.monotonic() - self._started) / fresh * (self.total - self.done) if fresh else 0.0
        return f"{self.label} {self.done}/{self.total}  {self.text}  {clock(left)} left"

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        middle = (BarColumn(bar_width=16), MofNCompleteColumn()) if self.total else (SpinnerColumn(),)
        self._bar = Bar(
            TextColumn("{task.description}"),
            *middle,
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, text="")
        # Lines logged while the bar is up have to go through its console, or they tear it.
        self._handlers = list(log.handlers)
        plain = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, highlighter=NullHighlighter()
        )
        log.handlers[:] = [h for h in self._handlers if type(h) is not logging.StreamHandler] + [plain]
        self._bar.start()


def clock(seconds: float) -> str:
    """75.2 -> "1:15"."""
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )
