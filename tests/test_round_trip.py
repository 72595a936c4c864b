"""Meta -> Hugging Face -> GGUF -> Hugging Face -> Meta: every weight, every logit and every id comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from test_meta import CPU, GENERATIONS, LLAMA3, TINY, metas_logits, publish, random_state, tokens
from torch import Tensor

from puna.checkpoint.convert import convert
from puna.checkpoint.gguf.file import open_gguf
from puna.checkpoint.registry import open_model
from puna.model.config import ModelConfig
from puna.tokenizer.tokenizer import Tokenizer


def chain(start: Path, folder: Path, shards: int) -> list[Path]:
    """Every stop of the way, the start included."""
    stops = [start]
    for name, to, more in (
        ("hf", "hf", {}),
        ("m.gguf", None, {"kind": "F16"}),
        ("hf2", "hf", {}),
        ("meta2", "meta", {"shards": shards}),
    ):
        stops.append(convert(stops[-1], folder / name, to, **more))
    return stops


def weights(path: Path) -> dict[str, Tensor]:
    return {name: weight.read().double() for name, weight in open_model(path).weights.items()}


@pytest.mark.usefixtures("exact_norm")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_all_the_way_and_back(generation: str, shards: int, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Trained is not exported: an order of rows, a factor or a tie that is lost between two formats."""
    config = GENERATIONS[generation]
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    start = publish(tmp_path / "meta", state, config, shards, by_rows=True)
    Tokenizer(tokenizer_folder).save(start)
    stops = chain(start, tmp_path, shards)
    first = weights(start)
    wanted = metas_logits({n: t.double() for n, t in state.items()}, config, tokens())
    for stop in stops:
        stored = open_model(stop)
        assert stored.config == config, stop.name
        assert stored.read_tokenizer().encode("the llamas graze: 345") == Tokenizer(tokenizer_folder).encode(
            "the llamas graze: 345"
        )
        assert all(torch.equal(tensor, first[name]) for name, tensor in weights(stop).items()), stop.name
        assert (stored.load(torch.float64, CPU)(tokens()) - wanted).abs().max() < 1e-9, stop.name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf2", dtype=torch.float64).eval()
    assert (theirs(tokens()).logits - wanted).abs().max() < 1e-9
    last = [torch.load(f, weights_only=True) for f in sorted(stops[-1].glob("*.pth"))]
    for number, part in enumerate(last):
        original = torch.load(start / f"consolidated.{number:02}.pth", weights_only=True)
        assert all(torch.equal(tensor.half(), original[name]) for name, tensor in part.items())


def test_every_stop_id_comes_back(tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An answer that goes on past its end: of four ids GGUF kept two and Meta's folder one, without a word."""
    config, stops = GENERATIONS["3"], [2, 7, 8, 9]
    start = publish(tmp_path / "meta", random_state(config), config, 1, by_rows=True)
    Tokenizer(tokenizer_folder).save(start)
    hf = convert(start, tmp_path / "hf0", "hf", dtype="bf16")
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    for stop in chain(hf, tmp_path, 1):
        told = open_model(stop)
        assert {*told.read_tokenizer().stop_ids, *told.stop_ids} >= {*stops}, stop.name
    for told in ("[2, 7, 8, 9]: GGUF has names for three", "[2, 7, 8, 9]: Meta's format has no place"):
        assert told in caplog.text


def test_names_of_stop_ids_that_are_free_are_used(tmp_path: Path, tokenizer_folder: Path) -> None:
    """llama.cpp stops at EOS, EOT and EOM; the third of three ids was lost to it though EOM had none."""
    config = GENERATIONS["3"]
    start = publish(tmp_path / "meta", random_state(config), config, 1, by_rows=True)
    for name, content in Tokenizer(tokenizer_folder).files.items():
        (start / name).write_bytes(content.replace(b"<|eot_id|>", b"<|1|>").replace(b"<|eom_id|>", b"<|2|>"))
    (start / "puna.json").write_text(json.dumps({"stop_ids": [7, 8, 9]}))
    file = convert(start, tmp_path / "m.gguf")
    metadata = open_gguf(file).metadata
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eot", "eom")] == [7, 8]
    assert {7, 8, 9} <= {*open_model(file).stop_ids}


def with_tokenizer(folder: Path, values: dict[str, Any], vocab_size: int, by_rows: bool, model: bytes) -> Path:
    """A layer in two shards with a published tokenizer.model."""
    config = ModelConfig(**{**values, "n_layers": 1, "vocab_size": vocab_size})
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    publish(folder, state, config, 2, by_rows=by_rows)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


def test_llama_2s_tokenizer_comes_back(assets: Path, tmp_path: Path) -> None:
    """A tokenizer.model that is lost, or another one, after a way through formats that do not have it."""
    model = (assets / "tokenizers/llama2/tokenizer.model").read_bytes()
    stops = chain(with_tokenizer(tmp_path / "meta", TINY, 32000, False, model), tmp_path, 2)
    ours, theirs = (
        sentencepiece.SentencePieceProcessor(model_proto=raw)
        for raw in ((stops[-1] / "tokenizer.model").read_bytes(), model)
    )
    pieces = [[(p.id_to_piece(i), p.get_score(i)) for i in range(32000)] for p in (ours, theirs)]
    assert pieces[0] == pieces[1]
    text = "It's 12345678 日本語 🦙\n"
    ids = [open_model(stop).read_tokenizer().encode(text) for stop in stops]
    assert ids == [theirs.encode(text)] * len(ids)
    parts = [torch.load(stop / "consolidated.01.pth", weights_only=True) for stop in (stops[0], stops[-1])]
    assert torch.equal(parts[0]["tok_embeddings.weight"], parts[1]["tok_embeddings.weight"])  # cut by columns


def test_llama_3s_tokenizer_comes_back(assets: Path, tmp_path: Path) -> None:
    """Ranks that are written anew from tokenizer.json, and differ; the embedding cut along Llama 2's axis."""
    model = (assets / "tokenizers/llama3/tokenizer.model").read_bytes()
    start = with_tokenizer(tmp_path / "meta", LLAMA3, 128256, True, model)
    again = convert(start, tmp_path / "again", "meta", shards=2)
    assert (again / "tokenizer.model").read_bytes() == model
    parts = [torch.load(stop / "consolidated.01.pth", weights_only=True) for stop in (start, again)]
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items() if name != "rope.freqs")


def test_lineage_names_every_parent(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A model that nobody can tell where it came from."""
    config = GENERATIONS["3"]
    start = publish(tmp_path / "meta", random_state(config), config, 1, by_rows=True)
    Tokenizer(tokenizer_folder).save(start)
    folder = convert(start, tmp_path / "hf", "hf", dtype="bf16")
    made = json.loads((folder / "puna.json").read_text())
    assert (made["recipe"], made["source"], made["parents"][0]["path"]) == ("convert", "meta", str(start))
    assert made["parents"][0]["fingerprint"]
    assert {w.dtype for w in open_model(folder).weights.values()} == {torch.bfloat16}
    back = open_model(convert(folder, tmp_path / "m.gguf"))
    assert back.lineage["parents"][0]["path"] == str(folder)
