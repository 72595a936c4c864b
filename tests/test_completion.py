"""Completion by the tab key, through the shells that are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_line import environment, puna

from puna.checkpoint.registry import REGISTERED
from puna.cli import app
from puna.cli.completion import MODELS, SCRIPTS, candidates
from puna.cli.config_keys import config_keys
from puna.config import Config
from puna.model.presets import PRESETS
from puna.recipes import CONFIGS, RECIPES, config_type
from puna.tokenizer.chat.format import BUNDLED

# command line: what has to be among the answers, and what must not be
LINES: dict[str, tuple[set[str], set[str]]] = {
    "puna ": ({"run", "ls", "quickstart", "data", "completion"}, {"--help"}),
    "puna ru": ({"run", "runs"}, {"ls"}),
    "puna data ": ({"show", "select", "stats"}, {"run"}),
    "puna run ": (set(RECIPES), {"debug"}),
    "puna -v run pret": ({"pretrain"}, {"tokenizer"}),
    "puna run pretrain --c": ({"--config"}, set()),
    "puna run pretrain --config ": (set(CONFIGS), {"pretrain"}),
    "puna run pretrain -c quick": ({"quickstart/pretrain"}, {"debug"}),
    "puna run pretrain ": ({"steps=", "model=", "model.", "train."}, {"train=", "recipe=", "train.keep="}),
    "puna run pretrain --config debug st": ({"steps="}, {"seed="}),
    "puna run pretrain steps=3 train.": ({"train.keep=", "train.optimizer."}, {"train.optimizer.lr="}),
    "puna run pretrain train.optimizer.l": ({"train.optimizer.lr="}, {"train.optimizer.kind="}),
    "puna run pretrain train.optimizer.kind=": ({"train.optimizer.kind=adamw"}, {"adamw"}),
    "puna run pretrain model=llama3.2": ({"model=llama3.2-1b"}, {"model=llama2-7b"}),
    "puna run sft model=": ({"model=smollm2-135m"}, {"model=llama3.2-1b"}),
    "puna run sft lora": ({"lora=", "lora."}, set()),
    "puna validate debug se": ({"seed=", "seq_len=", "seconds="}, set()),
    "puna cat ": ({*CONFIGS, *RECIPES}, set()),
    "puna chat s": (set(MODELS), set()),
    "puna generate x -p a --max": ({"--max-tokens"}, {"--seed"}),
    "puna generate x --dtype ": ({"bf16", "fp32"}, {"--seed"}),
    "puna doctor s": (set(MODELS), set()),
    "puna doctor smollm2-135m --data x --template ": ({"llama3", "chatml"}, set()),
    "puna doctor --d": ({"--data", "--dtype", "--device"}, {"--rows"}),
    "puna run sft --np": ({"--nproc"}, {"--config"}),
    "puna runs ": ({"ls", "show", "compare", "plot"}, {"run"}),
    "puna runs ls --sort ": ({"valid_loss"}, {"--json"}),
    "puna verify runs/x --": ({"--json"}, set()),
    "puna quickstart pre": ({"pretrain."}, {"data."}),
    "puna quickstart pretrain.st": ({"pretrain.steps="}, {"pretrain.seed=", "steps="}),
    "puna quickstart --acts 2 lora.lora.r": ({"lora.lora.rank="}, {"lora.rehearse="}),
    "puna quickstart tokenizer.st": (set(), {"tokenizer.steps="}),
    "puna ls ": ({"recipes", "models"}, set()),
}


def test_what_fits() -> None:
    """A verb, a key or a name that the tab key does not know is typed wrong instead."""
    command = typer.main.get_command(app)
    answers = {line: set(candidates(command, line)) for line in LINES}
    assert {line: (want - answers[line], answers[line] & no) for line, (want, no) in LINES.items()} == {
        line: (set(), set()) for line in LINES
    }
    assert candidates(command, "puna chat runs/") == candidates(command, 'puna generate x -p "a ') == []


def every_key(kind: type[Config]) -> set[str]:
    schema = kind.model_json_schema()
    found = set()

    def walk(node: dict, prefix: str) -> None:
        for name, inner in node.get("properties", {}).items():
            found.add(prefix + name)
            for choice in [inner, *inner.get("anyOf", [])]:
                if "$ref" in choice:
                    walk(schema["$defs"][choice["$ref"].rpartition("/")[2]], f"{prefix}{name}.")

    walk(schema, "")
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_read_from_the_sources_are_the_config_s(recipe: str) -> None:
    """The keys are read without importing the recipe: an annotation written in another way would lose some."""
    kind = config_type(recipe)
    assert set(config_keys(recipe)) == every_key(kind)
    assert config_keys(recipe)["dtype"] == ("auto", "fp32", "bf16", "fp64")


def test_models_are_the_registry_s() -> None:
    """A registered model that is not completed: the table stands apart from the registry, which loads torch."""
    assert set(MODELS) == set(REGISTERED)
    assert not set(MODELS) & set(PRESETS)
    command = typer.main.get_command(app)
    templates = candidates(command, "puna doctor x --template ")
    assert set(templates) == set(BUNDLED)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a `puna` on it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "puna").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m puna "$@"\n')
    (folder / "puna").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def shell(name: str, script: str, path: str, cwd: Path) -> str:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed: its completion is not tested")
    variables = {**environment(), "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([program, "-c", script], capture_output=True, text=True, cwd=cwd, env=variables, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


BASH = r"""
eval "$(puna completion bash)"
complete -p puna
for COMP_LINE in "puna run pre" "puna run pretrain model=cria-15" "puna run pretrain tra" "puna cat no-such"; do
    COMP_POINT=${#COMP_LINE}
    _puna puna
    echo "$COMP_LINE -> ${COMPREPLY[*]}"
done
"""


def test_bash(path: str, tmp_path: Path) -> None:
    """bash cuts words at `=`: a whole `model=cria-15m` would be typed behind the `model=` that stands there."""
    assert shell("bash", BASH, path, tmp_path).splitlines() == [
        "complete -o default -F _puna puna",
        "puna run pre -> pretrain",
        "puna run pretrain model=cria-15 -> cria-15m",
        "puna run pretrain tra -> train.",
        "puna cat no-such -> ",
    ]


def test_zsh(path: str, tmp_path: Path) -> None:
    """A script that zsh does not take."""
    script = 'autoload -U compinit; compinit -u; eval "$(puna completion zsh)"; print $_comps[puna]'
    assert shell("zsh", script, path, tmp_path) == "_puna\n"


def test_fish(path: str, tmp_path: Path) -> None:
    """A script that fish does not take, or that answers nothing."""
    assert "pretrain" in shell("fish", 'puna completion fish | source; complete -C "puna run pre"', path, tmp_path)


def test_completion_loads_nothing_heavy(tmp_path: Path) -> None:
    """A key that takes two seconds is pressed once."""
    done = puna("completion", "bash", "--", "puna run sft lora.ta", cwd=tmp_path, flags=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.stdout == "lora.targets=\n"
    assert {"torch", "numpy", "pyarrow", "tokenizers", "transformers", "rich"} & imported == set()


def test_unknown_shell(tmp_path: Path) -> None:
    """A typing error must not be evaluated by the shell as a script."""
    done = puna("completion", "bsh", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no completion for `bsh`; did you mean `bash`?" in done.stderr
    assert set(SCRIPTS) == {"bash", "zsh", "fish"}


def test_run_folders_fit_where_a_run_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of runs are long and differ in their ends: typed by hand they are mistyped."""
    command = typer.main.get_command(app)
    for name in ("runs/one", "runs/two", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "resolved.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert candidates(command, "puna runs show ") == ["other", "runs/one", "runs/two"]
    assert candidates(command, "puna runs compare runs/one runs/t") == ["runs/two"]
    assert candidates(command, f"puna runs plot {tmp_path}/runs/o") == [f"{tmp_path}/runs/one"]
