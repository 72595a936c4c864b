"""`puna tokenizer`: look through a tokenizer."""

from typing import Annotated, Any

import typer

from puna.cli.mistakes import Verbs
from puna.cli.output import Json, print_fields, print_json
from puna.errors import UsageError

TokenizerFolder = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A tokenizer, model or run folder, a tokenizer.model, .bin or .gguf, or smollm2-135m."
    ),
]


def register(app: typer.Typer) -> None:
    tokenizer = typer.Typer(help="Look through a tokenizer: encode, decode, inspect.", no_args_is_help=True, cls=Verbs)
    tokenizer.command("encode")(encode)
    tokenizer.command("decode")(decode)
    tokenizer.command("inspect")(inspect_tokenizer)
    app.add_typer(tokenizer, name="tokenizer")


def encode(
    folder: TokenizerFolder,
    text: Annotated[str, typer.Argument(help="Text to encode.")],
    special: Annotated[bool, typer.Option("--special", help="Control strings become control ids.")] = False,
    as_json: bool = Json,
) -> None:
    """Ids of a text, each with its spelling."""
    tokenizer = _tokenizer(folder)
    ids = tokenizer.encode(text, special=special)
    if as_json:
        print_json(ids)
        return
    print(*ids)
    print("|".join(tokenizer.piece(i) for i in ids))


def decode(folder: TokenizerFolder, ids: Annotated[list[int], typer.Argument(help="Ids to decode.")]) -> None:
    """Text of ids."""
    tokenizer = _tokenizer(folder)
    if outside := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise UsageError(f"no such id: {outside}", cause=f"the tokenizer has ids 0 to {tokenizer.vocab_size - 1}")
    print(tokenizer.decode(ids, special=True))


def inspect_tokenizer(folder: TokenizerFolder, as_json: bool = Json) -> None:
    """Size, special ids, fingerprint."""
    tokenizer = _tokenizer(folder)
    named = {n: i for n, i in tokenizer.special_tokens.items() if "reserved_special_token" not in n}
    others = len(tokenizer.special_tokens) - len(named)
    more = f", and {others} that are reserved" if others else ""
    fields = {
        "ids": tokenizer.vocab_size,
        "begins with": f"{tokenizer.token(tokenizer.bos_id)} ({tokenizer.bos_id})" if tokenizer.adds_bos else "nothing",
        "stops at": ", ".join(f"{tokenizer.token(i)} ({i})" for i in tokenizer.stop_ids),
        "control ids": f"{len(tokenizer.special_tokens)}: " + ", ".join(f"{n} {i}" for n, i in named.items()) + more,
        "fingerprint": tokenizer.fingerprint,
    }
    print_fields(fields, as_json)


def _tokenizer(name: str) -> Any:
    from puna.checkpoint.registry import load_tokenizer

    return load_tokenizer(name)
