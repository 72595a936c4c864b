"""Names that climb, point elsewhere or are no names, wherever a user or a file can give one."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import puna_forked
from fuzz import resident_mib

from puna.checkpoint.adapter import base_of
from puna.checkpoint.registry import find_model, load_tokenizer, open_model
from puna.errors import PunaError
from puna.infer.llama import load
from puna.recipes import load as load_config

NAMES = {
    "climbs": "../secret", "climbs far": "../../../../../../etc/passwd", "absolute": "/etc/passwd", "home": "~/secret",
    "home of nobody": "~no-such-user/x", "NUL": "a\0b", "percent": "%2e%2e/secret", "Windows drive": "C:\\secret",
    "Windows climbs": "..\\secret", "300 characters": "a" * 300, "5,000 characters": "a/" * 2500, "an empty name": "",
    "a cache folder": "models--a--b", "a cache folder's name": "models--a--b/c", "a device": "/dev/null",
    "spaces": "  ", "a line break": "a\nb", "a dot": ".", "another encoding": "a\udc80b", "a URL": "https://example.org/x",
    "a file URL": "file:///etc/passwd", "control codes": "\x1b[2J", "a revision that climbs": "org/name@../../x",
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with something beside it that must not be reached by a registered name."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


def adapter_of(name: str) -> Path:
    """An adapter directory that says it belongs to `name`."""
    folder = Path("adapter")
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    return folder


ASKED: dict[str, Callable[[str], object]] = {
    "a model": open_model,
    "a model to load": lambda name: load(name, dtype="fp32", device="cpu"),
    "a place": find_model,
    "a tokenizer": load_tokenizer,
    "an adapter's base": lambda name: load(adapter_of(name), dtype="fp32", device="cpu"),
    "a base by itself": lambda name: find_model(base_of(adapter_of(name))),
    "a config": lambda name: load_config("sft", name or "-", {}),
    "a recipe": lambda name: load_config(name, None, {}),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("asked", ASKED)
def test_a_name_that_is_none_is_refused(asked: str, case: str) -> None:
    """Files name other files: an adapter its base, a config its model. None of it may end in a traceback."""
    if asked == "a place" and case == "a dot":
        pytest.skip("the folder one stands in")
    told: list[str] = []

    def refused() -> None:
        with pytest.raises(PunaError) as caught:
            ASKED[asked](NAMES[case])
        told.append(str(caught.value))

    started = time.process_time()
    assert resident_mib(refused) < 64
    assert time.process_time() - started < 1
    assert len(told[0]) < 12_000
    assert "root:" not in told[0]


def test_the_command_line_refuses_them_too(place: Path) -> None:
    """A crash on a path is a crash on whatever a script put into it."""
    cases = ("climbs", "home of nobody", "300 characters", "a cache folder's name", "an empty name")
    verbs = ["inspect", "validate", "runs show", "download", "run", "verify", "verify --against x", "merge x",
             "convert x --to gguf"]  # fmt: skip
    calls = [[*verb.split(), name] for verb in verbs for name in map(NAMES.get, cases)]
    calls += [[verb, name, "new", *to] for verb, *to in (("merge",), ("convert", "--to", "hf"))
              for name in map(NAMES.get, cases)]  # fmt: skip
    for done in puna_forked(calls, cwd=place):
        assert done.returncode in (2, 3, 4, 6), (done.args, done.stderr)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert "root:" not in done.stderr
