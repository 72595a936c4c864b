"""Every kind of tuning by its certificate: trained = saved and loaded = merged = opened by PEFT and transformers."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import BASE, build
from torch import Tensor

from puna.checkpoint.adapter import load_adapter, save_adapter
from puna.errors import CheckpointError, DataError, UsageError
from puna.eval.parity.verify import verify
from puna.infer.engine import Engine
from puna.infer.llama import Llama, load
from puna.infer.merge import merge
from puna.lora import LoraConfig, add_lora, whole_parameters
from puna.model.config import ModelConfig
from puna.ops.packed_layers import packed_layers
from puna.quant.quantize import unpack_layers
from puna.recipes import sft
from puna.tokenizer.tokenizer import Tokenizer
from puna.tune.model import check_tuned, load_tuned, saver, tuned_tokenizer

TOKENS = torch.randint(0, 600, (2, 30), generator=torch.Generator().manual_seed(1))
SHAPE = {**BASE, "dim": 64, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 128, "vocab_size": 600}
WHOLE = {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
NEW = {"new_tokens": ["<|plan|>", "<|check|>"], "lora": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4}},
    "rslora": {"lora": {"rank": 4, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"]}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "qlora": {"lora": {"rank": 4}, "quantize": "nf4"},
    "qdora": {"lora": {"rank": 4, "dora": True}, "quantize": "nf4"},
    "qlora int8": {"lora": {"rank": 4, "targets": ["up_proj"]}, "quantize": "int8"},
    "qlora int4": {"lora": {"rank": 4, "targets": ["q_proj"]}, "quantize": "int4"},
    "whole": {"lora": WHOLE},
    "new tokens": NEW,
    "qlora, new tokens": {**NEW, "quantize": "nf4"},
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build(ModelConfig(**{**SHAPE, "tie_embeddings": request.param == "tied"}))
    folder = tmp_path_factory.mktemp(request.param) / "base"
    Llama(model, Tokenizer(tokenizer_folder), folder, []).save(folder, "fp32")
    return folder


def tuned(base: Path, **words: Any) -> tuple[sft.Config, Llama]:
    """A model made ready as the recipe does it, with everything that would be trained moved by something."""
    config = sft.Config(model=str(base), dtype="fp32", **words)
    llama = load_tuned(config, {})
    generator = torch.Generator().manual_seed(5)
    for parameter in llama.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return config, llama


def logits(llama: Llama) -> Tensor:
    """Of rows in which the last ids, new ones among them, are read as well."""
    with torch.inference_mode():
        return llama.model.eval()(tokens(llama.model.config.vocab_size))


def tokens(rows: int) -> Tensor:
    return torch.cat((TOKENS, torch.tensor([[rows - 1], [rows - 2]])), 1)


def apart(one: Tensor, two: Tensor) -> float:
    return (one - two).abs().max().item()


def pefts(base: Path, adapter: Path, rows: int, quantize: str | None, scratch: Path) -> torch.nn.Module:
    """The adapter by PEFT on transformers' model: of QLoRA on the base it was trained on, dequantized."""
    if quantize:
        llama = load(base, "fp32", quantize=quantize)
        unpack_layers(llama.model)
        llama.save(base := scratch / "dequantized", "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if theirs.config.vocab_size != rows:
        theirs.resize_token_embeddings(rows)
    return peft.PeftModel.from_pretrained(theirs, str(adapter)).eval()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_trained_is_loaded_is_merged_is_exported(kind: str, base: Path, tmp_path: Path) -> None:
    """A layer that was trained and not saved, a base that was another one, two matrices where one was tied."""
    config, llama = tuned(base, **KINDS[kind])
    (folder := tmp_path / "adapter").mkdir()
    saver(config, llama)(folder, lineage={})
    trained, rows = logits(llama), llama.model.config.vocab_size
    assert apart(trained[:, :30, :600], logits(load(base, "fp32"))[:, :30]) > 1e-2
    loaded = load(folder, "fp32")
    assert torch.equal(logits(loaded), trained)
    assert loaded.tokenizer.same_ids(tuned_tokenizer(config))
    assert bool(packed_layers(loaded.model)) == bool(config.quantize)
    theirs = pefts(base, folder, rows, config.quantize, tmp_path)
    with torch.inference_mode():
        assert apart(theirs(tokens(rows)).logits, trained) < 1e-4
    merge(folder).save(tmp_path / "merged", "fp32")
    assert apart(logits(load(tmp_path / "merged", "fp32")), trained) < 1e-4
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert plain.config.tie_word_embeddings == llama.model.config.tie_embeddings
    with torch.inference_mode():
        assert apart(plain(tokens(rows)).logits, trained) < 1e-4
    found = verify(folder, against=tmp_path / "merged", prompts=["llamas", "stars"], max_tokens=4)
    assert found["ok"], found["rows"]
    if config.quantize:
        assert apart(logits(merge(folder, onto="original")), trained) > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("ensured", [True, False])
def test_pefts_whole_modules_are_read(ensured: bool, base: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """PEFT unties what it trains: two matrices for a tied model, of which one would be lost without a word."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tied = theirs.config.tie_word_embeddings
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"],
            init_lora_weights=False, ensure_weight_tying=ensured, task_type="CAUSAL_LM",
        ),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = load(base, "fp32").model
    if tied and not ensured:
        with pytest.raises(CheckpointError, match="two matrices"):
            load_adapter(model, tmp_path / "theirs")
        return
    load_adapter(model, tmp_path / "theirs")
    assert apart(model.eval()(TOKENS), theirs(TOKENS).logits) < 1e-4
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def test_what_is_trained_whole_stays_tied_and_alone(base: Path) -> None:
    """A head that is untied by a cast, or norms that are thawed because one was named."""
    _, llama = tuned(base, lora={"rank": 2, "modules_to_save": ["lm_head", "model.norm"]})
    model = llama.model
    tied = model.config.tie_embeddings
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    names = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert names == {"embed_tokens.weight" if tied else "lm_head.weight", "norm.weight"}
    norms = whole_parameters(model, LoraConfig(modules_to_save=["norm"]))
    assert len(norms) == 5


def test_several_adapters_by_their_weights(base: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """W + 0.7 (W_1 - W) + 0.3 (W_2 - W), with DoRA, and with a norm that one of them trained whole."""
    settings = {"one": {"rank": 4, "dora": True}, "two": {"rank": 2, "modules_to_save": ["model.norm"]}}
    weights: dict[str, dict[str, Tensor]] = {}
    for name, lora in settings.items():
        config, llama = tuned(base, lora=lora)
        (tmp_path / name).mkdir()
        saver(config, llama)(tmp_path / name, lineage={})
        weights[name] = dict(merge(tmp_path / name).model.named_parameters())
    both = merge([tmp_path / "one", tmp_path / "two"], [0.7, 0.3]).model
    plain = dict(load(base, "fp32").model.named_parameters())
    for name, found in both.named_parameters():
        one, two, zero = weights["one"][name], weights["two"][name], plain[name]
        assert apart(found, zero + 0.7 * (one - zero) + 0.3 * (two - zero)) < 1e-5, name
    assert all(torch.equal(p, plain[n]) for n, p in merge(tmp_path / "one", [0.0]).model.named_parameters())
    with pytest.raises(UsageError, match="2 adapters and 1 weights"):
        merge([tmp_path / "one", tmp_path / "two"], [0.7])
    config, llama = tuned(base, **{**NEW, "new_tokens": ["<|other|>"]})
    (tmp_path / "three").mkdir()
    saver(config, llama)(tmp_path / "three", lineage={})
    with pytest.raises(UsageError, match="another vocabulary"):
        merge([tmp_path / "one", tmp_path / "three"])


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "frozen weights": ({"lora": None, "quantize": "nf4"}, UsageError, "without lora"),
    "frozen rows": ({"new_tokens": ["<|plan|>"]}, UsageError, "nothing would be learned"),
    "no such layer": ({"lora": {"modules_to_save": ["embed_token"]}}, UsageError, "did you mean `embed_tokens`"),
    "packed": (
        {"quantize": "nf4", "lora": {"targets": ["k_proj"], "modules_to_save": ["q_proj"]}},
        UsageError,
        "q_proj is quantized",
    ),
    "twice": ({"lora": {"modules_to_save": ["q_proj"]}}, UsageError, "among lora.targets"),
    "old token": ({**NEW, "new_tokens": ["<|eot_id|>", "<|eot_id|>"]}, UsageError, "cannot be added"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, base: Path) -> None:
    """Rows that nothing trains, or weights that nothing can, seen after an hour of it."""
    words, kind, told = REFUSED[case]
    config = sft.Config(model=str(base), dtype="fp32", **words)
    with pytest.raises(kind, match=told):
        begin(config)


def begin(config: sft.Config) -> Tokenizer:
    check_tuned(config)
    return tuned_tokenizer(config)


def test_an_adapter_on_an_adapter_is_told_what_to_type(base: Path, tmp_path: Path) -> None:
    """Trained on, its own base would be forgotten."""
    config, llama = tuned(base, lora={"rank": 2})
    saver(config, llama)(tmp_path, lineage={})
    with pytest.raises(DataError, match="adapter itself") as caught:
        check_tuned(sft.Config(model=str(tmp_path)))
    assert f"puna merge {tmp_path} FOLDER" in str(caught.value.fix)


def test_whole_modules_are_not_told_apart_by_request(base: Path, tmp_path: Path) -> None:
    """One embedding for all rows of a step: texts of the base alone would be read by another's."""
    config, llama = tuned(base, lora=WHOLE)
    saver(config, llama)(tmp_path, lineage={})
    with pytest.raises(UsageError, match="modules_to_save"):
        Engine(load(base, "fp32").model, adapters={"it": tmp_path})


def test_rows_that_peft_saves_unasked_are_read(base: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """An embedding that was given rows lies in PEFT's file, and nowhere in its config."""
    config, llama = tuned(base, **NEW)
    saver(config, llama)(tmp_path, lineage={})
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": None}))
    assert torch.equal(logits(load(tmp_path, "fp32")), logits(llama))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if llama.model.config.tie_embeddings:
        with pytest.raises(CheckpointError, match="two matrices"):
            load(tmp_path, "fp32")


def test_saved_by_hand_and_opened(base: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """In bf16 what was trained whole in fp32 computes as it did: it was rounded at every step there, too."""
    model, lora = load(base, "bf16").model, LoraConfig(rank=2, modules_to_save=["embed_tokens", "norm"])
    add_lora(model, lora)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(tmp_path, model, lora, Tokenizer(tokenizer_folder), str(base), {})
    with torch.inference_mode():
        expected, again = model.eval()(TOKENS), load(tmp_path, "bf16").model
        assert torch.equal(again(TOKENS), expected)
    assert again.norm.weight.dtype == torch.bfloat16
