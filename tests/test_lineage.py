"""What artefacts say they were made from: a way back from a model to its texts, the same for the same run."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.files import MANIFEST, hash_file
from puna.lineage import code_version, fingerprint, lineage, parents_of, read_lineage
from puna.recipes import run

SMALL = {"model.dim": 16, "model.n_layers": 1, "model.ffn_dim": 16, "model.n_heads": 1, "model.n_kv_heads": 1,
         "seq_len": 32, "batch_size": 2, "steps": 2, "dtype": "fp32"}  # fmt: skip


@pytest.fixture(scope="module")
def chain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretraining run and an adapter on it, named relative to it."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "rows.jsonl").write_text('{"prompt": "How many stars?", "completion": "345"}\n' * 8)
    run("pretrain", output=folder / "base", data=shards, **{**SMALL, "samples.prompts": []})
    words: dict[str, Any] = {"model": str(folder / "base"), "data.path": folder / "rows.jsonl", "template": "llama3"}
    run("sft", output=folder / "tuned", steps=1, seq_len=64, dtype="fp32", lora={"rank": 2, "dora": True}, **words)
    return folder


def test_a_model_leads_back_to_its_tokenizer(chain: Path, shards: Path, tokenizer_folder: Path) -> None:
    """Merged -> adapter -> base -> shards -> tokenizer: a link that is a name alone says nothing of what was there."""
    from puna.cli.merge import merge

    merge([str(chain / "tuned")], chain / "merged", "fp32")
    made = read_lineage(chain / "merged")
    steps = [made["recipe"]]
    expected = {
        "merge": [chain / "tuned/final", chain / "base/final"], "sft": [chain / "base/final"],
        "pretrain": [shards], "data": [tokenizer_folder], "tokenizer": [],
    }  # fmt: skip
    while parents_of(made):
        for named, place in zip(parents_of(made), expected[steps[-1]], strict=True):
            assert named["fingerprint"] == fingerprint(place) == hash_file(place / MANIFEST), named
        made = read_lineage(expected[steps[-1]][0])
        steps.append(made["recipe"])
    assert steps == ["merge", "sft", "pretrain", "data", "tokenizer"]


def test_what_every_artefact_says(chain: Path, shards: Path, tokenizer_folder: Path) -> None:
    """Versions, recipe, config, data and template in every puna.json, whoever wrote it."""
    for folder in (chain / "base/final", chain / "tuned/final", shards, tokenizer_folder):
        made = read_lineage(folder)
        assert {"format", "puna", "code", "recipe", "parents", "config"} <= made.keys(), folder
        assert made["code"] == code_version()
    tuned = read_lineage(chain / "tuned/final")
    assert tuned["tokenizer"] == hash_file(chain / "tuned/final/tokenizer.json")
    assert tuned["template"] == hash_file(chain / "tuned/final/chat_template.jinja")
    assert tuned["data"].startswith("sha256:")
    assert tuned["config"]["lora"]["dora"] is True
    assert tuned["metrics"]["steps"] == 1
    assert "template" not in read_lineage(chain / "base/final")
    puna.load(chain / "base").save(chain / "saved")
    saved = read_lineage(chain / "saved")
    assert (saved["recipe"], saved["parents"][0]["path"]) == ("save", str(chain / "base/final"))


def test_the_same_run_says_the_same(chain: Path, shards: Path) -> None:
    """A time of day, a process id or a random name would make a resumed run another one."""
    again = chain / "again"
    run("pretrain", output=again, data=shards, **{**SMALL, "samples.prompts": []})
    first, second = (read_lineage(chain / name / "final") for name in ("base", "again"))
    for made in (first, second):
        made["config"].pop("output")
        made["metrics"].pop("seconds")
    assert first == second


def test_a_fingerprint_tells_what_changed(chain: Path, tmp_path: Path) -> None:
    """A parent trained again under the same name is another parent; a foreign folder has no manifest to ask."""
    foreign = tmp_path / "foreign"
    shutil.copytree(chain / "base/final", foreign)
    ours = fingerprint(foreign)
    (foreign / MANIFEST).unlink()
    before = fingerprint(foreign)
    assert before is not None
    assert before != ours
    assert before == fingerprint(foreign)
    weights = foreign / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[100] ^= 1
    weights.write_bytes(raw)
    assert fingerprint(foreign) != before
    assert fingerprint(weights) != fingerprint(foreign)
    assert fingerprint(tmp_path / "nothing") is None
    assert parents_of(lineage("save", [tmp_path / "nothing"]))[0]["fingerprint"] is None


def test_a_large_foreign_file_is_not_read_through(tmp_path: Path) -> None:
    """Hashing 100 GB before a one-second conversion."""
    file = tmp_path / "model.gguf"
    with file.open("wb") as opened:
        opened.truncate(200_000_000_000)  # no byte of it lies on the disk
    assert str(fingerprint(file)).startswith("heads:")


def test_old_and_damaged_lineage_is_read_as_what_it_is(tmp_path: Path) -> None:
    """A puna.json of an early version, of a stranger, or cut in half must not keep a model from being opened."""
    assert parents_of({"parents": ["runs/a"]}) == [{"path": "runs/a"}]
    assert parents_of({"parents": [7, {"fingerprint": "x"}, {"path": "b"}]}) == [{"path": "b"}]
    assert parents_of({"parents": "x"}) == []
    for text in ("[1]", '{"a": ', "\0", "[" * 100_000, '{"a": "' + "x" * 3_000_000 + '"}'):
        (tmp_path / "puna.json").write_text(text)
        assert read_lineage(tmp_path) == {}


def test_the_code_version_is_the_checkouts_commit() -> None:
    """A commit of the project that happens to hold the environment would be a lie."""
    root = Path(puna.__file__).parents[1]
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip("this is no checkout: the commit in the lineage is not tested")
    assert code_version() == (asked.stdout.strip() if (root / ".git").exists() else None)
