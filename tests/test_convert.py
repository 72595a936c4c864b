"""Conversions are whole or absent, and what cannot be is told before the first byte."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import puna_forked
from test_meta import GENERATIONS, publish, random_state
from test_model import build

from puna.checkpoint import convert as module
from puna.checkpoint import safetensors_file
from puna.checkpoint.convert import convert
from puna.checkpoint.gguf import file as gguf_file
from puna.checkpoint.gguf.file import Gguf
from puna.checkpoint.inspect import inspect
from puna.checkpoint.names import DTYPES
from puna.checkpoint.registry import load_tokenizer, open_model
from puna.checkpoint.stored_directory import write_model_directory
from puna.errors import CheckpointError, DataError, NumericError, PunaError, ResourceError, UsageError
from puna.infer.llama import Llama, load
from puna.tokenizer.tokenizer import Tokenizer

TARGETS: list[tuple[str, str, dict[str, Any]]] = [
    ("hf", "out", {}),
    ("meta", "out", {"shards": 2}),
    ("gguf", "out.gguf", {"kind": "Q8_0"}),
    ("llama2.c", "out.bin", {}),
]


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 2 as Meta would publish it."""
    config = GENERATIONS["2"]
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    folder = publish(tmp_path_factory.mktemp("model") / "meta", state, config, 1, by_rows=True)
    Tokenizer(tokenizer_folder).save(folder)
    return folder


def interrupted(at: int, what: Callable[[], None]) -> Callable[..., None]:
    """Does `what` after `at` tensors are written."""
    left = iter(range(at))

    def update(*_: object) -> None:
        if next(left, None) is None:
            what()

    return update


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [0, 10, 20])
@pytest.mark.parametrize(("to", "name", "more"), TARGETS)
def test_ctrl_c_leaves_nothing(
    to: str, name: str, more: dict[str, Any], at: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a model under its final name, or gigabytes of it under another."""
    monkeypatch.setattr(module.Progress, "update", interrupted(at, stop))
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / name, to, **more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "name", "more"), TARGETS)
def test_a_kill_leaves_nothing_that_looks_finished(
    to: str, name: str, more: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut or the kernel's memory killer, and a model that opens and talks nonsense."""
    child = os.fork()
    if not child:
        monkeypatch.setattr(module.Progress, "update", interrupted(12, kill))
        convert(model, tmp_path / name, to, **more)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / name).exists()
    assert all(left.name.startswith(".") for left in tmp_path.iterdir())
    assert list(tmp_path.iterdir()), "it was killed before it began"
    convert(model, tmp_path / name, to, **more)  # sweeps what was left
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, *(["out.puna.json"] * (to == "llama2.c"))])
    assert open_model(tmp_path / name).problems() == []


def test_llama2c_is_a_way_out_and_in(model: Path, tmp_path: Path) -> None:
    """A format that the verb takes and loses weights in."""
    stored, again = open_model(model), open_model(convert(model, tmp_path / "m.bin", "llama2.c"))
    assert all(torch.equal(again.weights[n].read(), w.read().float()) for n, w in stored.weights.items())


def test_what_is_written_can_be_opened(model: Path, tmp_path: Path) -> None:
    """A GGUF without its suffix was "no model here", and a folder that ends in .gguf "is a directory"."""
    file = convert(model, tmp_path / "Llama-3.2", "gguf")
    assert open_model(file).format == "gguf"
    assert load_tokenizer(file).fingerprint == open_model(file).read_tokenizer().fingerprint
    assert open_model(convert(model, tmp_path / "my-model")).format == "hf", "what any other name is"
    folder = convert(model, tmp_path / "hf", "hf").rename(tmp_path / "hf.gguf")
    assert open_model(folder).format == "hf"


def refused(model: Path, target: Path | str, to: str | None, **more: Any) -> PunaError:
    with pytest.raises(PunaError) as told:
        convert(model, target, to, **more)
    return told.value


def test_what_cannot_be_is_told_before_the_first_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that is ignored, or an hour of writing that ends in an error known from the start."""
    (tmp_path / "there").mkdir()
    new = tmp_path / "new"
    cases = [
        (refused(model, tmp_path / "there", "hf"), UsageError, "exists already"),
        (refused(model, tmp_path / "new.pth", None), UsageError, "the name of a file"),
        (refused(model, new, "ggfu"), UsageError, "did you mean `gguf`?"),
        (refused(model, new, "hf", shards=2), UsageError, "--shards means nothing for hf"),
        (refused(model, tmp_path / "new.gguf", None, dtype="bf16"), UsageError, "--dtype means nothing for gguf"),
        (refused(model, new, "meta", kind="F16"), UsageError, "--kind is of gguf and llama2.c"),
        (refused(model, "", "hf"), UsageError, "no name to write to"),
        (refused(model, tmp_path / "new.safetensors", "hf"), UsageError, "the name of a file"),
        (refused(model, new, "hf", dtype="bf61"), UsageError, "`bf61` is not a dtype"),
        (refused(model, new, "gguf", kind="Q9"), UsageError, "Q9"),
        (refused(model, tmp_path / "new.bin", "llama2.c", kind="v3"), UsageError, "no version of llama2.c"),
        (refused(model, new, "meta", shards=3), UsageError, "cut into 3 shards"),
        (refused(model, tmp_path / "new.gguf", "hf"), UsageError, "new.gguf is no name for hf"),
        (refused(model, tmp_path / "new.bin", "meta"), UsageError, "new.bin is no name for meta"),
        (refused(model, tmp_path / "new.bin", "gguf"), UsageError, "new.bin is no name for gguf"),
        (refused(model, new, "llama2.c"), UsageError, "try: new.bin"),
        (refused(tmp_path / "there", new, "hf"), CheckpointError, "no model here"),
    ]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    cases.append((refused(model, new, "hf"), ResourceError, "the disk has 0.00 GB free"))
    for error, kind, part in cases:
        assert isinstance(error, kind), str(error)
        assert part in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_weights_that_do_not_fit_are_told_before_the_first_byte(model: Path, tmp_path: Path) -> None:
    """A checkpoint of parts of two models, converted into one that is whole to look at."""
    broken = shutil.copytree(model, tmp_path / "broken")
    params = json.loads((broken / "params.json").read_text())
    (broken / "params.json").write_text(json.dumps({**params, "ffn_dim_multiplier": 2.0}))
    assert "does not fit its config" in str(refused(broken, tmp_path / "new", "hf"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("to", "name", "more"), TARGETS[:3])
def test_more_ids_than_rows_are_refused(to: str, name: str, more: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """A token without a row: converted to Meta and back in silence, and `verify` found both the same."""
    grown = Path(shutil.copytree(model, tmp_path / "grown"))
    Tokenizer(model).with_tokens(["<|tool|>"]).save(grown)
    error = refused(grown, tmp_path / name, to, **more)
    assert "601 token ids over 600 rows of embedding" in str(error)
    assert inspect(grown)["tokenizer does not fit"] == "601 token ids over 600 rows of embedding"


def test_a_tokenizer_model_alone_is_a_tokenizer(assets: Path, tmp_path: Path) -> None:
    """Older repositories of Llama 1 and 2 have no tokenizer.json; a model without either is told what is missing."""
    config = GENERATIONS["2"].model_copy(update={"vocab_size": 32000, "n_layers": 1})
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    meta = publish(tmp_path / "meta", state, config, 1, by_rows=False)
    shutil.copy(assets / "tokenizers/llama2/tokenizer.model", meta)
    folder = convert(meta, tmp_path / "hf", "hf")
    for json_file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / json_file).unlink()
    assert open_model(folder).read_tokenizer().encode("Hello world") == [15043, 3186]
    (folder / "tokenizer.model").unlink()
    assert "put its tokenizer.json or tokenizer.model there" in str(refused(folder, tmp_path / "new", "meta"))


def test_old_weights_of_hugging_face_are_read_as_data(model: Path, tmp_path: Path) -> None:
    """A directory with nothing but pytorch_model.bin, which the library it is for no longer likes to open."""
    folder = convert(model, tmp_path / "hf", "hf")
    stored = open_model(folder)
    state = {(n if n == "lm_head.weight" else f"model.{n}"): w.read() for n, w in stored.weights.items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = open_model(folder)
    assert again.problems() == []
    originals = {name: state[name if name == "lm_head.weight" else f"model.{name}"] for name in stored.weights}
    assert all(torch.equal(again.weights[name].read(), tensor) for name, tensor in originals.items())


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_weight_that_fp16_cannot_hold_is_named(to: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """1e5 is infinite in fp16: a model of NaN, written with exit code 0, where GGUF refuses the same weight."""
    model = build(GENERATIONS["2"])
    model.layers[1].mlp.up_proj.weight.data[5, 7] = 1e5
    llama = Llama(model, Tokenizer(tokenizer_folder), tmp_path, [])
    llama.save(tmp_path / "wide", "fp32")
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj\.weight: .*float16"):
        convert(tmp_path / "wide", tmp_path / "narrow", to, dtype="fp16")
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj\.weight: .*float16"):
        llama.save(tmp_path / "narrow", "fp16")  # as puna merge does
    assert not (tmp_path / "narrow").exists()
    assert open_model(convert(tmp_path / "wide", tmp_path / "bf16", to, dtype="bf16")).storage == "BF16"


def test_a_tokenizer_without_bos_is_none_the_worse(model: Path, tmp_path: Path) -> None:
    """`"bos_token": null` is legal and common; all weights were written before it was refused, and nothing was said."""
    folder = shutil.copytree(model, tmp_path / "meta")
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text())
    settings.write_text(json.dumps({**named, "bos_token": None}))
    hf = convert(folder, tmp_path / "hf", "hf")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((hf / name).read_text())["bos_token_id"] is None
    assert inspect(hf)["tokenizer"].startswith("600 ids, no BOS, EOS ")
    llama = load(convert(hf, tmp_path / "m.gguf"), dtype="fp32", device="cpu")
    assert llama.encode("a llama") == llama.tokenizer.encode("a llama")
    settings.write_text(json.dumps({**named, "eos_token": None}))
    written: list[str] = []
    (tmp_path / "new").mkdir()
    with pytest.raises(DataError, match="eos_token is None"):
        write_model_directory(open_model(folder), tmp_path / "new", None, {}, written.append)
    assert not written


def test_the_space_of_a_llama2c_file_is_its_size(tokenizer_folder: Path, tmp_path: Path) -> None:
    """int8 groups of 4 need 2 bytes a weight; 1.125 were asked for, and the disk was full in the middle."""
    config = GENERATIONS["2"].model_copy(update={"dim": 60, "n_heads": 2, "n_kv_heads": 2, "head_dim": 30})
    Llama(build(config), Tokenizer(tokenizer_folder), tmp_path, []).save(tmp_path / "m", "fp32")
    asked = module._size(open_model(tmp_path / "m"), "llama2.c", None, "v2")
    assert asked >= 0.99 * convert(tmp_path / "m", tmp_path / "m.bin", "llama2.c", kind="v2").stat().st_size


@pytest.mark.parametrize(("to", "name", "more"), TARGETS)
def test_owned_weights_belong_to_one_reader(
    to: str, name: str, more: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Tensors that are made when they are read were copied again for the model; one of the file's may not be kept."""
    stored = open_model(convert(model, tmp_path / name, to, **more))
    made = {n for n, w in stored.weights.items() if w.owned}
    assert made == (set(stored.weights) if to != "meta" else {n for n in stored.weights if "norm" not in n})
    for weight in stored.weights.values():
        if weight.owned:
            before = weight.read()
            (mine := weight.read()).zero_()
            assert torch.equal(weight.read(), before)
            assert mine.data_ptr() != before.data_ptr()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_quantized_matrix_is_never_held_whole(
    dtype: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 of the largest matrix and its copy in bf16 took three times what was written; the parts are the whole."""
    source = open_model(convert(model, tmp_path / "m.gguf", kind="Q8_0"))
    wanted = {name: weight.read() for name, weight in source.weights.items()}
    for place in (gguf_file, safetensors_file):
        monkeypatch.setattr(place, "_PART", 4096)
    assert len(list(source.weights["embed_tokens.weight"].parts())) > 3
    whole = Gguf.read

    def read(self: Gguf, name: str) -> Any:
        assert "embd" not in name, "held whole"
        return whole(self, name)

    monkeypatch.setattr(Gguf, "read", read)
    written = open_model(convert(tmp_path / "m.gguf", tmp_path / "out", "hf", dtype=dtype)).weights
    assert all(torch.equal(written[n].read(), tensor.to(DTYPES[dtype])) for n, tensor in wanted.items())


def test_a_folder_is_not_called_like_a_file(model: Path, tmp_path: Path) -> None:
    """`save("m.gguf")` and `merge ADAPTER m.gguf` made folders of that name, which nobody takes for one."""
    for name in ("m.gguf", "m.bin", "m.safetensors"):
        with pytest.raises(UsageError, match="the name of a file") as caught:
            load(model, "fp32", "cpu").save(tmp_path / name)
        assert f"puna convert {tmp_path / 'm'} m.gguf" in caught.value.fix
    (merged,) = puna_forked([["merge", model, "m.gguf"]], tmp_path)
    assert (merged.returncode, "puna convert m m.gguf" in merged.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


def test_the_verb(model: Path, tmp_path: Path) -> None:
    """A command line that says nothing of what went wrong, or prints more than the place of the result."""
    words = [
        ["convert", model, "a", "--to", "hf", "--dtype", "fp32"],
        ["convert", "a", "b.gguf", "--kind", "q8_0"],
        ["convert", "b.gguf", "b.gguf"],
        ["convert", "a", "c", "--to", "meta", "--shards", "3"],
    ]
    first, second, third, fourth = puna_forked(words, tmp_path)
    assert (first.returncode, first.stdout) == (second.returncode, "a\n") == (0, "a\n")
    assert second.stdout == "b.gguf\n"
    assert re.fullmatch(r"wrote a in 0:00: F32, \d\.\d MB, from F16\n", first.stderr)
    assert re.search(r"wrote b.gguf in 0:00: .*Q8_0 x \d+, .* from F32; \d+ tensors rounded\n", second.stderr)
    assert (third.returncode, fourth.returncode) == (2, 2)
    assert "try: --shards 1 or 2 or 4" in fourth.stderr
