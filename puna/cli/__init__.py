"""The command line. Verbs import what they need when they run: help and listings never load torch."""

import sys
import traceback

import typer

from puna import __version__
from puna.cli import chat, configs, doctor, evaluate, look, models, quickstart
from puna.errors import PunaError
from puna.files import DISK_FULL
from puna.log import setup_logging

app = typer.Typer(
    name="puna",
    help="The whole life of a Llama: raw text, tokenizer, shards, pretraining, fine-tuning, chat, evaluation.",
    epilog="Start with `puna quickstart`, then `puna ls`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
configs.register(app)
models.register(app)
chat.register(app)
evaluate.register(app)
look.register(app)
doctor.register(app)
quickstart.register(app)
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
    try:
        # -v and -q mean the same before and after the verb
        app([*front, *(w for w in words[:end] if w not in front), *words[end:]])
    except PunaError as error:
        if verbose:
            traceback.print_exc()
            sys.exit(error.exit_code)
        _fail(f"puna: {error}", error.exit_code)
    except MemoryError:
        _fail("puna: out of memory\n  try: a smaller batch_size, seq_len or model", 6)
    except OSError as error:
        if verbose:
            raise
        full = "\n  try: free some space and run it again" if error.errno in DISK_FULL else ""
        _fail(f"puna: {error.strerror or error}: {error.filename or ''}{full}", 6)
    except Exception as error:
        if verbose:
            raise
        what = f"puna: unexpected {type(error).__name__}: {error}"
        _fail(what + "\n  likely cause: a bug in puna\n  try: the same command with -v, and report it", 1)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
