"""Run by tests: puna in forked children that are killed, or signalled, at a chosen event.

One process imports torch once and forks a child for every run. In a child every change of a file below `root` is an
event with a name: before a file is opened to be written, before a rename, a removal or a new folder, before and after
each fsync. Between two events nothing on the disk changes but the content of open files, so killing at each of
them shows every state that a crash can leave. Requests and answers are JSON, a line each:

{"words": [...], "root": PATH, "at": NAME or null, "signal": 9, "after": SECONDS or 0, "crowded": false}
-> {"code": exit code, or minus the signal, "said": its output, "events": all names in order, "pid": the child}
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
if hasattr(os, "sched_setaffinity"):  # one core: threads are not measured, and a forked child owns no pool of them
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import torch
import torch._dynamo  # which building a model imports, for a second in every child
import torch.distributed.checkpoint.hf_storage
import torch.distributed.checkpoint.state_dict_loader
import torch.distributed.checkpoint.state_dict_saver

from puna import cli, run_folder
from puna.checkpoint import train_state
from puna.files import temporary_name
from puna.recipes import RECIPES, config_type
from puna.train import run_report

_CHANGES = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir"}
_TEMPORARY = re.compile(r"\.([^/]+)" + re.escape(temporary_name(Path("x")).name[2:].rstrip("0123456789")) + r"\d+")


class Events:
    """Names every change below `root` and sends itself a signal at the one called `at`."""

    def __init__(self, root: Path, at: str | None, number: int):
        self.root, self.at, self.number = f"{root}/", at, number
        self.seen: list[str] = []

    def happens(self, what: str, *paths: Any) -> None:
        places = [os.path.abspath(os.fsdecode(path)) + "/" for path in paths]
        if not all(place.startswith(self.root) for place in places):
            return
        named = [_TEMPORARY.sub(r"~\1", place[len(self.root) : -1]) or "." for place in places]
        name = " ".join([what, *(re.sub(r"step-\d+", "step-N", place) for place in named)])
        self.seen.append(name)
        if name == self.at:
            self.at = None
            os.kill(os.getpid(), self.number)

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        if event in _CHANGES and isinstance(given[0], str | bytes | os.PathLike):
            if event == "os.rename":
                self.happens("rename", *given[:2])
            elif given[-1] == -1:  # otherwise relative to an open folder: the removal of a tree
                self.happens(_CHANGES[event], given[0])
            else:
                self.happens(f"{_CHANGES[event]} in", os.readlink(f"/proc/self/fd/{given[-1]}"))
        elif event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR):
            self.happens("open", given[0])

    def watch(self) -> None:
        def fsync(descriptor: int) -> None:  # in name only: a kill cannot show what an fsync did, and waiting is slow
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.happens("fsync", path)
            self.happens("fsynced", path)

        os.fsync = fsync
        sys.addaudithook(self.audit)


def child(request: dict[str, Any], said: Any, told: Any) -> None:
    """Run the command line with `words`; never returns."""
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    if request["crowded"]:  # by others, after the free space was looked at
        train_state.require_space = lambda folder, size: None
    events = Events(Path(request["root"]), request["at"], request["signal"])
    code: Any = 1
    try:
        sys.argv[1:] = request["words"]
        events.watch()
        cli.main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    finally:
        events.root = "\0"  # what is written below is no event
        json.dump(events.seen, told)
        told.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        process = os.fork()
        if not process:
            child(request, said, told)
        if request["after"]:
            time.sleep(request["after"])
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        for file in (said, told):
            file.seek(0)
        events = told.read()
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "said": said.read(), "events": json.loads(events) if events else [], "pid": process}


def main() -> None:
    torch.set_num_threads(1)
    for recipe in RECIPES:
        config_type(recipe)
    known = run_folder.environment()  # a tenth of a second each, for facts that do not change
    run_folder.environment = run_report.environment = lambda: known
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
