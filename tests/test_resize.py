"""More tokens and more rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import puna
from puna.errors import UsageError
from puna.infer.llama import Llama
from puna.infer.native import use_native
from puna.lora import LoraConfig, add_lora
from puna.model.config import ModelConfig
from puna.model.init import build_model, init_weights, materialize
from puna.model.resize import resize_embeddings
from puna.model.transformer import Transformer
from puna.quant.quantize import quantize_model
from puna.tokenizer.tokenizer import Tokenizer


def model_of(shape: ModelConfig, rows: int, tied: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    model = build_model(shape.model_copy(update={"vocab_size": rows, "tie_embeddings": tied}))
    materialize(model, torch.device("cpu"), dtype)
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean(shape: ModelConfig, tied: bool) -> None:
    """Random new rows outshine trained ones; a head left behind has no row for the new tokens; a tie must hold."""
    model = model_of(shape, 300, tied, torch.bfloat16)
    larger = resize_embeddings(model, 304)
    assert (larger.lm_head.weight is larger.embed_tokens.weight) == tied
    for old, new in ((model.embed_tokens, larger.embed_tokens), (model.lm_head, larger.lm_head)):
        assert torch.equal(new.weight[:300], old.weight)
        mean = old.weight.detach().double().mean(0)
        assert torch.allclose(new.weight[300:].double(), mean.expand(4, -1), atol=float(mean.abs().max()) / 128)
        assert new.weight.dtype == torch.bfloat16
    assert larger.config.vocab_size == 304
    assert model.config.vocab_size == len(model.embed_tokens.weight) == 300


def test_padding_rows_are_new(shape: ModelConfig) -> None:
    """Embeddings are often padded beyond the vocabulary with rows nobody trained."""
    model = model_of(shape, 300, True)
    with torch.no_grad():
        model.embed_tokens.weight[290:] = 1e6
    padded = resize_embeddings(model, 300, known=290).embed_tokens.weight
    assert torch.equal(padded[290], padded[299])
    assert padded.abs().max() < 10
    assert len(resize_embeddings(model, 200).embed_tokens.weight) == 200
    with pytest.raises(UsageError, match="vocab_size=0"):
        resize_embeddings(model, 0)


def test_what_has_no_rows_to_add_to(shape: ModelConfig) -> None:
    """A quantized model was said to carry an adapter; a head that only computes faster was refused as well."""
    config = shape.model_copy(update={"vocab_size": 64})
    model = model_of(config, 64, False)
    use_native(model)
    assert len(resize_embeddings(model, 66).lm_head.weight) == 66
    adapted = model_of(config, 64, False)
    add_lora(adapted, LoraConfig(targets=["lm_head"]))
    with pytest.raises(UsageError, match="adapter"):
        resize_embeddings(adapted, 66)
    quantize_model(model, "int8")
    with pytest.raises(UsageError, match=r"quantized[^\n]*\n.*packed=False") as told:
        resize_embeddings(model, 66)
    assert "adapter" not in str(told.value)


def test_an_added_token_lives(shape: ModelConfig, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Added, saved, opened by transformers: one id, no other id moved, and the old logits unchanged."""
    tokenizer = Tokenizer(tokenizer_folder)
    llama = Llama(model_of(shape, tokenizer.vocab_size, True).eval(), tokenizer, tmp_path, tokenizer.stop_ids)
    larger = llama.add_tokens(["<|tool|>", "<|end_tool|>"])
    size = tokenizer.vocab_size
    assert larger.tokenizer.special_tokens["<|end_tool|>"] == size + 1 == larger.model.config.vocab_size - 1
    assert larger.encode("a<|tool|>", special=True)[-1] == size
    assert larger.tokenizer.encode("a<|tool|> b") == tokenizer.encode("a<|tool|> b")
    assert larger.tokenizer.decode([size]) == ""
    assert larger.tokenizer.decode([size], special=True) == "<|tool|>"
    ids = [llama.encode("the llamas graze")]
    assert torch.equal(larger.logits(ids)[..., :size], llama.logits(ids))
    larger.save(tmp_path / "m", dtype="fp32")
    again = puna.load(tmp_path / "m", dtype="fp32")
    assert torch.equal(again.logits(ids), larger.logits(ids))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "m"))
    assert theirs("<|end_tool|>", add_special_tokens=False).input_ids == [size + 1]
    for word in (["<|tool|>"], ["<|eot_id|>"], ["a"], ["x1", "x1"]):
        with pytest.raises(UsageError, match="added"):
            larger.add_tokens(word)
    # one that ends a turn is a stop, and those that generation_config.json had stay
    chatty = replace(llama, stop_ids=[*llama.stop_ids, 5]).add_tokens(["<|im_end|>"])
    assert sorted(chatty.stop_ids) == sorted([*llama.stop_ids, 5, size])
    assert larger.add_tokens(["llama graze"], special=False).tokenizer.encode("a llama graze")[-1] == size + 2
