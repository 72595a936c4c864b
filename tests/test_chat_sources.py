"""Conversations out of the data people have: shapes, columns, folders and splits, the hub's cache, mixtures."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from test_row_files import write

from puna.config import load_config
from puna.data.conversation import Conversation
from puna.data.conversations import ChatSource, files_of, passes, read_conversations
from puna.errors import DataError, PunaError, UsageError
from puna.recipes.sft import Config

ASKED, TOLD = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def read(path: Path | None, **fields: Any) -> list[Conversation]:
    return list(read_conversations(ChatSource.model_validate({"path": path, **fields})))


def only(path: Path, row: dict[str, Any], **fields: Any) -> Any:
    """The messages of a file of one row, or its raw text."""
    [conversation] = read(write(path / "rows.jsonl", [row]), **fields)
    return conversation.messages or conversation.text


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Q", "input": "", "output": "A", "text": "Below is ..."}, [ASKED, TOLD]),
        ({"instruction": "Q", "output": "A", "system": ""}, [ASKED, TOLD]),
        ({"instruction": "Q", "input": None, "response": "A", "system": "S"}, [SYSTEM, ASKED, TOLD]),
        ({"instruction": "Q", "input": "I", "output": "A"}, [{**ASKED, "content": "Q\n\nI"}, TOLD]),
        ({"instruction": "Q", "output": "A", "history": [["Q", "A"]]}, [ASKED, TOLD, ASKED, TOLD]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
         [SYSTEM, ASKED, TOLD]),
        ({"conversation": [{"from": "prompter", "value": "Q"}, {"from": "chatgpt", "value": "A"}]}, [ASKED, TOLD]),
        ({"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "Q"},
                            {"from": "assistant", "value": "A"}], "system": "other"}, [SYSTEM, ASKED, TOLD]),
        ({"messages": [{"role": "developer", "content": "S"}, ASKED, {**TOLD, "weight": 1}]}, [SYSTEM, ASKED, TOLD]),
        ({"messages": [ASKED, {**TOLD, "weight": 0}, ASKED, TOLD]}, [ASKED, {**TOLD, "train": False}, ASKED, TOLD]),
        ({"messages": [ASKED, {**TOLD, "train": 0}, ASKED, TOLD]}, [ASKED, {**TOLD, "train": False}, ASKED, TOLD]),
        ({"messages": [{**ASKED, "content": [{"type": "text", "text": "Q"}]}, TOLD]}, [ASKED, TOLD]),
        ({"messages": json.dumps([ASKED, TOLD])}, [ASKED, TOLD]),
        ({"prompt": "Q", "completion": "A"}, [ASKED, TOLD]),
        ({"question": "Q", "answer": "A", "system": "S"}, [SYSTEM, ASKED, TOLD]),
        ({"problem": "Q", "solution": "A"}, [ASKED, TOLD]),
        ({"prompt": [SYSTEM, ASKED, TOLD, ASKED], "completion": [TOLD]},
         [SYSTEM, ASKED, {**TOLD, "train": False}, ASKED, TOLD]),
        ({"text": "Raw."}, "Raw."),
    ],
)  # fmt: skip
def test_shapes(row: dict[str, Any], messages: Any, tmp_path: Path) -> None:
    """A system message beside the turns, earlier turns in `history`, a weight of 0 were dropped without a word."""
    assert only(tmp_path, row) == messages


def test_the_shape_of_a_file_is_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two files written into one: half of it would be trained otherwise than anybody looked at."""
    caplog.set_level(logging.INFO, "puna")
    file = write(tmp_path / "rows.json", [{"instruction": "Q", "output": "A"}])
    read(file)
    assert f"{file}: rows of the format alpaca (instruction, output)" in caplog.text
    mixed = [{"instruction": "Q", "output": "A"}, {"prompt": "Q", "completion": "A"}]
    with pytest.raises(DataError, match=r"rows\.json:2: not of the format alpaca.*prompt, completion"):
        read(write(file, mixed))
    with pytest.raises(DataError, match=r"rows\.json:1: not of the format openai"):
        read(file, format="openai")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "for dpo"),
        ({"messages": [ASKED, TOLD], "label": False}, "a verdict"),
        ({"a": 1, "b": 2}, r"found: a, b"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "no text in `role`"),
        ({"messages": [{**TOLD, "weight": 0.5}]}, "weight 0.5"),
        ({"messages": [{**TOLD, "weight": "1"}]}, "weight '1'"),
        ({"messages": [{**TOLD, "train": "false"}]}, "train 'false'"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "not JSON"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "history"),
        ({"instruction": "Q", "output": 3}, "format alpaca"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "a call",
        ),
    ],
)
def test_rows_that_teach_the_wrong_thing_are_refused(row: dict[str, Any], what: str, tmp_path: Path) -> None:
    """Bad answers of preference data learned as good ones; a message cut down to what was understood of it."""
    with pytest.raises(DataError, match=what) as told:
        only(tmp_path, row)
    assert told.value.where == f"{tmp_path}/rows.jsonl:1"


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"prompt": "dialogue", "completion": "summary"}, [ASKED, TOLD]),
        ({"prompt": "Sum up: {dialogue} {{}} {n}", "completion": "{summary}.", "system": "role"},
         [SYSTEM, {**ASKED, "content": "Sum up: Q {} 7"}, {**TOLD, "content": "A."}]),
        ({"prompt": "{nested}", "completion": "summary"}, [{**ASKED, "content": "{dialogue.__class__}"}, TOLD]),
        ({"messages": "turns", "system": "role"}, [SYSTEM, ASKED, TOLD]),
        ({"text": "{dialogue} -> {summary}"}, "Q -> A"),
        ({"text": "summary"}, "A"),
    ],
)  # fmt: skip
def test_columns(columns: dict[str, str], found: Any, tmp_path: Path) -> None:
    """Any table is a chat with two names; a text from the data is never read as a template itself."""
    row = {"dialogue": "Q", "summary": "A", "role": "S", "n": 7, "turns": [ASKED, TOLD],
           "nested": "{dialogue.__class__}"}  # fmt: skip
    assert only(tmp_path, row, columns=columns) == found


@pytest.mark.parametrize(
    ("fields", "kind", "what"),
    [
        ({"columns": {"prompt": "dialog", "completion": "summary"}}, DataError, "did you mean `dialogue`"),
        ({"columns": {"prompt": "{dialogue.upper}", "completion": "summary"}}, DataError, "column `dialogue.upper`"),
        ({"columns": {"prompt": "{dialogue!r}", "completion": "summary"}}, DataError, "column `dialogue!r`"),
        ({"columns": {"prompt": "dialogue", "completion": "list"}}, DataError, "a message is str"),
        ({"columns": {"prompt": "dialogue", "completion": "yes"}}, DataError, "no text in column `yes`"),
        ({"columns": {"prompt": "dialogue", "completion": "summary", "system": "sytem"}}, DataError, "columns.system"),
        ({"columns": {"messages": "dialogues"}}, DataError, "column `dialogues`"),
        ({"columns": {"prompt": "{dialogue", "completion": "summary"}}, UsageError, "a brace"),
        ({"columns": {"prompt": "{}", "completion": "summary"}}, UsageError, "a brace"),
        ({"columns": {"prompt": "dialogue"}}, UsageError, "columns has prompt"),
        ({"columns": {}}, UsageError, "columns has nothing"),
        ({"columns": {"text": "a", "prompt": "b", "completion": "c"}}, UsageError, "completion, prompt, text"),
        ({"columns": {"text": "dialogue"}, "format": "alpaca"}, UsageError, "format=alpaca"),
        ({"file": "*.json"}, UsageError, "data.file is of a dataset"),
        ({"hub": "a/b"}, UsageError, "data.path and data.hub"),
        ({"path": None, "split": "train", "packages": ["chatterbot"]}, UsageError, "but no file"),
        ({"sources": {"a": {"limit": 3}}}, UsageError, "data.sources.a: no conversations given"),
    ],
)  # fmt: skip
def test_columns_and_fields_that_do_not_fit(
    fields: dict[str, Any], kind: type[PunaError], what: str, tmp_path: Path
) -> None:
    """A misspelt column is an empty prompt in every row; what contradicts itself is told before a model loads."""
    file = write(tmp_path / "rows.jsonl", [{"dialogue": "Q", "summary": "A", "list": ["x"], "yes": True}])
    with pytest.raises(kind, match=what):
        read(**{"path": file, **fields})


def test_folders_patterns_and_splits(tmp_path: Path) -> None:
    """A folder with train and test files trained on its own test set."""
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.jsonl", ".hidden.jsonl"):
        write(tmp_path / name, [{"prompt": name, "completion": "A"}])
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UsageError, match="test, train"):
        read(tmp_path)
    assert [c.messages[0]["content"][:7] for c in read(tmp_path, split="train")] == ["train-0"] * 2
    assert [c.messages[0]["content"] for c in read(tmp_path, split="eval")] == ["test.jsonl"]
    with pytest.raises(UsageError, match="no split `validation`"):
        read(tmp_path, split="validation")
    home = tmp_path / "dev"  # no folder above the pattern is a split
    home.mkdir()
    for name in ("train.jsonl", "other.jsonl"):
        write(home / name, [{"prompt": name, "completion": "A"}])
    assert [c.messages[0]["content"] for c in read(home / "*.jsonl", split="train")] == ["train.jsonl"]
    with pytest.raises(UsageError, match="no split `validation`"):
        read(home / "*.jsonl", split="validation")
    assert [c.where for c in read(tmp_path / "*.jsonl")] == [f"{tmp_path}/test.jsonl:1"]
    assert files_of(ChatSource(path=tmp_path / "train-*")) == sorted(tmp_path.glob("train-*"))
    with pytest.raises(DataError, match="did you mean"):
        read(tmp_path / "tset.jsonl")


def test_a_dataset_of_the_hub_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that is on the disk needs no network; of several subsets none is taken by chance."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "datasets--org--sums"
    for name in ("main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet", "hard/train.jsonl"):
        (home / "snapshots/c0ffee" / name).parent.mkdir(parents=True, exist_ok=True)
        write(home / "snapshots/c0ffee" / name, [{"question": name, "answer": "A"}])
    (home / "snapshots/c0ffee/README.md").write_text("# sums")
    (home / "refs").mkdir()
    (home / "refs/main").write_text("c0ffee")

    def names(**fields: str) -> list[str]:
        source = ChatSource.model_validate({"hub": "org/sums", **fields})
        return [c.messages[0]["content"] for c in read_conversations(source)]

    assert names(split="test") == ["main/test-00000-of-00001.parquet"]
    assert names(split="train", file="main/*") == ["main/train-00000-of-00001.parquet"]
    assert names(file="hard/*", hub="org/sums@c0ffee") == ["hard/train.jsonl"]
    for fields, kind, what in (
        ({}, UsageError, "splits test, train"),
        ({"split": "train"}, UsageError, "several parts: hard, main"),
        ({"file": "mian/*"}, UsageError, r"no file `mian/\*`"),
        ({"hub": "org/other"}, DataError, "hf download org/other --repo-type dataset"),
        ({"hub": "../x"}, UsageError, "no dataset's name"),
    ):
        with pytest.raises(kind, match=what):
            names(**fields)


def test_mixtures_name_their_parts(tmp_path: Path) -> None:
    """Without its source's name a row cannot be drawn by weight, nor counted."""
    files = {name: write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "A"}] * 3) for name in "abc"}
    words = {
        "data.path": files["c"], "data.sources.a.path": files["a"], "data.sources.a.limit": "2",
        "data.sources.b.path": files["b"], "data.sources.b.passes": "0.5",
    }  # fmt: skip
    source = load_config(Config, given=words).data
    assert [(c.source, c.messages[0]["content"]) for c in read_conversations(source)] == [
        ("", "c"), ("", "c"), ("", "c"), ("a", "a"), ("a", "a"), ("b", "b"), ("b", "b"), ("b", "b"),
    ]  # fmt: skip
    assert passes(source) == {"": 1.0, "a": 1.0, "b": 0.5}
    assert files_of(source) == [files["c"], files["a"], files["b"]]
    assert len(list(read_conversations(source.model_copy(update={"limit": 4})))) == 4
    with pytest.raises(UsageError, match=r"data\.sources\.a\.pth.*did you mean `data\.sources\.a\.path`"):
        load_config(Config, given={"data.sources.a.pth": "x"})


@pytest.mark.parametrize(
    ("name", "count", "messages"),
    [
        ("alpaca_en_demo.json.gz", 999, 1998), ("gpteacher_codegen.json.gz", 4535, 9070),
        ("gsm8k_train.jsonl.gz", 7473, 14946), ("identity.json.gz", 91, 182),
        ("rasbt_instruction_data.json.gz", 1100, 2200), ("p3_t0_sample.jsonl.gz", 11467, 22934),
    ],
)  # fmt: skip
def test_real_files(name: str, count: int, messages: int, assets: Path) -> None:
    """Every instruction set in its own format, with no field named."""
    found = read(assets / "sft" / name)
    assert (len(found), sum(len(c.messages) for c in found)) == (count, messages)


def test_real_dialogues_with_tools(assets: Path) -> None:
    """Every turn of Glaive's 300 dialogues stays one, under its role, with the functions of its row."""
    file = assets / "sft/glaive_toolcall_en_demo.json.gz"
    rows = json.loads(gzip.decompress(file.read_bytes()))
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    for row, conversation in zip(rows, read(file), strict=True):
        assert [m["role"] for m in conversation.messages] == [roles[t["from"]] for t in row["conversations"]]
        assert len(conversation.tools or []) == len(json.loads(row["tools"] or "[]"))


def test_real_preference_data_is_refused(assets: Path) -> None:
    """Rejected answers and monkey noises would be learned as answers."""
    for name in ("dpo_en_demo", "kto_en_demo", "rasbt_preference"):
        with pytest.raises(DataError, match="preference data"):
            read(assets / f"pref/{name}.json.gz")
    chosen = read(assets / "pref/rasbt_preference.json.gz", columns={"prompt": "instruction", "completion": "chosen"})
    assert len(chosen) == 1100
