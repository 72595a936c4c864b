"""The command line as a user meets it: in a process of its own, by its exit code, stdout and stderr."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import typer
from command_line import puna, puna_all

import puna as package
from puna.cli import app
from puna.config import RecipeConfig, load_config
from puna.model.config import count_parameters
from puna.model.presets import PRESETS
from puna.recipes import CONFIGS, RECIPES, config_file, config_type, load, recipe_of

ROOT: Any = typer.main.get_command(app)


def verbs(command: Any = ROOT, before: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """All commands by their words, groups and the root among them."""
    found = {before: command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= verbs(inner, (*before, name))
    return found


HELP = """
import contextlib, io, json, sys
from puna.cli import main
printed = []
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = [*words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    printed.append(out.getvalue())
print(json.dumps({"printed": printed, "modules": list(sys.modules)}))
"""
ASK_MODEL = [("chat",), ("doctor",), ("eval",), ("generate",), ("convert",)]
HEAVY = {"torch", "numpy", "pyarrow", "tokenizers", "transformers"}
SLOW = {"ruamel", "rich", "puna.config", "asyncio"}  # 20 to 100 ms each; of `puna --help` pydantic too


def test_help_of_every_verb() -> None:
    """A verb whose help fails, or makes the user wait for what help does not need."""
    words = json.dumps(list(verbs()))
    done = subprocess.run([sys.executable, "-c", HELP, words], capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert done.stderr == ""
    assert [words for words, text in zip(verbs(), answer["printed"], strict=True) if "Usage" not in text] == []
    assert (HEAVY | SLOW) & set(answer["modules"]) == set()


def test_listings_do_without_torch(tmp_path: Path) -> None:
    """Two seconds of import before a line of output."""
    calls = [
        ("--help",),
        ("ls",),
        ("ls", "models", "--json"),
        ("cat", "debug"),
        ("cp", "debug", "mine"),
        ("runs", "ls"),
    ]
    for words, done in zip(calls, puna_all(calls, tmp_path, ["-X", "importtime"]), strict=True):
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert done.returncode == 0, (words, done.stderr[-500:])
        assert "puna.cli.configs" in imported, words
        assert not HEAVY & imported, words
        assert words != ("--help",) or not (SLOW | {"pydantic"}) & imported
        assert "\x1b" not in done.stdout, words


def test_every_verb_and_value_is_explained() -> None:
    """A verb or an option without help is found by nobody."""
    for words, command in verbs().items():
        assert command.help, words
        for parameter in command.params:
            assert getattr(parameter, "help", None), (words, parameter.name)


def test_every_verb_says_the_same_of_a_model() -> None:
    """Three of the seven kinds of model were named: who has a Meta folder, an adapter or a .bin asks elsewhere."""
    told = {command.params[0].help for words, command in verbs().items() if words[-1:] in ASK_MODEL}
    (text,) = told
    for kind in ("Meta", "run", "adapter", ".gguf", ".bin", "org/name", "smollm2-135m"):
        assert kind in text


def test_the_package_shows_what_it_has() -> None:
    """`dir(puna)` without load and run: completion and help have nothing to offer."""
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)


def test_listings_as_json(tmp_path: Path) -> None:
    """`--json` is the contract with programs: objects with a name and a summary, and nothing else on stdout."""
    kinds = ["recipes", "configs", "models"]
    answers = puna_all([("ls", kind, "--json") for kind in [*kinds, "all", "runs"]], tmp_path)
    rows = [json.loads(done.stdout) for done in answers]
    assert [done.stderr for done in answers] == [""] * 5
    for row in [row for listing in rows[:3] for row in listing]:
        assert isinstance(row["name"], str), row
        assert isinstance(row["summary"], str), row
        assert row["name"], row
        assert row["summary"], row
    assert [row["name"] for row in rows[0]] == list(RECIPES)
    assert [row["name"] for row in rows[1]] == list(CONFIGS)
    assert {"llama2-7b", "llama3.2-1b"} <= {row["name"] for row in rows[2]}
    assert [(row["kind"], row["name"]) for row in rows[3]] == [
        (kind, row["name"]) for kind, listing in zip(kinds, rows, strict=False) for row in listing
    ]
    assert rows[4] == []


def test_table_of_recipes() -> None:
    """A recipe not listed, or listed without Config and main, is one that nobody can run."""
    files = {Path(file.name).stem for file in (resources.files("puna") / "recipes").iterdir() if file.is_file()}
    assert files - {"__init__"} == set(RECIPES)
    for name in RECIPES:
        config = config_type(name)
        module = sys.modules[config.__module__]
        assert issubclass(config, RecipeConfig), name
        assert config.__doc__, name
        assert callable(module.main), name
        assert {"output", "seed", "dtype"} <= set(config.model_fields), name
        assert load(name).model_dump()["recipe"] == name


def test_table_of_configs() -> None:
    """A shipped file that is not listed, a listed one that is not shipped, or one that no longer validates."""
    root = Path(str(resources.files("puna"))) / "configs"
    assert {str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.y*ml")} == set(CONFIGS)
    for name in CONFIGS:
        file = config_file(name)
        assert load(recipe_of(file), name) == load_config(config_type(recipe_of(file)), file)
    newborn: Any = load("pretrain", "quickstart/pretrain")
    millions = count_parameters(PRESETS[newborn.model.preset]) / 1e6
    assert f"{millions:.0f}M-parameter" in CONFIGS["quickstart/pretrain"]


def test_verbose_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    """-v adds detail, before the verb or after it; a script that tests the exit code must not notice."""
    for done in puna_all([("-v", "cat", "debgu"), ("cat", "debgu", "--verbose")], tmp_path):
        assert "Traceback" in done.stderr
        assert "did you mean `debug`?" in done.stderr
        assert done.returncode == 2


def test_words_after_two_dashes_are_no_options(tmp_path: Path) -> None:
    """A text to encode or a file that is called -q."""
    done = puna("cp", "debug", "--", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "-q.yaml\n"), done.stderr


def test_reserved_control_ids_are_counted(assets: Path) -> None:
    """Of 256 ids eight were named and no word said that there are more."""
    done = puna("tokenizer", "inspect", assets / "tokenizers/llama3/tokenizer.model")
    assert "and 248 that are reserved" in " ".join(done.stdout.split())


def test_cp(tmp_path: Path) -> None:
    """Copies keep the comments, go where one says, and never over a file that is there."""
    shipped = config_file("debug").read_text()
    (tmp_path / "mine.yaml").write_text("precious")
    (tmp_path / "folder").mkdir()
    calls = [("cp", "debug", to) for to in ("mine", "mine.yaml", "new/own.yml", "folder")]
    taken, taken_too, new, folder = puna_all(calls, tmp_path)
    assert (taken.returncode, taken_too.returncode) == (2, 2)
    assert "mine.yaml: exists already" in taken.stderr
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    assert (new.returncode, new.stdout) == (0, "new/own.yml\n")
    assert (tmp_path / "new/own.yml").read_text() == shipped
    assert (folder.returncode, folder.stdout) == (0, "folder/debug.yaml\n")


def test_results_and_logs_go_apart(tmp_path: Path) -> None:
    """A log line on stdout breaks every pipe; with -q there are none."""
    (tmp_path / "a.txt").write_text("In the high puna the llamas graze.\n" * 50)
    words = ["run", "tokenizer", "sources.path=a.txt", "sources.valid_fraction=0", "vocab_size=530"]
    loud, quiet = puna_all([[*words, "output=loud"], [*words, "output=quiet", "-q"]], tmp_path)
    assert (loud.returncode, quiet.returncode) == (0, 0), loud.stderr + quiet.stderr
    assert (loud.stdout, quiet.stdout, quiet.stderr) == ("", "", "")
    assert "tokenizer: 530 ids in loud" in loud.stderr
    assert "\x1b" not in loud.stderr
    ids = puna("tokenizer", "encode", "loud", "the llamas", "--json", cwd=tmp_path)
    assert ids.stderr == ""
    assert all(isinstance(i, int) for i in json.loads(ids.stdout))
