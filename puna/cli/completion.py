"""`puna completion`: what may stand at the end of a command line, for bash, zsh and fish."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.errors import UsageError

MODELS = ("smollm2-135m",)
"""Registered models; a test compares them with the registry, which would load torch."""
_DTYPES = ("auto", "fp32", "bf16", "fp64")
_KNOWN = {
    "MODEL": MODELS,
    "SHELL": ("bash", "zsh", "fish"),
    "what": ("recipes", "configs", "models", "tasks", "runs"),
    "--dtype": _DTYPES,
    "--device": ("auto", "cpu", "cuda", "mps"),
    "--save-dtype": ("bf16", "fp32", "fp16"),
    "--template": ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.2-pythonic", "llama3.3", "chatml"),
    "--split": ("train", "valid"),
    "--sort": ("name", "state", "model", "steps", "loss", "valid_loss", "seconds"),
}  # fmt: skip
SCRIPTS = {
    "bash": r"""_puna() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT}
    COMPREPLY=( $("$1" completion bash -- "$line" 2>/dev/null) )
    case ${COMPREPLY[0]} in *= | *.) compopt -o nospace 2>/dev/null ;; esac
    # bash takes what follows `=` for a word of its own
    if [[ $COMP_WORDBREAKS == *=* && ${line##* } == *=* ]]; then COMPREPLY=( "${COMPREPLY[@]#*=}" ); fi
}
complete -o default -F _puna puna""",
    "zsh": r"""#compdef puna
_puna() {
    local -a found
    found=(${(f)"$($words[1] completion zsh -- "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then
        compadd -S '' -- ${(M)found:#*[=.]}
        compadd -- ${found:#*[=.]}
    else
        compset -P '*='
        _files
    fi
}
compdef _puna puna""",
    "fish": r"""function __puna
    set -l found (puna completion fish -- (commandline -cp | string collect) 2>/dev/null)
    if count $found >/dev/null
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c puna -f -a '(__puna)'""",
}


def register(app: typer.Typer) -> None:
    app.command("completion")(completion)


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
    line: Annotated[str | None, typer.Argument(help="A command line: print what may stand at its end.")] = None,
) -> None:
    """Complete commands by the tab key: eval "$(puna completion bash)", or zsh; fish: puna completion fish | source"""
    from puna.config import nearest

    if shell not in SCRIPTS:
        raise UsageError(f"no completion for `{shell}`" + nearest(shell, list(SCRIPTS)), fix="bash, zsh or fish")
    found = [SCRIPTS[shell]] if line is None else candidates(context.find_root().command, line)
    if found:
        print(*found, sep="\n")


def candidates(command: Any, line: str) -> list[str]:
    """The words that fit at the end of `line`; none where the shell knows better, as for files."""
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote: what stands in it is text
        return []
    current = words.pop() if words and not line[-1:].isspace() else ""
    given: list[str] = []
    awaits = None
    for word in words[1:]:
        if awaits or word.startswith("-"):
            named = next((p for p in command.params if word in p.opts), None)
            awaits = named if not awaits and named and not named.is_flag else None
        elif word in getattr(command, "commands", {}):
            command = command.commands[word]
        else:
            given.append(word)
    options = [o for p in command.params for o in p.opts if o.startswith("--") and not awaits]
    words = [*options, "--help"] if current.startswith("-") else _fitting(command, awaits, given, current)
    return [word for word in words if word.startswith(current)]


def _fitting(command: Any, awaits: Any, given: Sequence[str], current: str) -> Sequence[str]:
    from puna.recipes import CONFIGS, RECIPES, config_file, recipe_of

    if awaits:
        return list(CONFIGS) if "--config" in awaits.opts else _KNOWN.get(awaits.opts[0], ())
    if commands := getattr(command, "commands", None):
        return list(commands)
    places = [p for p in command.params if p.param_type_name == "argument"]
    place = next((p for i, p in enumerate(places) if i == len(given) or p.nargs == -1), None)
    kind = (place.metavar or place.name) if place else ""
    if kind == "[STEP.KEY=VALUE]...":
        return _step_words(current)
    if kind == "RECIPE":
        return list(RECIPES)
    if kind == "CONFIG":
        return [*CONFIGS, *RECIPES]
    if kind.startswith("RUN"):
        return _runs(current)
    if kind != "[KEY=VALUE]...":
        return _KNOWN.get(kind.strip("[]"), ())  # [MODEL]: one that may be left out
    return _key_words(given[0] if given[0] in RECIPES else recipe_of(config_file(given[0])), current)


def _runs(current: str) -> list[str]:
    """Run folders here and two levels below, or below the folder that is being typed."""
    from puna.runs import find_runs

    typed = Path(current).parent if "/" in current else Path(".")
    return [str(run.folder) for run in find_runs(typed.expanduser(), depth=2) if str(run.folder) != "."]


def _step_words(current: str) -> list[str]:
    """`step.`, and behind it what fits the step's recipe."""
    from puna.recipes import CONFIGS, config_file, recipe_of

    step, dot, rest = current.partition(".")
    steps = [name.removeprefix("quickstart/") for name in CONFIGS if name.startswith("quickstart/")]
    if not dot:
        return [f"{name}." for name in steps]
    if step not in steps:
        return []
    return [f"{step}.{word}" for word in _key_words(recipe_of(config_file(f"quickstart/{step}")), rest)]


def _key_words(recipe: str, current: str) -> list[str]:
    """`key=` and `section.` on the level that is being typed; `key=value` where the values are few."""
    from puna.cli.config_keys import config_keys
    from puna.model.presets import PRESETS

    keys = config_keys(recipe)
    del keys["recipe"]
    if "model" in keys:
        keys["model"] = tuple(PRESETS) if "model.preset" in keys else MODELS
    key, sign, _ = current.partition("=")
    if sign:
        return [f"{key}={value}" for value in keys.get(key, ())]
    level = key.rpartition(".")[0]
    here = [name for name in keys if name.rpartition(".")[0] == level]
    sections = {name for name in here if any(other.startswith(name + ".") for other in keys)}
    return [f"{name}=" for name in here if name not in sections or keys[name]] + [
        f"{name}." for name in sorted(sections)
    ]
