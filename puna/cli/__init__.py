"""The command line. Verbs import what they need when they run: help and listings never load torch."""

import signal
import sys
import traceback

import typer

from puna import __version__
from puna.cli import (
    chat,
    completion,
    configs,
    convert,
    data,
    doctor,
    download,
    evaluate,
    inspect,
    merge,
    migrate,
    models,
    plan,
    quantize,
    quickstart,
    runs,
    tokenizer,
    verify,
)
from puna.cli.mistakes import Verbs, told
from puna.log import setup_logging

app = typer.Typer(
    name="puna",
    help="The whole life of a Llama: raw text, tokenizer, shards, pretraining, fine-tuning, chat, evaluation.",
    epilog="Start with `puna quickstart`, then `puna ls`.",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,  # `puna completion` does it
    rich_markup_mode=None,  # boxes cost 100 ms of imports in every help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
configs.register(app)
plan.register(app)
models.register(app)
inspect.register(app)
convert.register(app)
migrate.register(app)
quantize.register(app)
merge.register(app)
chat.register(app)
evaluate.register(app)
download.register(app)
tokenizer.register(app)
data.register(app)
runs.register(app)
doctor.register(app)
quickstart.register(app)
verify.register(app)
completion.register(app)
_GLOBAL = {"-v", "--verbose", "-q", "--quiet"}


def _version(asked: bool) -> None:
    if asked:
        print(f"puna {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: bool = typer.Option(False, "-v", "--verbose", help="More detail, and tracebacks of errors."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Warnings only."),
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Print the version."),
) -> None:
    setup_logging(1 if verbose else -1 if quiet else 0)


def main() -> None:
    """Run the command line; every expected error becomes a few lines and its exit code."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)  # what follows `--` is text, and so is a prompt
    front = [w for i, w in enumerate(words[:end]) if w in _GLOBAL and words[i - 1 : i] not in (["-p"], ["--prompt"])]
    verbose = not {"-v", "--verbose"}.isdisjoint(front)
    # -v and -q mean the same before and after the verb
    asked = [*front, *(w for w in words[:end] if w not in front), *words[end:]]
    try:
        sys.exit(_stopped(app(asked, prog_name="puna", standalone_mode=False)))
    except Exception as error:
        problem = told(error)
        if verbose and problem:
            traceback.print_exc()
        else:
            print(f"puna: {problem}" if problem else error, file=sys.stderr)
        sys.exit(problem.exit_code if problem else 2)


def _stopped(code: int | None) -> int | None:
    if code == 128 + signal.SIGINT:
        print("puna: stopped by Ctrl-C", file=sys.stderr)
    return code
