"""`puna verify A --against B`: what conversions get wrong, planted one by one, and the row that has to name it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import puna_forked
from test_model import build
from torch import Tensor

import puna
from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.registry import open_model
from puna.checkpoint.rope_layout import to_halves, to_neighbours
from puna.checkpoint.stored import Stored, Weight
from puna.errors import CheckpointError, UsageError
from puna.eval.parity import verify as verify_module
from puna.eval.parity.budget import EIGHT, FEWER, FOUR, ROUNDED, SAME, budget_for, logit_rows, perplexity_row
from puna.eval.parity.material import PROMPTS, TEXT
from puna.eval.parity.observe import Apart, apart, observe
from puna.eval.parity.rows import stops_row, template_row, tokenizer_row
from puna.eval.parity.weights import compare_weights, weights_row
from puna.infer.llama import Llama
from puna.lora import LoraConfig, add_lora, lora_layers, lora_parameters, merge_lora
from puna.model.config import ModelConfig, RopeScaling
from puna.tokenizer.chat.format import bundled
from puna.tokenizer.tokenizer import Tokenizer

SHAPE = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=600, max_seq_len=256,
    rope_theta=1e4, rope_scaling=RopeScaling(factor=8, original_max_seq_len=32), norm_eps=1e-5, tie_embeddings=False,
)  # fmt: skip
ASK: dict[str, Any] = {"prompts": PROMPTS[:2], "text": TEXT[:300], "max_tokens": 4}
LORA = LoraConfig(rank=2, alpha=8, dora=True)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """A Llama 3 tokenizer of 600 ids with its template."""
    files = Tokenizer(tokenizer_folder).files
    return Tokenizer({**files, "chat_template.jinja": bundled("llama3").encode()})


@pytest.fixture(scope="module")
def whole(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a mistake."""
    folder = tmp_path_factory.mktemp("parity") / "whole"
    Llama(build(SHAPE), tokenizer, folder, tokenizer.stop_ids).save(folder, "fp32")
    return folder


def rows_of(a: Path, b: Path, **more: Any) -> dict[str, tuple[bool | None, str]]:
    found = puna.verify(a, against=b, **{**ASK, **more})
    assert found["ok"] is not any(row["ok"] is False for row in found["rows"])
    return {row["name"]: (row["ok"], row["told"]) for row in found["rows"]}


def weights_changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A copy of the model whose tensors `change` has touched."""

    def plant(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return plant


def json_changed(name: str, **values: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        kept = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**kept, **values}))

    return plant


def each(tensors: dict[str, Tensor], end: str, change: Callable[[Tensor], Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(end)]:
        tensors[name] = change(tensors[name]).contiguous()


def text_changed(name: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return plant


def moved_up(folder: Path) -> None:
    """Every id of the vocabulary one higher, the last one first."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    tree["model"]["vocab"] = {token: (i + 1) % len(vocabulary) for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def head_lost(folder: Path) -> None:
    weights_changed(lambda t: t.pop("lm_head.weight"))(folder)
    json_changed("config.json", tie_word_embeddings=True)(folder)


SCALING = {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
# a mistake: (how it is made, the rows that must be BAD, what they must say)
FAULTS: dict[str, tuple[Callable[[Path], None], dict[str, str]]] = {
    "q and k in Meta's order": (
        weights_changed(lambda t: [each(t, f"{x}_proj.weight", lambda w: to_neighbours(w, 8)) for x in "qk"]),
        {"weights": "q_proj of B has RoPE's rows in Meta's order (2 tensors)", "logits": "at most"},
    ),
    "turned twice": (
        weights_changed(lambda t: each(t, "q_proj.weight", lambda w: to_halves(w, 8))),
        {"weights": "q_proj of A has RoPE's rows in Meta's order", "logits": "max difference"},
    ),
    "k turned by n_heads": (
        weights_changed(lambda t: each(t, "k_proj.weight", lambda w: to_halves(to_neighbours(w, 8), 4))),
        {"weights": "k_proj of B turned with n_heads instead of n_kv_heads", "logits": ""},
    ),
    "factor 32 for 8": (
        json_changed("config.json", rope_scaling=SCALING), {"config": "rope_scaling factor A 8.0, B 32.0"},
    ),
    "scaling lost": (json_changed("config.json", rope_scaling=None), {"config": "rope_scaling A factor 8.0, B None"}),
    "eps": (json_changed("config.json", rms_norm_eps=1e-6), {"config": "norm_eps A 1e-05, B 1e-06"}),
    "head lost, tied to the embedding": (
        head_lost,
        {"weights": "only A has lm_head.weight, and it is not the embedding", "logits": ""},
    ),
    "embedding shifted by a row": (
        weights_changed(lambda t: each(t, "embed_tokens.weight", lambda w: w.roll(1, 0))),
        {"weights": "embed_tokens of B is shifted by one row", "logits": ""},
    ),
    "vocabulary shifted by one": (moved_up, {"tokenizer": "0 of 21 strings alike"}),
    "BOS twice": (
        text_changed("chat_template.jinja", "{{- bos_token", "{{- bos_token + bos_token"),
        {"template": "B begins with BOS twice", "greedy": "asked with other ids"},
    ),
    "a template of another family": (
        lambda folder: (folder / "chat_template.jinja").write_text(bundled("chatml")) and None,
        {"template": "0 of 3 conversations alike; conversation 1: token 0 is '<|begin_of_text|>' in A"},
    ),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), {"template": "only A has one"}),
    "a norm forgotten": (
        weights_changed(lambda t: each(t, "1.input_layernorm.weight", torch.ones_like)),
        {"weights": "furthest apart: layers.1.input_layernorm.weight by", "logits": ""},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_classical_mistake_is_named(fault: str, whole: Path, tmp_path: Path) -> None:
    """A converted model that answers fluently and is another model; "they differ" alone helps nobody."""
    shutil.copytree(whole, tmp_path / "copy")
    plant, expected = FAULTS[fault]
    plant(tmp_path / "copy")
    rows = rows_of(whole, tmp_path / "copy")
    for name, told in expected.items():
        assert rows[name][0] is False, rows
        assert told in rows[name][1]


def test_a_copy_is_the_same(whole: Path, tmp_path: Path) -> None:
    """A comparison that is never content is switched off."""
    shutil.copytree(whole, tmp_path / "copy")
    found = puna.verify(whole, against=tmp_path / "copy", **ASK)
    assert found["ok"] is True
    assert found["measured"]["max_logit"] == 0
    assert found["measured"]["same_answers"] == 2
    assert found["budget"]["kind"] == "the same weights"


def test_a_head_that_is_stored_twice_is_no_loss(whole: Path, tmp_path: Path) -> None:
    """Meta stores a tied head, Hugging Face does not."""
    for name, tied in (("twice", False), ("once", True)):
        shutil.copytree(whole, tmp_path / name)
        weights_changed(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path / name)
        json_changed("config.json", tie_word_embeddings=tied)(tmp_path / name)
    rows = rows_of(tmp_path / "twice", tmp_path / "once")
    assert rows["config"] == (None, "tie_embeddings A False, B True")
    assert rows["weights"] == (True, "20 tensors, equal bit for bit")
    assert rows["logits"][0] is True


def test_a_lost_stop_id_is_named(tokenizer: Tokenizer) -> None:
    """A model that goes on talking after its turn."""
    eot, eos = tokenizer.special_tokens["<|eot_id|>"], tokenizer.eos_id
    row = stops_row([eos, eot], [eos], tokenizer)
    assert (row.ok, row.told) == (False, f"{eos} <|end_of_text|>; only A: {eot} <|eot_id|>")
    assert stops_row([eos, eot], [eot, eos, eos], tokenizer).ok
    assert stops_row([eos], [eot], tokenizer).told == f"only A: {eos} <|end_of_text|>; only B: {eot} <|eot_id|>"


def test_adapters_merged_once_never_and_twice(whole: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The base served in the adapter's name, and the adapter added into a model that holds it already."""
    made = puna.load(whole, "fp32")
    add_lora(made.model, LORA)
    for name, parameter in lora_parameters(made.model).items():
        if "lora_A" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, made.model, LORA, tokenizer, str(whole), {})
    once, twice = (puna.load(adapter, "fp32") for _ in range(2))
    bases = {name: layer.base.weight.detach().clone() for name, layer in lora_layers(twice.model).items()}
    for each_one in (once, twice):
        merge_lora(each_one.model)
    once.save(tmp_path / "once", "fp32")
    once.save(tmp_path / "rounded", "bf16")
    with torch.no_grad():
        for name, base in bases.items():
            weight = twice.model.get_submodule(name).weight
            weight += weight - base
    twice.save(tmp_path / "twice", "fp32")
    rows = rows_of(adapter, tmp_path / "once")
    assert rows["weights"] == (True, "the adapter is in them 1.00 times, expected 1")
    assert all(ok is not False for ok, _ in rows.values())
    wrong = {
        whole: "0.00 times, expected 1: it was not merged",
        tmp_path / "twice": "2.00 times, expected 1: it was merged twice",
    }
    for name, told in wrong.items():
        rows = rows_of(adapter, name)
        assert rows["weights"] == (False, f"the adapter is in them {told}")
        assert rows["logits"][0] is False
    rows = rows_of(tmp_path / "rounded", adapter)
    assert rows["weights"][0] is True
    assert "at most 0.005" in rows["KL"][1]
    assert rows["logits"][0] is None


def test_an_adapter_against_what_it_does_not_fit(whole: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A matrix product that fails, or a missing name, is no answer; neither is "nan times" of an untrained adapter."""
    made = puna.load(whole, "fp32")
    add_lora(made.model, LORA)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", made.model, LORA, tokenizer, str(whole), {})
    for name, change in {"wide": {"ffn_dim": 96}, "short": {"n_layers": 1}}.items():
        other = build(SHAPE.model_copy(update=change))
        Llama(other, tokenizer, tmp_path, tokenizer.stop_ids).save(tmp_path / name, "fp32")
        ok, told = rows_of(tmp_path / "adapter", tmp_path / name)["weights"]
        assert ok is False
        assert {"wide": "layers.0.mlp", "short": "layers.1."}[name] in told
    rows = rows_of(tmp_path / "adapter", whole)
    assert rows["weights"] == (None, "the adapter changes nothing")
    assert all(ok is not False for ok, _ in rows.values())


def test_a_model_without_bos(whole: Path, tmp_path: Path) -> None:
    """Not every vocabulary has one: "bos_token is None, which has no id" where nobody asked for it."""
    shutil.copytree(whole, tmp_path / "bare")
    tree = json.loads((whole / "tokenizer.json").read_text())
    (tmp_path / "bare/tokenizer.json").write_text(json.dumps({**tree, "post_processor": None}))
    (tmp_path / "bare/tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    (tmp_path / "bare/chat_template.jinja").unlink()
    bare = puna.load(tmp_path / "bare", "fp32")
    assert bare.encode("a") == bare.tokenizer.encode("a")
    assert isinstance(bare.generate("a", max_tokens=2), str)
    bare.save(tmp_path / "again", "fp32")
    rows = rows_of(tmp_path / "bare", tmp_path / "again")
    assert all(ok is not False for ok, _ in rows.values()), rows
    assert "BOS None" in rows["tokenizer"][1]


def quantized(stored: Stored, bits: int) -> Stored:
    """As a GGUF of so many bits would be read."""
    kind = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}[bits]

    def read(weight: Weight) -> Tensor:
        raw = gguf.quants.quantize(weight.read().numpy().copy(), kind)
        return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(raw, kind)))

    large = {n: w for n, w in stored.weights.items() if len(w.shape) == 2}
    made = {**stored.weights, **{n: w._replace(read=partial(read, w), quantized=True) for n, w in large.items()}}
    return replace(stored, weights=made, storage=f"Q{bits}_0 x 9, F32 x 5", format="gguf")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_models_are_judged_by_what_they_say(
    bits: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of 4 bits differ by whole units and nothing is wrong; a permuted one must not hide behind that."""
    shutil.copytree(whole, tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "wrong")
    shutil.copytree(whole, tmp_path / "norms")
    FAULTS["q and k in Meta's order"][0](tmp_path / "wrong")
    weights_changed(lambda t: each(t, "input_layernorm.weight", lambda w: w * 1.02))(tmp_path / "norms")

    def opened(name: Path) -> Stored:
        return open_model(name) if name == whole else quantized(open_model(name), bits)

    def loaded(name: Path, dtype: str, device: str) -> Llama:
        stored = opened(name)
        return Llama(
            stored.load(torch.float32, torch.device("cpu")), stored.read_tokenizer(), name, list(stored.stop_ids)
        )

    monkeypatch.setattr(verify_module, "open_model", opened)
    monkeypatch.setattr(verify_module, "load", loaded)
    rows = rows_of(whole, tmp_path / "copy")
    assert f"at most {(EIGHT if bits == 8 else FOUR).kl:g}" in rows["KL"][1]
    assert (rows["logits"][0], rows["KL"][0], rows["greedy"][0]) == (None, True, None)
    assert rows["weights"][0] is None
    rows = rows_of(whole, tmp_path / "wrong")
    assert rows["weights"][0] is False
    assert "Meta's order" in rows["weights"][1]
    assert rows["KL"][0] is (bits == 4)  # of a tiny random model 4 bits hide it: the row above is what decides
    rows = rows_of(whole, tmp_path / "norms")  # norms are stored as they are: no bits excuse them
    assert rows["weights"][0] is False
    assert "input_layernorm.weight by 0.02 of its length" in rows["weights"][1]


def test_the_budget_depends_on_what_is_compared() -> None:
    """One number for all is either blind to a wrong eps or never met by four bits."""
    mixed, eight = "Q4_K x 192, Q6_K x 20, F32 x 61", "Q8_0 x 210, F32 x 61"
    cases = {
        (("F32", "F32"), 0.3): SAME,
        (("BF16", "F32"), 0.0): SAME,
        (("BF16", "F32"), 0.002): ROUNDED,
        (("BF16", "F16"), None): ROUNDED,
        ((mixed, "BF16"), 0.0014): ROUNDED,
        (("BF16", eight), 0.005): EIGHT,
        (("F16", mixed), 0.06): FOUR,
        (("BF16", "Q2_K x 3, Q8_0 x 1"), 0.3): FEWER,
        (("IQ3_XXS x 4", mixed), 0.3): FEWER,
    }
    for (storages, gap), expected in cases.items():
        assert budget_for(storages, gap, "fp32") == expected, storages
    assert budget_for(("BF16", "BF16"), 0.0, "bf16").logits == 0.25


def test_what_is_not_a_number_is_not_within_a_budget(whole: Path) -> None:
    """NaN compares false with everything: `difference > budget` lets a model of NaN pass."""
    nan = float("nan")
    rows = logit_rows(Apart(nan, nan, nan, nan, nan, (0, 0, 0)), SAME._replace(kl=1.0), "x")
    assert [row.ok for row in rows if row.ok is not None] == [False, False]
    assert perplexity_row((2.0, nan), (1.0, nan), SAME).ok is False
    for budget in (-1.0, nan):  # within which nothing can be
        with pytest.raises(UsageError, match="no difference"):
            puna.verify(whole, against=whole, budget=budget)
    llama = puna.load(whole, "fp32")
    first = observe(llama, PROMPTS[:2], 3, limit=100)
    second = first._replace(logits=[first.logits[0], first.logits[1].clone()])
    second.logits[1][4, 7] = nan
    found = apart(first, second)
    assert found.max_logit != found.max_logit
    assert found.where[:2] == (1, 4)


def test_differences_equal_the_formulas(whole: Path) -> None:
    """KL the other way round, a mean over padding, or a place that is off by one."""
    llama = puna.load(whole, "fp32")
    first = observe(llama, PROMPTS[:3], 3, limit=100)
    noise = torch.Generator().manual_seed(0)
    second = first._replace(logits=[x + 0.1 * torch.randn(x.shape, generator=noise) for x in first.logits])
    found = apart(first, second)
    a, b = torch.cat(first.logits).double(), torch.cat(second.logits).double()
    assert found.max_logit == pytest.approx((a - b).abs().max().item())
    assert found.mean_logit == pytest.approx((a - b).abs().mean().item())
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert found.mean_kl == pytest.approx(kl.mean().item())
    assert found.max_kl == pytest.approx(kl.max().item())
    both = zip(first.logits, second.logits, strict=True)
    gaps = [(x.double().log_softmax(-1) - y.double().log_softmax(-1)).abs() for x, y in both]
    prompt, position, id = found.where
    assert gaps[prompt][position, id].item() == found.max_logprob == max(gap.max().item() for gap in gaps)


def test_models_of_two_families_are_refused(whole: Path, texts: Path, tmp_path: Path) -> None:
    """Numbers of ids that mean nothing to one another are worse than none."""
    from puna.recipes import run

    run("tokenizer", output=tmp_path / "spm", kind="sentencepiece", vocab_size=400, **{"sources.path": texts})
    other = Tokenizer(tmp_path / "spm")
    model = build(SHAPE.model_copy(update={"vocab_size": other.vocab_size}))
    Llama(model, other, tmp_path, other.stop_ids).save(tmp_path / "llama2", "fp32")
    with pytest.raises(CheckpointError, match="no string has the same ids"):
        puna.verify(whole, against=tmp_path / "llama2", **ASK)


def test_rows_of_tokenizers_that_differ_in_little(tokenizer: Tokenizer) -> None:
    """One control token more is worth a word and no alarm; one string that splits otherwise is an alarm."""
    assert tokenizer_row(tokenizer, tokenizer).ok is True
    tree = json.loads(tokenizer.files["tokenizer.json"])
    tree["added_tokens"] += [{**tree["added_tokens"][-1], "id": 600, "content": "<|extra|>"}]
    row = tokenizer_row(tokenizer, Tokenizer({**tokenizer.files, "tokenizer.json": json.dumps(tree).encode()}))
    assert row.ok is None
    assert "A 600 ids, B 601" in row.told
    assert "of one alone: <|extra|>" in row.told
    assert template_row(tokenizer, tokenizer).told == "3 of 3 conversations alike"


def test_shapes_that_differ_are_told(whole: Path) -> None:
    """A traceback from a subtraction instead of the tensor's name."""
    stored = open_model(whole)
    name = "layers.0.mlp.up_proj.weight"
    short = replace(stored, weights={**stored.weights, name: Weight((3, 3), torch.float32, lambda: torch.ones(3, 3))})
    found = compare_weights(stored, short)
    assert found.worst == float("inf")
    assert f"{name} is (64, 32) in A, (3, 3) in B" in found.told


@pytest.mark.parametrize("place", [0, -1])
def test_a_tensor_that_is_not_a_number_is_named(place: int, whole: Path) -> None:
    """NaN in an embedding's unused row: the logits do not show it, and any later tensor covered it."""
    stored = open_model(whole)
    name = list(stored.weights)[place]
    broken = stored.weights[name].read().clone()
    broken.view(-1)[0] = float("nan")
    weights = {**stored.weights, name: stored.weights[name]._replace(read=lambda: broken)}
    noisy = {n: w._replace(read=lambda w=w: w.read() * 1.001) for n, w in weights.items()}
    for changed in (weights, noisy):
        found = compare_weights(stored, replace(stored, weights=changed))
        assert weights_row(found, ("F16", "BF16")).ok is False
        assert f"{name} by nan" in "; ".join(found.told)


def test_verify_against_on_the_command_line(whole: Path, tmp_path: Path) -> None:
    """Exit codes a script can tell apart; 80 columns; words that say what was judged, and by what.

    "They say the same" stood under 0 of 8 answers alike, and `+0.10% (at most 0.01)` beside each other.
    """
    shutil.copytree(whole, tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "eps")
    FAULTS["eps"][0](tmp_path / "eps")
    (tmp_path / "ask.txt").write_text("How many llamas?\n\nAnd stars?\n")
    (tmp_path / "empty.txt").write_text("")
    common = ["verify", whole, "--against"]
    calls = [
        [*common, "copy", "--max-tokens", "2", "--prompts", "ask.txt"],
        [*common, "eps", "--max-tokens", "2", "--prompts", "ask.txt", "--json"],
        [*common, "eps", "--prompts", "ask.txt", "--text", "ask.txt", "--max-tokens", "2", "--budget", "0"],
        [*common, "nowhere"],
        [*common, "copy", "--prompts", "empty.txt"],
        ["verify", whole, "--budget", "1"],
    ]
    same, eps, budget, nowhere, empty, alone = puna_forked(calls, tmp_path)
    assert [d.returncode for d in (same, eps, budget, nowhere, empty, alone)] == [0, 5, 5, 4, 3, 2], eps.stderr
    assert max(map(len, same.stdout.splitlines())) <= 80
    assert same.stdout.endswith("\n\nwithin the budget for the same weights\n--: worth knowing, not judged\n")
    assert "+0.00% (at most 0.1%)" in " ".join(same.stdout.split())
    found = json.loads(eps.stdout)
    assert found["ok"] is False
    assert found["measured"]["prompts"] == 2
    assert {"name": "config", "ok": False, "told": "norm_eps A 1e-05, B 1e-06"} in found["rows"]
    assert "they differ: config, logits; beyond the budget for logits, as asked" in budget.stdout
    assert "nothing to compare it with" in alone.stderr


def test_small_contexts_are_enough(whole: Path, tmp_path: Path) -> None:
    """A tiny model whose context ends before its template does."""
    json_changed("config.json", max_position_embeddings=20)(Path(shutil.copytree(whole, tmp_path / "short")))
    rows = rows_of(whole, tmp_path / "short")
    assert rows["config"] == (None, "max_seq_len A 256, B 20")
    assert rows["logits"][0] is True
