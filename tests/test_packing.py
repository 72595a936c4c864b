"""Rows encoded once: on any number of processes, found again, never stale, packed full, read in passes."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from test_lora import gradients
from test_lora import rows as encoded_rows

from puna.data import encoders, packs, row_cache
from puna.data.conversations import ChatSource, Conversation, MixedSource
from puna.data.encode import Encoding, encode_conversation, encode_conversations
from puna.data.encoders import encode_in_order
from puna.data.packing import PackedLoader
from puna.data.packs import best_fit, pack, pack_rows
from puna.data.row_cache import find_rows
from puna.data.rows import Rows, split_rows
from puna.errors import DataError, ResourceError
from puna.ops.cross_entropy import IGNORE
from puna.tokenizer.chat.format import ChatFormat, Encoded
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def chat(tokenizer_folder: Path) -> ChatFormat:
    return ChatFormat(Tokenizer(tokenizer_folder), "llama3", date_string="26 Jul 2024")


@pytest.fixture
def encoding(chat: ChatFormat) -> Encoding:
    return Encoding(chat, 96)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Sixty conversations, written long enough ago to be remembered."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty conversations are many: they go to processes, and to the disk."""
    monkeypatch.setattr(encoders, "CHUNK", 4)
    monkeypatch.setattr(encoders, "ALONE", 1)
    monkeypatch.setattr(row_cache, "SMALL", 1)
    monkeypatch.setattr(row_cache, "_YOUNG", 0)


UNGUARDED = """
import sys
from pathlib import Path

from puna.data import encoders
from puna.data.conversations import Conversation
from puna.data.encode import Encoding
from puna.tokenizer.chat.format import ChatFormat
from puna.tokenizer.tokenizer import Tokenizer

encoders.CHUNK, encoders.ALONE = 4, 1
encoding = Encoding(ChatFormat(Tokenizer(Path(sys.argv[1])), "llama3"), 64)
said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
made = encoders.encode_in_order([Conversation("x", said)] * 20, encoding, 2)
print(sum(len(chunk.lengths) for chunk in made), "torch" in sys.modules)
"""
FIND = """
import os
import sys
import time
from pathlib import Path

from puna.data import encoders, row_cache
from puna.data.conversations import ChatSource
from puna.data.encode import Encoding
from puna.tokenizer.chat.format import ChatFormat
from puna.tokenizer.tokenizer import Tokenizer

written = 0
encoders.CHUNK, encoders.ALONE, row_cache.SMALL = 4, 1, 1
add = row_cache.RowWriter.add


def watched(self, chunk):
    global written
    add(self, chunk)
    written = self.tally.rows
    {then}


row_cache.RowWriter.add = watched
chat = ChatFormat(Tokenizer(Path(sys.argv[1])), "llama3", date_string="26 Jul 2024")
rows = row_cache.find_rows(ChatSource(path=sys.argv[2]), Encoding(chat, 96), Path(sys.argv[3]), 1)
print(f"{len(rows)} rows, {written} written")
"""
KILLED = FIND.replace("{then}", "os.kill(os.getpid(), 9) if written > 20 else None")
SLOW = FIND.replace("{then}", "time.sleep(0.1)")


def row(i: int) -> dict[str, str]:
    return {"prompt": f"How many llamas are {i} and {i}?" + " Count." * (i % 7), "completion": f"{2 * i} llamas."}


def conversations(count: int = 60) -> Iterator[Conversation]:
    for i in range(count):
        said = [{"role": "user", "content": row(i)["prompt"]}, {"role": "assistant", "content": row(i)["completion"]}]
        yield Conversation(f"rows:{i}", said, source=f"part {i % 3}")


@settings(deadline=None)
@drawn(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_fast_packing_equals_the_oracle(case: tuple[int, list[int]]) -> None:
    """Packs that differ from the slow ones are another order of training, and may lose a row."""
    seq_len, lengths = case
    members, bounds = best_fit(np.array(lengths, dtype=np.int32), seq_len)
    assert [members[a:b].tolist() for a, b in pairwise(bounds)] == pack(lengths, seq_len)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_change_nothing(workers: int, encoding: Encoding, large: None) -> None:
    """Rows in the order in which processes happen to finish are another order of training on every machine."""
    chunks = list(encode_in_order(conversations(), encoding, workers))
    rows = Rows.joining(chunks)
    assert len(chunks) == 15
    assert list(rows) == encode_conversations(conversations(), encoding.chat, 96, "all")
    assert [rows.names[n] for n in rows.entries["source"]] == [f"part {i % 3}" for i in range(60)]
    assert rows.fingerprint == Rows.joining(encode_in_order(conversations(), encoding, 1)).fingerprint


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bad", [1, 21])
def test_the_first_mistake_is_told(workers: int, bad: int, encoding: Encoding, large: None) -> None:
    """The line to mend must not depend on which process is faster, nor on how far reading is ahead."""

    def read() -> Iterator[Conversation]:
        for conversation in conversations():
            if conversation.where == f"rows:{bad}":
                yield conversation._replace(messages=[{"role": "user", "content": "No answer."}])
            elif conversation.where == f"rows:{bad + 2}":
                raise DataError("a row is int, not an object", where="rows")
            else:
                yield conversation

    with pytest.raises(DataError, match="nothing to train") as told:
        list(encode_in_order(read(), encoding, workers))
    assert told.value.where == f"rows:{bad}"
    assert told.value.fix


@pytest.mark.parametrize("good", [0, 3, 4, 8, 30])
def test_a_mistake_in_reading_is_told_after_what_was_read(good: int, encoding: Encoding, large: None) -> None:
    """A file that ends in rubbish: told as that, by any number of processes. Where the rubbish began a chunk, and
    processes were not started yet, the rows before it were taken for all there are."""

    def read() -> Iterator[Conversation]:
        yield from conversations(good)
        raise DataError("not JSON", where=f"rows:{good}")

    for workers in (1, 2):
        chunks = encode_in_order(read(), encoding, workers)
        assert sum(len(next(chunks).lengths) for _ in range(good // 4)) == good // 4 * 4
        with pytest.raises(DataError, match="not JSON"):
            list(chunks)


def test_reading_ahead_is_bounded(encoding: Encoding, large: None) -> None:
    """An iterator that a pool reads to its end at once is all data in memory."""
    read = 0

    def counted() -> Iterator[Conversation]:
        nonlocal read
        for conversation in conversations(2000):
            read += 1
            yield conversation

    chunks = encode_in_order(counted(), encoding, 2)
    for _ in range(20):
        next(chunks)
    assert read <= 20 * 4 + 2 * 2 * 4 + 4
    chunks.close()


def test_a_dead_process_is_told(encoding: Encoding, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that memory ran out for must not leave the run waiting for ever."""
    asked = encoders._Process.encode

    def dies(self: Any, work: Any) -> Any:
        self._process.kill()
        return asked(self, work)

    monkeypatch.setattr(encoders._Process, "encode", dies)
    with pytest.raises(ResourceError, match="died"):
        list(encode_in_order(conversations(), encoding, 2))


def test_a_process_that_does_not_start_is_told(
    encoding: Encoding, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody reads ended in a traceback; and what was started before a failure went on for ever."""
    python = sys.executable
    monkeypatch.setattr(encoders.sys, "executable", "false")
    more_than_a_pipe = ChatFormat(encoding.chat.tokenizer, "llama3", note=" " * (1 << 17))
    with pytest.raises(ResourceError, match="died"):
        list(encode_in_order(conversations(), replace(encoding, chat=more_than_a_pipe), 2))
    monkeypatch.setattr(encoders.sys, "executable", python)
    started = []

    def popen(*given: Any, **options: Any) -> Any:
        if started:
            raise BlockingIOError("no more processes")
        started.append(real(*given, **options))
        return started[0]

    real = subprocess.Popen
    monkeypatch.setattr(encoders.subprocess, "Popen", popen)
    with pytest.raises(BlockingIOError):
        list(encode_in_order(conversations(), encoding, 2))
    assert started[0].poll() is not None


def test_a_script_without_a_guard_works(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Processes that import the caller's script would start it again, and again; torch in each costs a second."""
    script = tmp_path / "mine.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, script, tokenizer_folder], capture_output=True, text=True, timeout=60)
    assert done.stdout == "20 False\n", done.stderr


def test_what_the_template_leaves_out_is_told_once(
    chat: ChatFormat, large: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Each process would warn of the same thing; and a warning that only a process sees is none."""
    silent = chat.source.replace(
        "{%- for", "{%- set messages = messages | rejectattr('role', 'eq', 'system') %}{%- for", 1
    )
    said = [{"role": "system", "content": "Be brief."}, *next(conversations()).messages]
    late = [*conversations(30), *(Conversation(f"late:{i}", said) for i in range(30))]
    for workers in (1, 2):
        caplog.clear()
        list(encode_in_order(late, Encoding(ChatFormat(chat.tokenizer, silent), 96), workers))
        assert [r.getMessage() for r in caplog.records if "left out" in r.getMessage()] == [
            "message 0 (system): its text is left out by the chat template"
        ]


def find(file: Path, encoding: Encoding, folder: Path, **fields: Any) -> Rows:
    return find_rows(ChatSource(path=file, **fields), encoding, folder, workers=1)


def test_rows_are_found_again_unread(
    file: Path, encoding: Encoding, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of encoding in every job; and a cache whose fingerprint differs would refuse its own checkpoints."""
    first = find(file, encoding, tmp_path / "cache")
    monkeypatch.setattr(row_cache, "read_conversations", lambda source: pytest.fail("read again"))
    monkeypatch.setattr(row_cache, "hash_file", lambda path: pytest.fail("hashed again"))
    again = find(file, encoding, tmp_path / "cache")
    monkeypatch.undo()
    in_memory = find(file, encoding, tmp_path / "elsewhere")
    assert in_memory.folder is None
    assert list(first) == list(again) == list(in_memory)
    assert first.fingerprint == again.fingerprint == in_memory.fingerprint
    assert first.counts == again.counts == in_memory.counts
    for share in (0.0, 0.3):
        ours, theirs = split_rows(again, share), split_rows(in_memory, share)
        assert [list(s) for s in ours] == [list(s) for s in theirs]
        assert [s.fingerprint for s in ours] == [s.fingerprint for s in theirs]


def test_few_rows_leave_nothing(file: Path, encoding: Encoding, tmp_path: Path) -> None:
    """A folder in the cache for each trial of forty rows is litter."""
    assert find(file, encoding, tmp_path / "cache").folder is None
    assert not (tmp_path / "cache").exists()


def test_whatever_decides_on_ids_decides_on_the_key(
    file: Path, encoding: Encoding, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stale rows train another model than the config says, and nothing shows it."""
    chat, cache = encoding.chat, tmp_path / "cache"
    keys = [find(file, encoding, cache).folder]
    others = [
        replace(encoding, seq_len=95), replace(encoding, train="last"), replace(encoding, too_long="drop"),
        replace(encoding, chat=ChatFormat(chat.tokenizer, chat.source + " ", date_string="26 Jul 2024")),
        replace(encoding, chat=ChatFormat(chat.tokenizer, "llama3", date_string="27 Jul 2024")),
        replace(encoding, chat=ChatFormat(chat.tokenizer.with_tokens(["<|x|>"]), "llama3", date_string="26 Jul 2024")),
    ]  # fmt: skip
    keys += [find(file, other, cache).folder for other in others]
    keys.append(find(file, encoding, cache, limit=59).folder)
    for limit in (None, 58):  # a part may have the name of a field that changes no ids
        part = MixedSource(path=file, limit=limit)
        keys.append(find_rows(ChatSource(sources={"path": part}), encoding, cache, workers=1).folder)
    monkeypatch.setattr(row_cache, "_code", lambda: "newer")
    keys.append(find(file, encoding, cache).folder)
    monkeypatch.undo()
    assert len(set(keys)) == len(others) + 5
    assert None not in keys


def test_a_file_that_looks_unchanged_is_not_taken_for_it(
    file: Path, encoding: Encoding, large: None, tmp_path: Path
) -> None:
    """Same name, size and date, other words: what `rsync -t` or an editor with kept dates leaves."""
    before, known = find(file, encoding, tmp_path / "cache"), file.stat()
    file.write_text(file.read_text().replace("How many", "How some"), encoding="utf-8")
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    after = find(file, encoding, tmp_path / "cache")
    assert after.folder != before.folder
    assert list(after) != list(before)


def test_a_young_file_is_not_remembered(
    file: Path, encoding: Encoding, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written twice within a tick of the clock it would look the same."""
    monkeypatch.setattr(row_cache, "_YOUNG", 3600 * 10**9)
    folder = find(file, encoding, tmp_path / "cache").folder
    assert not (tmp_path / "cache/hashes").exists()
    moved = file.rename(tmp_path / "moved.jsonl").rename(file)
    assert find(moved, encoding, tmp_path / "cache").folder == folder


def test_what_was_selected_is_kept_with_the_rows(
    file: Path, encoding: Encoding, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose rows lie ready would have to read all data again to tell what was dropped, or would not tell."""
    file.write_text(file.read_text() * 2)
    rules = {"select": {"duplicates": True}}
    wanted = (120, 60, {"duplicates": 60})
    first = find(file, encoding, tmp_path / "cache", **rules).selection
    assert (first["read"], first["kept"], first["dropped"]) == wanted
    with monkeypatch.context() as context:
        context.setattr(row_cache, "read_conversations", lambda *_: pytest.fail("the data was read again"))
        assert find(file, encoding, tmp_path / "cache", **rules).selection == first
    monkeypatch.setattr(row_cache, "SMALL", 1_000_000)
    assert find(file, encoding, tmp_path / "other", **rules).selection == first
    assert find(file, encoding, tmp_path / "other").selection == {}


def test_data_that_changes_while_it_is_read_is_not_kept(
    file: Path, encoding: Encoding, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the old file and half of the new under the hash of one of them."""
    read = row_cache.read_conversations

    def meanwhile(source: ChatSource, report: dict[str, Any] | None = None) -> Iterator[Conversation]:
        for number, conversation in enumerate(read(source, report)):
            if number == 30:
                os.utime(file)
            yield conversation

    monkeypatch.setattr(row_cache, "read_conversations", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        find(file, encoding, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir() and p.name != "hashes"]


def test_an_encoding_that_was_cut_short_is_made_again(
    file: Path, encoding: Encoding, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a killed job that look finished train on a part of the data."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, script, encoding.chat.tokenizer.where, file, tmp_path / "cache"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == -9
    left = [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir() and p.name != "hashes"]
    assert len(left) == 1
    assert left[0].startswith(".")
    assert len(find(file, encoding, tmp_path / "cache")) == 60
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name in left]


def test_of_two_at_once_one_encodes(file: Path, encoding: Encoding, tmp_path: Path) -> None:
    """Two jobs started together would write into one folder, or each spend the hours."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, script, str(encoding.chat.tokenizer.where), file, tmp_path / "cache"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=60) for job in jobs]
    assert sorted(out for out, _ in said) == ["60 rows, 0 written\n", "60 rows, 60 written\n"], said


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "rows.bin", "index.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_damaged_rows_are_encoded_again(
    name: str, how: str, file: Path, encoding: Encoding, large: None, tmp_path: Path
) -> None:
    """A bad sector in a cache must neither train rubbish nor stop a run."""
    before = find(file, encoding, tmp_path / "cache")
    assert before.folder
    ids, damaged = list(before), before.folder / name
    raw = damaged.read_bytes()
    damaged.unlink()  # not in place: the rows above are mapped
    if how != "gone":
        damaged.write_bytes(raw[:-2] if how == "cut" else bytes([raw[0] ^ 1]) + raw[1:])
    assert list(find(file, encoding, tmp_path / "cache")) == ids


def test_every_field_of_a_source_is_known_to_the_cache() -> None:
    """A source with a new way to name files is taken from the cache after they changed, unless `data_files` has it."""
    named = {"path", "hub", "file", "split", "packages", "sources"}  # of these `data_files` knows the files
    plain = {"format", "columns", "reasoning_gym", "size", "task_seed", "limit", "select"}
    assert set(ChatSource.model_fields) == named | plain
    assert set(MixedSource.model_fields) == (named | plain | {"passes"}) - {"sources", "select"}


def test_a_text_in_pieces_is_predicted_once(chat: ChatFormat) -> None:
    """Raw text longer than a row was lost; pieces that do not overlap lose an id at every cut."""
    text = "The llamas graze. " * 40
    ids = [chat.tokenizer.bos_id, *chat.tokenizer.encode(text), chat.tokenizer.eos_id]
    for seq_len in (2, 7, len(ids) - 1, len(ids), 999):
        rows, fate = encode_conversation(Conversation("x", [], text=text), Encoding(chat, seq_len))
        assert fate == "whole"
        assert all(2 <= len(row.ids) <= seq_len for row in rows)
        loader = PackedLoader(rows, seq_len, 1, pad_id=0, seed=0)
        batch = loader.batch(loader.packs)
        assert batch.n == len(ids) - 1
        assert Counter(batch.labels[batch.labels != IGNORE].tolist()) == Counter(ids[1:])
        assert rows[0].ids[0] == chat.tokenizer.bos_id


@pytest.mark.parametrize("policy", ["cut", "drop", "error"])
def test_long_conversations_are_counted(policy: Any, chat: ChatFormat, caplog: pytest.LogCaptureFixture) -> None:
    """Conversations that quietly lose their ends, or are quietly left out."""
    long = Conversation("rows:9", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes " * 99}])
    given = [*conversations(5), long]
    if policy == "error":
        with pytest.raises(DataError, match="seq_len=80") as told:
            encode_conversations(given, chat, 80, "all", policy)
        assert told.value.where == "rows:9"
        return
    rows = encode_conversations(given, chat, 80, "all", policy)
    assert len(rows) == (6 if policy == "cut" else 5)
    assert f"1 of 6 conversations are longer than seq_len=80 and were {policy.replace('drop', 'dropp')}" in caplog.text
    with pytest.raises(DataError, match="all 1 conversations are longer"):
        encode_conversations([long], chat, 80, "all", "drop")


def mixture(passes: dict[str, float] | None, seed: int = 0) -> PackedLoader:
    """Twelve rows of `a`, five of `b`, each alone in its pack; the first id says which row it is."""
    parts = [Rows.of([Encoded([base + i, 1, 2], [False, True, True]) for i in range(n)], name)
             for name, base, n in (("a", 100, 12), ("b", 200, 5))]  # fmt: skip
    return PackedLoader(parts[0].joined(parts[1]), 3, 1, pad_id=0, seed=seed, passes=passes)


def first_ids(loader: PackedLoader, count: int) -> list[int]:
    return [int(next(loader).tokens[0, 0]) for _ in range(count)]


def test_half_a_pass_reads_the_other_half_next() -> None:
    """Halves drawn anew each epoch leave a quarter of a source unread after two."""
    loader = mixture({"a": 0.5, "b": 2})
    epochs = [first_ids(loader, 16) for _ in range(4)]
    for epoch in epochs:
        assert sum(i < 200 for i in epoch) == 6
        assert Counter(i for i in epoch if i >= 200) == dict.fromkeys(range(200, 205), 2)
    for first, second in (epochs[:2], epochs[2:]):
        assert sorted(i for i in first + second if i < 200) == list(range(100, 112))
    assert epochs[0] != epochs[1]
    assert loader.epochs() == {"a": 2.0, "b": 8.0}
    assert first_ids(mixture({"a": 0.5, "b": 2}, seed=1), 16) != epochs[0]
    with pytest.raises(DataError, match="did you mean `a`"):
        mixture({"A": 2})
    plain = first_ids(mixture(None), 40)
    assert first_ids(mixture({"a": 1, "b": 1, "": 1}), 40) == plain


def test_a_mixture_goes_on_exactly() -> None:
    """The position within passes is the same two integers."""
    whole = mixture({"a": 0.4, "b": 1.5})
    expected = first_ids(whole, 40)
    for stop in (1, 12, 13, 27):
        first, second = mixture({"a": 0.4, "b": 1.5}), mixture({"a": 0.4, "b": 1.5})
        first_ids(first, stop)
        second.load_state_dict(first.state_dict())
        assert first_ids(second, 40 - stop) == expected[stop:]
        assert second.epochs() == whole.epochs()


def test_packs_stay_within_a_source() -> None:
    """Packs of two sources cannot be read in different passes."""
    rows = Rows.of(encoded_rows(30), "a").joined(Rows.of(encoded_rows(21), "b"))
    packs_of = pack_rows(rows, 32)
    assert sorted(i for members in packs_of for i in members) == list(range(51))
    for members, number in zip(packs_of, packs_of.source, strict=True):
        assert {rows.names[n] for n in rows.entries["source"][members]} == {rows.names[number]}
    assert [list(p) for p in packs_of[: len(pack_rows(Rows.of(encoded_rows(30)), 32))]] == pack(
        [len(r.ids) for r in encoded_rows(30)], 32
    )


def test_packs_of_many_rows_are_kept(
    file: Path, encoding: Encoding, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of other rows, or of another length, under the same name would index beyond the rows."""
    monkeypatch.setattr(packs, "_KEPT", 1)
    rows = find(file, encoding, tmp_path / "cache")
    made = {(s, n): pack_rows(split_rows(rows, s)[0], n) for s in (0.0, 0.3) for n in (96, 128)}
    assert len(list((tmp_path / "cache").glob("*.packs.npz"))) == 4
    monkeypatch.setattr(packs, "_packed", lambda rows, seq_len: pytest.fail("packed again"))
    for (share, seq_len), expected in made.items():
        assert list(pack_rows(split_rows(rows, share)[0], seq_len)) == list(expected)
    monkeypatch.undo()
    monkeypatch.setattr(packs, "_KEPT", 1)
    for kept in (tmp_path / "cache").glob("*.packs.npz"):
        kept.write_bytes(kept.read_bytes()[:-40])
    assert list(pack_rows(split_rows(rows, 0.3)[0], 96)) == list(made[0.3, 96])


def test_no_rows_are_refused() -> None:
    """A validation split that took every conversation: the first batch was looked for without end."""
    train, valid = split_rows(Rows.of(encoded_rows()), 0.999)
    assert len(valid) == len(encoded_rows())
    with pytest.raises(DataError, match="no conversations to train on"):
        PackedLoader(train, 32, 1, pad_id=0, seed=0)


def test_unpacked_rows_are_as_wide_as_the_longest() -> None:
    """What packing is compared with: a row each, and no more padding than the batch needs."""
    loader = PackedLoader(encoded_rows(), 32, 3, pad_id=0, seed=0, packed=False)
    assert [list(p) for p in loader.packs] == [[i] for i in range(9)]
    batch = next(loader)
    assert batch.documents
    assert len(batch.documents.spans) == 3
    assert batch.tokens.shape == (3, max(end for _, _, end in batch.documents.spans))


def test_unpacked_rows_give_the_gradient_of_packed_ones() -> None:
    """The oracle of packing: a text that sees its neighbour, or loses a label, learns something else."""
    packed, single = (PackedLoader(encoded_rows(), 32, 9, pad_id=0, seed=0, packed=p) for p in (True, False))
    ours, theirs = (gradients([loader.batch(loader.packs)]) for loader in (packed, single))
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-10 * gradient.norm(), name
