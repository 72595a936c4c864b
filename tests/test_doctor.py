"""`puna doctor` as a user meets it: the machine, a healthy model, a sick one, data of every kind."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import puna_all
from test_layers import closure
from test_model import BASE, build

from puna import device
from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.model_directory import save_model
from puna.errors import DataError, UsageError
from puna.eval.doctor import machine
from puna.eval.doctor.case import open_case
from puna.eval.doctor.diagnose import CHECKS, diagnose
from puna.files import atomic_folder
from puna.infer.llama import load
from puna.lora import LoraConfig, add_lora, lora_parameters, whole_parameters
from puna.model.config import ModelConfig
from puna.tokenizer.chat.format import bundled
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with random weights."""
    tokenizer = Tokenizer(tokenizer_folder)
    tokenizer = Tokenizer({**tokenizer.files, "chat_template.jinja": bundled("llama3").encode()})
    shape = ModelConfig(**{**BASE, "n_kv_heads": 2, "vocab_size": tokenizer.vocab_size, "max_seq_len": 200})
    with atomic_folder(tmp_path_factory.mktemp("model") / "model") as folder:
        save_model(folder, build(shape), tokenizer, "fp32", {})
    return tmp_path_factory.getbasetemp() / folder.parent.name / "model"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"How many are {i} and {i}?", "completion": f"{2 * i} llamas."} for i in range(6)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_the_report_and_the_exit_code(model: Path, rows: Path, tmp_path: Path) -> None:
    """A report wider than a terminal, or a failure that a script does not notice."""
    sick = shutil.copytree(model, tmp_path / "sick")
    template = (
        (sick / "chat_template.jinja")
        .read_text()
        .replace("+ message['content']", "+ message['role'] + message['content']")
    )
    (sick / "chat_template.jinja").write_text(template)
    well, ill = puna_all(
        [["doctor", str(m), "--data", str(rows), *more] for m, more in ((model, []), (sick, ["--json"]))]
    )
    assert (well.returncode, ill.returncode) == (0, 5), well.stderr + ill.stderr
    lines = well.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == [check.name for check in CHECKS]
    assert all(line.endswith(" ok") for line in lines[1:])
    assert f"{len(CHECKS)} checks" in well.stderr
    report = json.loads(ill.stdout)
    assert not report["ok"]
    failed = {check["name"]: check for check in report["checks"] if not check["ok"]}
    assert set(failed) == {"mask"}
    assert failed["mask"]["parts"]["rows that train other words"] == 6
    assert "template" in failed["mask"]["cause"]


def test_what_cannot_be_examined(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a command, a file that is not there, conversations for a model without a template."""
    base = shutil.copytree(model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one.jsonl").write_text(rows.read_text().splitlines()[0])
    calls = {
        ("doctor", model): (2, "--data FILE"),
        ("doctor", model, "--data", tmp_path / "none.jsonl"): (3, "no such file"),
        ("doctor", model, "--data=~/one.jsonl"): (3, "fewer than two"),
        ("doctor", model, "--data=~/two.jsonl"): (3, f"did you mean `{tmp_path / 'one.jsonl'}`"),
        ("doctor", model, "--data", rows, "--dtype", "fp8"): (2, "fp64"),
    }
    for done, (code, hint) in zip(puna_all([[*map(str, c)] for c in calls]), calls.values(), strict=True):
        assert (done.returncode, done.stdout) == (code, "")
        assert hint in done.stderr
    with pytest.raises(UsageError, match="--template llama2, llama3, "):
        open_case(base, rows, tmp_path)
    with pytest.raises(DataError, match="fewer than two"):
        open_case(model, tmp_path / "one.jsonl", tmp_path)


def test_every_kind_of_data(model: Path, rows: Path, shards: Path, texts: Path, tmp_path: Path) -> None:
    """Shards, a folder of texts, a column of text: what pretraining reads; shards of another tokenizer are refused."""
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} llamas graze. " * 9}) + "\n" for i in range(4))
    )
    for data in (shards, texts, tmp_path / "text.jsonl"):
        (scratch := tmp_path / f"scratch-{data.name}").mkdir()
        case = open_case(model, data, scratch, rows=3)
        assert len(case.rows) == 3
        assert case.chat is None
        findings = list(diagnose(case, ["round-trip", "bos", "labels", "packing"]))
        assert [f.name for f in findings if not f.ok] == []
        assert len(findings) == 4
    index = json.loads((shards / "index.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text(json.dumps({**index, "tokenizer": "sha256:0"}))
    with pytest.raises(DataError, match="another tokenizer"):
        open_case(model, tmp_path / "other", tmp_path)
    with pytest.raises(UsageError, match="no template"):
        open_case(model, rows, tmp_path, template="lama3")


@pytest.mark.parametrize("quantize", [None, "int8"], ids=["lora", "qlora"])
@pytest.mark.parametrize("more", [{}, {"rslora": True, "dora": True}, {"modules_to_save": ["embed_tokens", "norm"]}])
def test_an_adapter_is_examined_as_it_is(
    more: dict[str, Any], quantize: str | None, model: Path, rows: Path, tmp_path: Path
) -> None:
    """A trained adapter on its base, read from its files and written out, merged and not: the same logits."""
    case = open_case(model, rows, tmp_path)
    adapted = load(model, "fp32", quantize=quantize).model
    config = LoraConfig(rank=3, alpha=7, **more)
    add_lora(adapted, config)
    for parameter in whole_parameters(adapted, config).values():
        parameter.data *= 1.1
    for name, parameter in lora_parameters(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapted, config, case.tokenizer, str(model), {}, quantize)
    case = open_case(tmp_path / "adapter", rows, tmp_path)
    findings = {f.name: f for f in diagnose(case, ["disk", "merge", "reload"])}
    assert [f for f in findings.values() if not f.ok] == []
    plain = open_case(model, rows, tmp_path)
    assert (case.model(case.long) - plain.model(case.long)).abs().max() > 0.01


def test_stop_ids_survive_saving(model: Path, rows: Path, tmp_path: Path) -> None:
    """Instruct models list stop ids in generation_config.json alone; saved without them they talk on."""
    more = shutil.copytree(model, tmp_path / "more")
    values = json.loads((more / "generation_config.json").read_text())
    values["eos_token_id"].append(7)
    (more / "generation_config.json").write_text(json.dumps(values))
    (finding,) = diagnose(open_case(more, rows, tmp_path), ["reload"])
    assert finding.ok, finding


def test_a_check_that_breaks_has_failed(model: Path, rows: Path, tmp_path: Path) -> None:
    """NaN in a weight passes every `difference > tolerance`; an exception must not end the report."""
    case = open_case(model, rows, tmp_path)
    with torch.no_grad():
        case.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    numeric = {f.name: f.ok for f in diagnose(case, ["disk", "causality", "batch", "cache", "gradients", "packing"])}
    assert set(numeric.values()) == {False}
    case = open_case(model, rows, tmp_path)
    (tmp_path / "model").mkdir()  # where the model would be saved
    (finding,) = diagnose(case, ["reload"])
    assert (finding.ok, finding.as_dict()["difference"]) == (False, None)
    assert "exists already" in finding.error


def test_the_oracle_is_independent() -> None:
    """An oracle that calls what it judges agrees with every mistake in it."""
    places = {path.parent.name for path in closure("puna.eval.doctor.written_out", {})}
    assert places == {"doctor", "gguf", "checkpoint", "puna"}  # of checkpoint/ what maps a file


def test_the_machine() -> None:
    """What an issue needs, and nothing that must not be in one."""
    told = machine.examine_machine()
    assert told["versions"]["torch"] == torch.__version__
    assert 1 <= told["threads"] <= told["cores"]
    assert min(told["gemm GF/s"].values()) > 0
    assert 0 < told["memory GB"]["available"] <= told["memory GB"]["total"]
    assert json.loads(json.dumps(told)) == told
    secret = {"OMP_NUM_THREADS": "2", "HF_TOKEN": "hf_secret", "LD_PRELOAD": "/home/me/libtcmalloc.so:/x.so"}
    assert machine.flags(secret) == {"OMP_NUM_THREADS": "2", "LD_PRELOAD": "libtcmalloc.so"}


WELL: dict[str, Any] = {
    "devices": ["cpu"], "cores": 2, "threads": 2, "compute dtype": "bf16", "gemm GF/s": {"fp32": 80, "bf16": 200},
    "memory GB": {"available": 20.0}, "cache folder": {"free GB": 50.0}, "compiler": {"problem": "", "fix": ""},
    "environment": {"OMP_WAIT_POLICY": "passive"},
}  # fmt: skip


def test_what_is_warned_of() -> None:
    """A warning that always comes, or never, is not read; each says what to type."""
    assert machine.warnings(WELL) == []
    for change, word in (
        ({"environment": {}}, "OMP_WAIT_POLICY=passive"),
        ({"compute dtype": "fp32"}, "dtype=fp32"),
        ({"gemm GF/s": {"fp32": 80, "bf16": 81}}, "dtype=fp32"),
        ({"threads": 1}, "leave it so"),
        ({"memory GB": {"available": 0.5}}, "batch_size"),
        ({"cache folder": {"free GB": 0.2}}, "XDG_CACHE_HOME"),
        ({"compiler": {"problem": "no C++ compiler (g++)", "fix": "apt install g++"}}, "apt install g++"),
    ):
        (warned,) = machine.warnings({**WELL, **change})
        assert word in warned.fix


def test_a_container_s_quota_is_the_number_of_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two cores' worth of time on a host of 64: a run that measured up to 64 threads was throttled by half of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    quota, tried = tmp_path / "cpu.max", []
    monkeypatch.setattr(device, "_QUOTA", str(quota))
    assert device.cores() == 64
    for text, cores in (("max 100000\n", 64), ("200000 100000\n", 2), ("50000 100000\n", 1)):
        quota.write_text(text)
        assert device.cores() == cores
    quota.write_text("200000 100000\n")
    monkeypatch.setattr(torch, "set_num_threads", tried.append)
    device.calibrate_threads()
    assert tried == [1, 2]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own message is thirty lines about its insides."""

    def fails(function: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmany lines")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setenv("PATH", "")
    assert machine.compiler() == {"problem": "no C++ compiler (g++)", "fix": "apt install g++, or leave compile=false"}
