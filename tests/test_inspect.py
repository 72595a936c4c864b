"""`puna inspect`: what is told of models, adapters and tokenizers, without a weight being read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import puna_forked
from safetensors.torch import load_file, save_file
from test_lora import GQA, LORA, adapted
from test_model import build

import puna
from puna.checkpoint import inspect as inspect_module
from puna.checkpoint import safetensors_file, torch_file
from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.convert import convert
from puna.checkpoint.gguf.file import Gguf
from puna.checkpoint.inspect import inspect, nearest_presets
from puna.checkpoint.registry import open_model
from puna.checkpoint.stored import Format, Stored
from puna.errors import CheckpointError, DataError
from puna.eval.certificate import quantize
from puna.infer.llama import Llama
from puna.lineage import lineage, parent, write_lineage
from puna.model.config import count_parameters
from puna.model.presets import PRESETS
from puna.recipes import run
from puna.tokenizer.chat.format import bundled
from puna.tokenizer.tokenizer import Tokenizer

CONFIG = GQA.model_copy(update={"vocab_size": 600, "norm_eps": 1e-5})


@pytest.fixture(scope="module")
def saved(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a chat template."""
    folder = tmp_path_factory.mktemp("inspect") / "model"
    files = {**Tokenizer(tokenizer_folder).files, "chat_template.jinja": bundled("llama3").encode()}
    Llama(build(CONFIG), Tokenizer(files), Path("nowhere"), [7]).save(folder, "bf16")
    return folder


def test_a_loaded_model_is_told_in_a_line(saved: Path) -> None:
    """Twenty lines of modules for `print(puna.load(...))`."""
    told = repr(puna.load(saved, "fp32", "cpu"))
    assert told == f"Llama({str(saved)!r}: {count_parameters(CONFIG):,} parameters, float32 on cpu)"


def test_a_model_is_told_without_its_weights(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at 100 GB must not read them."""

    def unread() -> torch.Tensor:
        raise AssertionError("a weight was read")

    def opened(name: Path) -> Stored:
        stored = open_model(name)
        return replace(stored, weights={n: w._replace(read=unread) for n, w in stored.weights.items()})

    monkeypatch.setattr(inspect_module, "open_model", opened)
    told = inspect(saved)
    assert told["parameters"] == count_parameters(CONFIG)
    assert told["config"] == CONFIG.model_dump()
    assert told["rope"] == "theta 10,000, not scaled"
    assert told["weights"] == "BF16 x 21"
    assert told["template"][0].startswith("llama3, ")
    assert told["stops"].endswith("7 " + Tokenizer(saved).token(7))
    assert told["manifest"].startswith("hashes of 8 files, not compared")
    assert told["lineage"] == ["<- nowhere, not on this disk"]


@pytest.mark.parametrize("form", ["hf", "meta", "gguf"])
def test_no_format_reads_a_weight(
    form: Format, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta's has no config that says whether its head is the embedding: both were read and compared."""
    config = CONFIG.model_copy(update={"tie_embeddings": True})
    Llama(build(config), Tokenizer(tokenizer_folder), Path("nowhere"), []).save(tmp_path / "m", "bf16")
    convert(tmp_path / "m", path := tmp_path / ("m.gguf" if form == "gguf" else "other"), form)

    def unread(*_: object) -> torch.Tensor:
        raise AssertionError("a weight was read")

    for place, name in ((safetensors_file, "_read"), (torch_file, "_view"), (Gguf, "raw")):
        monkeypatch.setattr(place, name, unread)
    inspect(path)
    assert count_parameters(open_model(path).config) == count_parameters(config)
    with pytest.raises(AssertionError, match="was read"):
        open_model(path).load(torch.float32, torch.device("cpu"))


def test_a_converted_file_leads_back_to_its_source(saved: Path, tmp_path: Path) -> None:
    """A GGUF is one file: what it was made from lies inside, beside the template."""
    convert(saved, tmp_path / "model.gguf", "gguf", kind="F16")
    told = inspect(tmp_path / "model.gguf")
    assert told["format"] == "gguf"
    assert "F16 x 16" in told["weights"]
    assert told["template"][0].startswith("llama3, ")
    assert told["lineage"] == [f"<- {saved} by save, unchanged", "  <- nowhere, not on this disk"]
    assert told["rope"] == inspect(saved)["rope"]


def test_metas_folder_is_a_model(saved: Path, tmp_path: Path) -> None:
    """puna puts a tokenizer.json beside params.json: seven billion weights were told as a tokenizer."""
    told = inspect(convert(saved, tmp_path / "meta", "meta"))
    assert (told["format"], told["parameters"]) == ("meta", count_parameters(CONFIG))
    assert told["tokenizer"].startswith("600 ids, BOS ")


def test_every_dtype_is_counted(saved: Path, tmp_path: Path) -> None:
    """The first tensor's dtype told for all of them: an fp32 model that calls itself bf16."""
    shutil.copytree(saved, tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed/model.safetensors")
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to(torch.float32 if number % 3 else torch.float16)
    tensors["model.extra.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "mixed/model.safetensors", {"format": "pt"})
    (tmp_path / "mixed/MANIFEST.json").unlink()
    told = inspect(tmp_path / "mixed")
    assert told["weights"] == "F32 x 15, F16 x 7"
    assert told["does not fit its config"] == ["unexpected extra.weight"]
    assert told["manifest"] == "none"


def test_the_nearest_preset() -> None:
    """`llama` names six architectures; one wrong value among ten is what one looks for."""
    for name, preset in PRESETS.items():
        assert name in nearest_presets(preset)[0]
        assert nearest_presets(preset)[1] == []
    assert nearest_presets(PRESETS["llama3.3-70b"])[0] == ["llama3.1-70b", "llama3.3-70b"]
    wrong = PRESETS["llama3.2-1b"].model_copy(
        update={"rope_scaling": PRESETS["llama3.1-8b"].rope_scaling, "vocab_size": 128264}
    )
    assert nearest_presets(wrong) == (
        ["llama3.2-1b"],
        ["vocab_size 128,264 (128,256)", "rope_scaling factor 8 (factor 32)"],
    )


def test_an_adapter_is_told(saved: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """What it belongs to, of which kind, and how much of it there is; one without a tokenizer, too, as PEFT writes."""
    save_adapter(tmp_path, adapted(), LORA.model_copy(update={"rslora": True}), Tokenizer(tokenizer_folder), "base", {})
    told = inspect(tmp_path)
    assert told["adapter of"] == "base"
    assert told["kind"] == "rsLoRA, rank 4, alpha 12"
    assert told["weights"] == "F64 x 28"
    assert told["parameters"] == sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert inspect(tmp_path)["tokenizer"] == "its base's"


def test_the_chain_of_parents(shards: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Which texts a merged model has seen; a parent that was trained again since is another one; a ring must end."""
    small = {"model.dim": 16, "model.n_layers": 1, "model.ffn_dim": 16, "seq_len": 32, "batch_size": 2, "steps": 1}
    run("pretrain", output=tmp_path / "base", data=shards, **{**small, "dtype": "fp32", "samples.prompts": []})
    puna.load(tmp_path / "base").save(tmp_path / "saved")
    told = inspect(tmp_path / "saved")
    assert told["made by"].startswith("save of puna")
    assert told["lineage"] == [
        f"<- {tmp_path / 'base/final'} by pretrain, unchanged",
        f"  <- {shards} by data, unchanged",
        f"    <- {tokenizer_folder} by tokenizer, unchanged",
    ]
    assert inspect(tmp_path / "base")["run"].endswith(f"puna runs show {tmp_path / 'base'}")
    (tmp_path / "base/final/MANIFEST.json").unlink()
    assert inspect(tmp_path / "saved")["lineage"][0].endswith("by pretrain, changed since")
    shutil.rmtree(tmp_path / "base")
    assert inspect(tmp_path / "saved")["lineage"] == [f"<- {tmp_path / 'base/final'}, not on this disk"]
    write_lineage(tmp_path / "saved", lineage("save", [tmp_path / "saved"]))
    assert [line.split("<-")[0] for line in inspect(tmp_path / "saved")["lineage"]] == ["", "  "]


def test_a_hostile_lineage_ends(saved: Path, tmp_path: Path) -> None:
    """Two parents that are the folder itself: 2^20 lines. A name of 300 characters: an OSError. Brackets: a crash."""
    folder = shutil.copytree(saved, tmp_path / "m")
    me, long = str(folder), "x" * 300
    for said, lines in (
        ({"parents": [me, me]}, 4),
        ({"parents": [long, "\0", f"{me}/config.json"]}, 3),
        ({"parents": [{"path": me, "fingerprint": [7]}, {"path": str(tmp_path), "fingerprint": "x"}]}, 4),
        ({"parents": [f"/{i}" for i in range(10_000)]}, 51),
    ):
        (folder / "puna.json").write_text(json.dumps(said))
        assert len(inspect(folder)["lineage"]) == lines
    for text in ("[" * 100_000, json.dumps({"parents": [], "x": "[]" * 2_000_000})):
        (folder / "puna.json").write_text(text)
        assert open_model(folder).lineage == {}


def test_shards_and_tokenizers_are_told_apart(shards: Path, tokenizer_folder: Path) -> None:
    """A folder that is no model is not "no model here" but something with a verb of its own."""
    told = inspect(tokenizer_folder)
    assert told["format"] == "tokenizer"
    assert told["tokenizer"].startswith("600 ids, BOS ")
    with pytest.raises(DataError) as caught:
        inspect(shards)
    assert caught.value.fix == f"puna data stats {shards}"


def test_every_tokenizer_is_told(assets: Path, tmp_path: Path) -> None:
    """`no model here` of a tokenizer.model, of the folder it is in, and of a GGUF that holds a vocabulary alone."""
    places = {
        "tokenizers/llama2/tokenizer.model": "32,000 ids, BOS 1 <s>, EOS 2 </s>",
        "tokenizers/llama3": "128,256 ids, BOS 128000 <|begin_of_text|>",
        "checkpoints/stories260K/tok512.bin": "512 ids, BOS 1 <s>",
        "tokenizers/vectors/ggml-vocab-llama-spm.gguf": "32,000 ids, BOS 1 <s>, EOS 2 </s>",
    }
    for place, told in places.items():
        found = inspect(assets / place)
        assert (found["format"], found["tokenizer"][: len(told)]) == ("tokenizer", told)
    assert inspect(assets / "tokenizers/llama2/tokenizer.model")["ids"]["control"] == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_a_part_of_a_model_leads_to_the_whole(saved: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """`no model here` of a file inside a model, of a packed one, or of a tokenizer that was given to chat."""
    (tmp_path / "m.gguf.gz").write_bytes(b"\x1f\x8b")
    for place, what, fix in (
        (saved / "model.safetensors", "a part of a model", f"the folder it is in: {saved}"),
        (saved / "config.json", "a part of a model", f"the folder it is in: {saved}"),
        (tmp_path / "m.gguf.gz", "a packed file", f"gunzip {tmp_path / 'm.gguf.gz'}"),
        (tokenizer_folder, "a tokenizer, not a model", f"puna inspect {tokenizer_folder}"),
        (tmp_path, "no model here", "puna runs ls"),
    ):
        with pytest.raises(CheckpointError, match=what) as caught:
            open_model(place)
        assert fix in caught.value.fix


def test_registered_models_are_known(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent called smollm2-135m was "not on this disk", and its copy "a Llama of its own"."""
    place = convert(saved, tmp_path / "known.gguf")
    package = inspect_module.REGISTERED["smollm2-135m"][0]
    monkeypatch.setattr(type(package), "find", lambda self: tmp_path)
    monkeypatch.setitem(inspect_module.REGISTERED, "smollm2-135m", (package, "known.gguf"))
    child = shutil.copytree(saved, tmp_path / "child")
    write_lineage(child, lineage("sft", [parent("smollm2-135m", place)]))
    told = inspect(child)
    assert told["lineage"][0] == "<- smollm2-135m, unchanged"
    assert told["architecture"] == "smollm2-135m"
    assert told["parents"] == [parent("smollm2-135m", place)]
    monkeypatch.setattr(type(package), "find", lambda self: None)
    told = inspect(child)
    assert told["lineage"] == ["<- smollm2-135m, not on this disk"]
    assert "no preset is near" in told["architecture"]


def test_what_is_printed(saved: Path, tmp_path: Path) -> None:
    """80 columns, one name a line, and nothing that a terminal obeys: names and templates are a stranger's words."""
    evil = shutil.copytree(saved, tmp_path / "evil")
    (evil / "MANIFEST.json").unlink()
    (evil / "chat_template.jinja").write_text("{{ bos_token }}\x1b[2J\x9b31m\nsecond line\n" + "x" * 500)
    (evil / "puna.json").write_text(json.dumps({"recipe": "\x1b[2J", "parents": ["\x1b]0;owned\x07"]}))
    told, as_json, nowhere, data = puna_forked(
        [["inspect", "evil"], ["inspect", "evil", "--json"], ["inspect", "evli"], ["inspect", "."]], tmp_path
    )
    assert told.returncode == as_json.returncode == 0, told.stderr
    assert not any(character in told.stdout for character in "\x1b\x9b\x07")
    assert max(map(len, told.stdout.splitlines())) <= 80
    assert "\nparameters    " in told.stdout
    found = json.loads(as_json.stdout)
    assert found["parameters"] == count_parameters(CONFIG)
    assert found["config"] == CONFIG.model_dump()
    assert found["tensors"] == {"BF16": 21}
    assert found["bytes"] == {"model.safetensors": (evil / "model.safetensors").stat().st_size}
    assert 7 in found["ids"]["stops"]
    assert not {"shape", "weights", "files", "tokenizer", "control", "stops"} & found.keys()  # sentences, for people
    assert not {"config", "tensors", "bytes", "ids"} & {line.split(" ")[0] for line in told.stdout.splitlines()}
    assert (nowhere.returncode, data.returncode) == (4, 4)
    assert "did you mean `evil`?" in nowhere.stderr


@pytest.mark.parametrize(
    ("scheme", "group", "told"),
    [
        ("int4", 32, ["int8, a scale for each row: lm_head", "int4, a scale for each 32 of a row: Linear"]),
        (
            "int8-int4",
            32,
            ["int8, inputs too, a scale for each row: lm_head", "int8-int4, a scale for each 32 of a row: Linear"],
        ),
        ("int8", None, ["int8, a scale for each row: Linear"]),
        ("nf4", None, ["nf4, a scale for each 64"]),
        ("nf4-double", None, ["nf4-double, a scale of 8 bits for each 64"]),
    ],
)
def test_what_weights_were_rounded_to(
    scheme: str, group: int | None, told: list[str], saved: Path, tmp_path: Path
) -> None:
    """`INT4 x 210` of a directory: by which scheme, in which groups?"""
    wide = build(CONFIG.model_copy(update={"dim": 64, "ffn_dim": 64, "n_heads": 4, "head_dim": 16}))
    model = tmp_path / "wide"
    Llama(wide, Tokenizer(saved), saved, [7]).save(model, "bf16")
    quantize(model, tmp_path / "small", scheme, group=group, text="The llama grazes.")
    assert inspect(tmp_path / "small")["quantized"] == told
    assert "quantized" not in inspect(model)
