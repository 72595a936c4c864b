"""The command line in processes of its own, as a user meets it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Done = subprocess.CompletedProcess[str]
FORKS = """
import contextlib, gc, json, os, sys, tempfile
import torch
import puna.recipes.pretrain, puna.recipes.sft, puna.data.english
with contextlib.suppress(ImportError):
    import reasoning_gym
with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # loads as many modules as torch itself
from puna.cli import main
answers = []
gc.freeze()
asked = json.load(sys.stdin)
for words in asked["calls"]:
    outputs = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        typed = tempfile.TemporaryFile("w+")
        typed.write(asked["stdin"])
        typed.seek(0)
        sys.stdin = typed
        for number, file in enumerate(outputs, 1):
            os.dup2(file.fileno(), number)
        sys.argv[1:] = words
        try:
            main()
        except SystemExit as error:
            sys.stdout.flush()
            os._exit(error.code or 0)  # taking torch down takes half a second
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in outputs:
        file.seek(0)
    answers.append([code, *(file.read().decode() for file in outputs)])
print(json.dumps(answers))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "110", "OMP_WAIT_POLICY": "passive"}


def puna(*words: object, cwd: Path | None = None, flags: Sequence[str] = ()) -> Done:
    command = [sys.executable, *flags, "-m", "puna", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment())


def puna_all(calls: Sequence[Sequence[object]], cwd: Path | None = None, flags: Sequence[str] = ()) -> list[Done]:
    """Several commands, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda words: puna(*words, cwd=cwd, flags=flags), calls))


def puna_forked(calls: Sequence[Sequence[object]], cwd: Path, stdin: str = "") -> list[Done]:
    """Several commands, one after the other, forked from a process that has torch loaded: 20 ms each, not 2 s."""
    words = [[str(word) for word in call] for call in calls]
    command = [sys.executable, "-c", FORKS]
    asked = json.dumps({"calls": words, "stdin": stdin})
    answered = subprocess.run(
        command, input=asked, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment()
    )
    assert not answered.returncode, answered.stderr
    return [Done(call, *answer) for call, answer in zip(words, json.loads(answered.stdout), strict=True)]


def commands(text: str) -> list[str]:
    """Commands in code blocks and between backticks, without comments, prompts and what they print."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose)]
    called = [line for line in lines if re.match(r"(puna|make|python bench/\S+)( [^/]|$)", line)]
    return list(dict.fromkeys(re.split(r"\s+# ", line)[0].strip() for line in called if line not in ("puna", "make")))
