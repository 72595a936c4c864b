"""Code of a model: what passes, what fails, and what it must not be able to do."""

import os
import sys
import time
from pathlib import Path

import pytest

from puna.eval import confined, sandbox
from puna.eval.exam import program
from puna.eval.sandbox import run_all, run_code
from puna.eval.sets import read_questions
from puna.eval.table import TASKS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes can be limited on POSIX only")
MISCHIEF = {
    "an exception": ("assert 1 == 2, 'no'", "AssertionError: no"),
    "no Python": ("def f(:", "SyntaxError"),
    "exit(0) is no success": ("import sys; sys.exit(0)", "SystemExit"),
    "nor is a harder one": ("import os; os._exit(0)", "refused: os._exit"),
    "nor is another's": (
        "import sys, os\nsys.modules.pop('posix')\nimport posix\nposix._exit(0)",
        "refused: a new posix",
    ),
    "a word of the caller's frame": (
        "import sys, os\nw = sys._getframe(1).f_locals['word']\nos.write(3, w.encode())\nos._exit(0)",
        "KeyError",
    ),
    "a word of the command line": (
        (
            "import os\nw = open('/proc/self/cmdline', 'rb').read().split(b'\\0')[4]\n"
            "for n in range(3, 9):\n    try: os.write(n, w)\n    except OSError: pass\nos._exit(0)"
        ),
        "refused: os._exit",
    ),
    "a child without an event": ("import multiprocessing.util as u; u.spawnv_passfds(b'/bin/true', [], [])", "refused"),
    "nor that": ("import sys; sys.modules.pop('_posixsubprocess', 0); import _posixsubprocess", "refused: a new"),
    "a child": ("import os; os.fork()", "refused: os.fork"),
    "a program": ("import subprocess; subprocess.run(['true'])", "refused: subprocess.Popen"),
    "a shell": ("import os; os.system('true')", "refused: os.system"),
    "the network": ("import socket; socket.create_connection(('127.0.0.1', 9))", "refused: socket."),
    "libc": ("import ctypes; ctypes.CDLL(None)", "refused: ctypes."),
    "another process": ("import os; os.kill(os.getppid(), 9)", "refused: os.kill"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
}


@pytest.mark.parametrize("name", MISCHIEF)
def test_mischief_is_told(name: str) -> None:
    """What ends early, or is refused, is a failure with its reason, never a pass."""
    code, why = MISCHIEF[name]
    outcome = run_code(code)
    assert not outcome.passed
    assert why in outcome.why


def test_what_is_allowed() -> None:
    """Imports, output without end, threads and files in its own folder are no reason to fail."""
    programs = [
        "import math, re, collections, dataclasses, random, hashlib\n@dataclasses.dataclass\nclass A:\n    x: int",
        "print('x' * 10**7)",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "open('a.txt', 'w').write('x')\nimport os\nos.rename('a.txt', 'b.txt')\nassert open('b.txt').read() == 'x'",
    ]
    assert [outcome.why for outcome in run_all(programs)] == [""] * 4


def test_no_end_and_no_memory() -> None:
    """A loop that ends with the evaluation, or takes the machine's memory with it."""
    started = time.monotonic()
    loop, sleep, bomb = run_all(["while True: pass", "import time; time.sleep(99)", "x = b'a' * 2**33"], 1.0, workers=3)
    assert time.monotonic() - started < 20
    assert "timed out" in loop.why
    assert "timed out" in sleep.why
    assert "out of memory" in bomb.why


def test_files_and_secrets_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that deletes the user's files, or reads a key in the environment."""
    monkeypatch.setenv("PUNA_SECRET", "key")
    mine = tmp_path / "mine.txt"
    mine.write_text("x")
    programs = [
        f"open({str(mine)!r}, 'w')",
        f"import os; os.remove({str(mine)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.open({str(mine)!r}, os.O_WRONLY)",
        "open('../x', 'w')",
        f"import os; os.symlink({str(mine)!r}, 'link')",
    ]
    assert [outcome.passed for outcome in run_all(programs)] == [False] * len(programs)
    assert mine.read_text() == "x"
    assert run_code("import os\nassert 'PUNA_SECRET' not in os.environ").passed


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that fill the disk, one for every answer."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_code("import os\nos.mkdir('a')\nopen('a/b', 'w').write('x')\nos.chmod('a', 0)\nwhile True: pass", seconds=0.5)
    assert list(tmp_path.iterdir()) == []


def test_humaneval_knows_its_own_answers(assets: Path) -> None:
    """If the published solutions do not pass here, nobody's do."""
    questions = read_questions("humaneval", TASKS["humaneval"], assets / "eval").questions[::8]
    right = run_all([program(q, q.continuations[0]) for q in questions])
    assert [outcome.why for outcome in right] == [""] * len(questions)
    assert not any(outcome.passed for outcome in run_all([program(q, "    return None\n") for q in questions[:4]]))


def test_the_confined_program_imports_nothing_of_ours() -> None:
    """It starts without site-packages: an import of puna there fails only when code is run."""
    source = Path(sys.modules["puna.eval.confined"].__file__ or "").read_text(encoding="utf-8")
    assert "import puna" not in source
    assert "from puna" not in source


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone has a second wall")
def test_the_system_refuses_where_python_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A way around the audit hook leads to the user's files and the network; walls that are missing go untold."""
    source = Path(confined.__file__).read_text(encoding="utf-8")
    hook = "    sys.addaudithook("
    assert hook in source
    (tmp_path / "unhooked.py").write_text(source.replace(hook, "    str("), encoding="utf-8")
    monkeypatch.setattr(confined, "__file__", str(tmp_path / "unhooked.py"))
    mine = tmp_path / "mine.txt"
    sandbox.warn_missing.cache_clear()
    wrote, connected = run_all([
        f"open({str(mine)!r}, 'w').write('x')",
        "import socket\nassert [name for _, name in socket.if_nameindex()] != ['lo'], 'no devices'",
    ])  # fmt: skip
    if "Landlock" not in caplog.text:
        assert "PermissionError" in wrote.why
        assert not mine.exists()
    if "namespaces" not in caplog.text:
        assert "no devices" in connected.why
    assert wrote.passed == mine.exists()
