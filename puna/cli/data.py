"""`puna data`: look at what a model learns from."""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.mistakes import Verbs
from puna.cli.output import Json, print_json
from puna.errors import UsageError
from puna.log import harmless

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of token shards.")]


def register(app: typer.Typer) -> None:
    data = typer.Typer(
        help="Look at data: show shards or what an sft config trains, stats; pack encodes ahead; select drops.",
        no_args_is_help=True, cls=Verbs,
    )  # fmt: skip
    data.command("show")(show_data)
    data.command("pack")(pack_data)
    data.command("select")(select_data)
    data.command("stats")(stats)
    app.add_typer(data, name="data")


def show_data(
    source: Annotated[str, typer.Argument(metavar="FOLDER|CONFIG", help="Token shards, or an sft config.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the config's.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Of shards: train or valid.")] = "train",
    document: Annotated[
        list[int] | None, typer.Option("-n", help="Number of a document or conversation; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Ids to show of each.")] = 400,
    as_json: bool = Json,
) -> None:
    """What the model meets: documents of shards, or packed rows of an sft config with what is trained marked."""
    rows = _documents(Path(source), split, document or [0]) if Path(source).is_dir() else None
    if rows is None:
        rows = _conversations(source, words or [], document)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(f"# {row['name']}: {len(row['ids']):,} tokens, {sum(row['trained']):,} trained")
        more = f"\n... {len(row['ids']) - tokens:,} more; --tokens N" if len(row["ids"]) > tokens else ""
        print(_marked(row["pieces"][:tokens], row["trained"][:tokens]) + more)


def _documents(folder: Path, split: str, numbers: list[int]) -> list[dict[str, Any]]:
    from puna.data.shards import Shards

    shards, tokenizer = Shards(folder, split), _tokenizer(folder / "tokenizer")
    rows = []
    for number in numbers:
        row, ids = shards.document(number)
        rows.append({"name": row["name"], "ids": ids.tolist(), "trained": [False] + [True] * (len(ids) - 1)})
    return [{**row, "pieces": _pieces(tokenizer, row["ids"])} for row in rows]


def _conversations(config: str, words: list[str], numbers: list[int] | None) -> list[dict[str, Any]]:
    """The conversations of these numbers; without any, the first two packed rows."""
    from puna.data.packs import pack_rows
    from puna.tune.model import tuned_tokenizer
    from puna.tune.rows import encode

    settings = _settings(config, words)
    tokenizer, rows = encode(settings, tuned_tokenizer(settings), settings.data)
    if outside := [n for n in numbers or [] if not 0 <= n < len(rows)]:
        raise UsageError(f"no conversation {outside}", cause=f"there are {len(rows)}")
    shown = {f"conversation {n}": [n] for n in numbers or []}
    if not shown:
        packs = pack_rows(rows, settings.seq_len)[:2]
        shown = {f"row {i}, conversations {', '.join(map(str, members))}": members for i, members in enumerate(packs)}
    found = []
    for name, members in shown.items():
        ids, trained = ([x for n in members for x in rows[n][part]] for part in (0, 1))
        found.append({"name": name, "ids": ids, "trained": trained, "pieces": _pieces(tokenizer, ids)})
    return found


def _settings(config: str, words: list[str]) -> Any:
    """The values of a config that reads conversations."""
    from puna.config import parse_words
    from puna.recipes import config_file, load, recipe_of
    from puna.tune.model import check_tuned

    recipe = recipe_of(config_file(config))
    if recipe != "sft":
        raise UsageError(
            f"a config for {recipe} has no conversations", where=config, fix="a folder of shards, or an sft config"
        )
    settings: Any = load(recipe, config, parse_words(words))
    check_tuned(settings)
    return settings


def pack_data(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="An sft config.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the config's.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that encode; by default one a core.")] = None,
    as_json: bool = Json,
) -> None:
    """Encode and pack a config's conversations now, so that training starts at once. It uses what lies ready."""
    from puna.data.conversations import given
    from puna.tune.model import tuned_tokenizer
    from puna.tune.rows import encode, packed_as

    settings, found = _settings(config, words or []), {}
    tokenizer, apart = tuned_tokenizer(settings), given(settings.valid)
    for name, source in (("data", settings.data), ("valid", settings.valid), ("watch", settings.watch)):
        if name == "data" or given(source):
            share = settings.valid_fraction if name == "data" and not apart else 0.0
            found[name] = packed_as(settings, encode(settings, tokenizer, source, workers)[1], share)
    if as_json:
        print_json(found)
        return
    for name, told in found.items():
        print(f"{name}: {told['conversations']:,} conversations, {told['cut']:,} cut, {told['dropped']:,} dropped")
        print(f"  {told['rows']:,} rows, {told['ids']:,} ids, {told['trained']:.1%} of them trained")
        print(f"  {told['packs']:,} packs of {settings.seq_len:,} ids, {told['fill']:.1%} full")
        print(f"  {told['held_out']:,} rows are held out")
        for source, rows in told["sources"].items():
            print(f"  {rows:,} rows of {source}")
        print(f"  {told['folder'] or 'kept nowhere: so few are encoded anew at every start'}")


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each id; one that is no whole character shows as its replacement."""
    return [tokenizer.piece(i) for i in ids]


def _marked(pieces: list[str], trained: list[bool]) -> str:
    """Trained text green on a terminal, in double brackets elsewhere."""
    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    text, on = "", False
    for piece, flag in zip(pieces, trained, strict=True):
        text += (begin if flag else end) * (flag != on) + harmless(piece, "\ufffd")
        on = flag
    return text + end * on


def stats(folder: Folder, as_json: bool = Json) -> None:
    """Documents, tokens and compression of each split."""
    from puna.data.shards import read_index

    index = read_index(folder)
    splits = {
        name: {k: s[k] for k in ("documents", "tokens", "bytes")}
        | {"bytes_per_token": round(s["bytes"] / max(1, s["tokens"]), 3)}
        for name, s in index["splits"].items()
    }
    if as_json:
        print_json({**splits, "fingerprint": index["fingerprint"]})
        return
    for name, s in splits.items():
        print(f"{name}  {s['documents']:,} documents  {s['tokens']:,} tokens  {s['bytes_per_token']} bytes a token")
    print(f"{index['vocab_size']} ids as {index['dtype']}  {index['fingerprint']}")


def _tokenizer(name: str | Path) -> Any:
    from puna.checkpoint.registry import load_tokenizer

    return load_tokenizer(name)


def select_data(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG|FILE", help="An sft config, or conversations: a file, folder or pattern.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as data.select.near_duplicates=0.8.", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A .jsonl file for the conversations that are kept.")] = None,
    as_json: bool = Json,
) -> None:
    """What data.select keeps and drops, and why."""
    from puna.config import parse_words
    from puna.data.conversations import read_conversations
    from puna.recipes import CONFIGS, load

    given, is_config = parse_words(words or []), source in CONFIGS or source.endswith((".yaml", ".yml"))
    config: Any = load("sft", source if is_config else None, given if is_config else {"data.path": source, **given})
    report: dict[str, Any] = {}
    conversations = read_conversations(config.data, report)
    if output is None:
        for _ in conversations:
            pass
    else:
        _write_conversations(conversations, output)
    if as_json:
        print_json(report)
        return
    _print_selection(report)


def _write_conversations(conversations: Any, output: Path) -> None:
    from puna.files import atomic_file

    with atomic_file(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            row = {"text": conversation.text} if conversation.text is not None else {"messages": conversation.messages}
            row |= {"tools": conversation.tools} if conversation.tools else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _print_selection(report: dict[str, Any]) -> None:
    print(f"{report['kept']:,} of {report['read']:,} conversations kept")
    width = shutil.get_terminal_size().columns
    for rule, count in report["dropped"].items():
        print(f"\n{rule}: {count:,} dropped ({count / report['read']:.1%})")
        for example in report["examples"][rule]:
            why = example["why"].replace(f"{Path(example['where']).parent}/", "")
            line = f"  {Path(example['where']).name}  {harmless(why)}"
            print(line if len(line) <= width else f"{line[: width - 3]}...")
