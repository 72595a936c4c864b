"""Conversations encoded once: found again by what decides on their ids, or encoded and kept.

FOLDER/KEY/            encoded rows (rows.py) with a manifest; KEY is a hash of all that decides on them
FOLDER/hashes/NAME     the hash of a data file's content, and what the file system said of the file at that time

The key has the content of the data, not its date, so no stale rows can be taken; reading all of it at every start would
cost a second a gigabyte. A file's hash is therefore remembered with its device, inode, size, mtime and ctime (all
nanoseconds). The kernel sets ctime at every write and nobody can set it back; a file younger than two seconds is not
remembered, because a second write within the same tick of the clock would not show.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from datetime import date
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from puna.data.conversations import ChatSource, files_of, read_conversations
from puna.data.dialogues import DIALOGUES
from puna.data.encode import Chunk, Encoding, tell
from puna.data.encoders import encode_in_order
from puna.data.quality.config import SelectConfig
from puna.data.quality.select import told
from puna.data.rows import Rows, RowWriter
from puna.errors import CheckpointError, DataError
from puna.files import atomic_folder, hash_file, make_folder, verify, write_json
from puna.log import Progress, clock, log

SMALL = 1_000_000
"""Ids that are encoded anew at every start: it takes seconds, and leaves nothing on the disk."""
VERIFIED = 100_000_000
"""Bytes of kept rows up to which their hashes are compared at every start; of more, sizes alone."""
_YOUNG = 2_000_000_000  # ns; FAT's clock ticks that slowly
_NOT_IDS = {"path": True, "passes": True, "sources": {"__all__": {"path", "passes"}}}
"""Fields of a source that change no ids: a moved file is the same, and `passes` only says how often rows are read."""


def find_rows(source: ChatSource, encoding: Encoding, folder: Path, workers: int | None = None) -> Rows:
    """The rows of the source: kept ones, or encoded now; more than SMALL ids are kept in `folder`.

    Of two processes that want the same rows one encodes and the other waits for it. They are never whole in memory.

    Raises:
        DataError: a conversation that cannot be read or encoded, or data that changes meanwhile.
    """
    if (key := _key(source, encoding, folder, read=False)) and (kept := _kept(folder / key)):
        return kept
    before = _signatures(source)
    started = time.perf_counter()
    selection: dict[str, Any] = {}  # whole once all are read
    report = selection if source.select != SelectConfig() else None
    chunks = encode_in_order(read_conversations(source, report), encoding, workers)
    with contextlib.closing(chunks), Progress("conversations", None) as progress:
        counted = _counted(chunks, progress)
        first = _first(counted)
        following = next(counted, None)
        if following is None:
            rows = Rows.joining(first)
            rows.selection = selection
            tell(_fates(rows), len(rows), encoding.seq_len)
            return rows
        key = _key(source, encoding, folder, read=True)
        with _alone(folder, key):
            if kept := _kept(folder / key):
                return kept
            log.info("encoding conversations once, into %s", folder / key)
            with atomic_folder(folder / key) as temporary:
                writer = RowWriter(temporary, encoding.chat.tokenizer.vocab_size)
                for chunk in chain(first, [following], counted):
                    writer.add(chunk)
                made_from = {"data": source.model_dump(mode="json"), "template": encoding.chat.source}
                writer.close({**made_from, "selection": selection})
                if _signatures(source) != before:
                    raise DataError("changed while it was read", where=source.path or "", fix="run it again")
    rows = Rows.open(folder / key)
    tell(_fates(rows), len(rows), encoding.seq_len)
    log.info("encoded in %s: %s rows", clock(time.perf_counter() - started), f"{len(rows):,}")
    return rows


def data_files(source: ChatSource) -> list[Path]:
    """Every file that the source's conversations are read from."""
    files = files_of(source)
    for package in (package for part in (source, *source.sources.values()) for package in part.packages):
        files += sorted((DIALOGUES[package].require() / "data" / "english").glob("*.yml"))
    return files


def _first(chunks: Iterator[Chunk]) -> list[Chunk]:
    """Chunks of SMALL ids together, or all there are."""
    first: list[Chunk] = []
    ids = 0
    while ids < SMALL and (chunk := next(chunks, None)):
        first.append(chunk)
        ids += len(chunk.ids)
    return first


def _counted(chunks: Iterator[Chunk], progress: Progress) -> Iterator[Chunk]:
    conversations = ids = 0
    for chunk in chunks:
        conversations, ids = conversations + sum(chunk.fates.values()), ids + len(chunk.ids)
        progress.update(conversations, f"{ids / 1e6:,.1f} M ids")
        yield chunk


def _fates(rows: Rows) -> dict[str, int]:
    return {name: count for name, count in rows.counts.items() if name != "trained"}


def _kept(folder: Path) -> Rows | None:
    """The rows kept in `folder`; damaged ones are removed."""
    if not folder.exists():
        return None
    try:
        rows = Rows.open(folder)
        if sum(file.stat().st_size for file in folder.iterdir()) <= VERIFIED:
            verify(folder)
    except (DataError, CheckpointError) as error:
        log.warning("encoding again: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    log.info("%s encoded rows found in %s", f"{len(rows):,}", folder)
    if rows.selection:
        log.info("%s", told(rows.selection))
    return rows


def _key(source: ChatSource, encoding: Encoding, folder: Path, read: bool) -> str:
    """A hash of all that decides on the ids, or "" if a file would have to be read for it and `read` is not set."""
    files = [(file.name, _content(file, folder, read)) for file in data_files(source)]
    if not all(content for _, content in files):
        return ""
    chat = encoding.chat
    variables = {name: value for name, value in chat.variables.items() if not callable(value)}
    today = "" if "strftime_now" in chat.variables else date.today().isoformat()  # what a template may ask for
    parts: list[Any] = [
        _code(), _versions(), source.model_dump(mode="json", exclude=_NOT_IDS), files,
        sorted((name, hashlib.sha256(raw).hexdigest()) for name, raw in chat.tokenizer.files.items()),
        chat.source, variables, today, encoding.seq_len, encoding.train, encoding.too_long,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A hash of the source files that decide on ids: reading data, and everything of tokenizers and templates."""
    package = Path(__file__).parents[1]
    files = sorted([*(package / "data").rglob("*.py"), *(package / "tokenizer").rglob("*.py")])
    return hashlib.sha256("".join(hash_file(file) for file in files).encode()).hexdigest()


@cache
def _versions() -> list[str]:
    """Of the libraries that make ids, and of the one that makes problems."""
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return [found.get(name, "") for name in ("tokenizers", "jinja2", "reasoning-gym")]


def _signatures(source: ChatSource) -> list[list[int]]:
    return [_signature(file) for file in data_files(source)]


def _signature(file: Path) -> list[int]:
    try:
        known = file.stat()
    except OSError:
        return []  # told by who reads it
    return [known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns]


def _content(file: Path, folder: Path, read: bool) -> str:
    """The hash of a file's content: the remembered one, or if `read` a new one, or ""."""
    note = folder / "hashes" / hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    signature = _signature(file)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_bytes())
        if signature and known["signature"] == signature:
            return str(known["hash"])
    if not read:
        return ""
    content = hash_file(file)
    if signature == _signature(file) and signature[-1] < time.time_ns() - _YOUNG:
        make_folder(note.parent)
        write_json(note, {"file": str(file), "signature": signature, "hash": content})
    return content


@contextlib.contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """Wait until no other process is writing `key`; the lock is the kernel's and goes with its process."""
    import fcntl

    make_folder(folder)
    with (folder / f".{key}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.info("waiting: another process is encoding the same conversations")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
