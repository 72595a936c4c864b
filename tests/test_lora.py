"""LoRA against PEFT, packed rows against single ones, and adapters through both libraries."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from test_model import BASE, build, reference

from puna.checkpoint.adapter import load_adapter, save_adapter
from puna.checkpoint.names import from_disk_name
from puna.data.conversations import Conversation, to_messages
from puna.data.packing import PackedLoader, encode_conversations, pack
from puna.errors import CheckpointError, DataError, UsageError
from puna.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer
from puna.ops.attention import Documents, attention, attention_eager
from puna.ops.cross_entropy import IGNORE
from puna.tokenizer.chat.format import ChatFormat, Encoded
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.fit import build_optimizer, train_step
from puna.train.objectives import next_token
from puna.train.optim import OptimizerConfig

GQA = ModelConfig(**{**BASE, "n_kv_heads": 2})
LORA = LoraConfig(
    rank=4, alpha=12, targets=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "k_proj"]
)


def adapted(seed: int = 3) -> Transformer:
    """A model with adapters that do something: B is not zero."""
    model = build(GQA, torch.float64)
    add_lora(model, LORA, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model).items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def rows(count: int = 9, longest: int = 14) -> list[Encoded]:
    """Encoded rows of many lengths, each with its second half trained."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        length = 4 + (5 * i) % (longest - 3)
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        out.append(Encoded(ids, [k >= length // 2 for k in range(length)]))
    return out


def test_steps_equal_pefts(exact_norm: None) -> None:
    """Twenty AdamW steps from the same adapters: a wrong scale or a forgotten target drifts apart at once."""
    model = adapted()
    theirs = peft.get_peft_model(
        reference(build(GQA, torch.float64)),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=LORA.targets, task_type="CAUSAL_LM"),
    )
    train_beside_peft(model, theirs, 20)


@pytest.mark.parametrize("tied", [False, True])
def test_full_steps_equal_transformers(tied: bool, exact_norm: None) -> None:
    """Twenty AdamW steps of every weight: a wrong epsilon, beta or denominator drifts apart at once."""
    model = build(GQA.model_copy(update={"tie_embeddings": tied}), torch.float64)
    train_beside_peft(model, reference(model), 20)


def train_beside_peft(model: Transformer, theirs: torch.nn.Module, steps: int) -> None:
    """AdamW steps of both from the same weights: losses and everything that is trained stay within 1e-9."""
    named = {
        from_disk_name(n.replace(".default", "").removeprefix("base_model.model.").replace(".modules_to_save", "")): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    named = {n.replace("magnitude_vector.weight", "magnitude_vector"): p for n, p in named.items()}
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(ours) == set(named)
    with torch.no_grad():
        for name, parameter in ours.items():
            named[name].copy_(parameter)
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.0)
    optimizer = build_optimizer(model, settings)
    their_optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, betas=settings.betas, weight_decay=0
    )
    loader = PackedLoader(rows(), 16, 2, pad_id=0, seed=0)
    for _ in range(steps):
        batch = loader.batch([[i] for i in range(4)])
        row = train_step(model, optimizer, [batch], next_token, 1e-2, 0, lambda loss, norm: True)
        logits = theirs(batch.tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-9)
    for name, parameter in ours.items():
        assert (named[name] - parameter).abs().max() < 1e-9, name


def test_merged_equals_unmerged() -> None:
    """An adapter that is served merged must be the model that was trained."""
    model = adapted().eval()
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    before = model(tokens)
    merge_lora(model)
    assert (model(tokens) - before).abs().max() < 1e-9
    assert not lora_parameters(model)
    assert set(dict(model.named_parameters())) == set(dict(build(GQA).named_parameters()))


def test_nothing_changes_before_the_first_step() -> None:
    """B starts at zero; only adapters are trained."""
    plain, model = build(GQA, torch.float64), build(GQA, torch.float64)
    add_lora(model, LORA, dtype=torch.float64)
    tokens = torch.arange(20)[None]
    assert torch.equal(plain(tokens), model(tokens))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))
    with pytest.raises(UsageError, match="q_proj"):
        add_lora(build(GQA), LoraConfig(targets=["q_prj"]))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # it looks for the base model on the hub
def test_adapters_travel_both_ways(exact_norm: None, tokenizer_folder: Path, tmp_path: Path) -> None:
    """PEFT opens ours with equal logits, we open PEFT's."""
    model = adapted().eval()
    tokens = torch.arange(30)[None]
    expected = model(tokens)
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", model, LORA, Tokenizer(tokenizer_folder), "base", {})
    theirs = peft.PeftModel.from_pretrained(reference(build(GQA, torch.float64)), str(tmp_path / "ours"))
    assert (theirs(tokens).logits - expected).abs().max() < 1e-9
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = build(GQA, torch.float64)
    load_adapter(again, tmp_path / "theirs", torch.float64)
    assert torch.equal(again.eval()(tokens), expected)


def test_foreign_adapters_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A DoRA loaded as a LoRA, or half of the tensors, answers something else without a word."""
    save_adapter(tmp_path, adapted(), LORA, Tokenizer(tokenizer_folder), "base", {})
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    for change in (
        '"alora_invocation_tokens": [1]',
        '"init_lora_weights": "pissa"',  # which changed the base, too
        '"bias_": 0, "bias": "all"',
    ):
        config.write_text(text.replace('"bias": "none"', change))
        with pytest.raises(CheckpointError, match="not supported"):
            load_adapter(build(GQA), tmp_path)
    wrong = {
        '"r": 4': ('"r": 1000000000000', r"lora_A.weight is \(4, 32\), the base needs \(1000000000000, 32\)"),
        '"lora_alpha": 12.0': ('"lora_alpha": NaN', "values that cannot be"),
        '"use_dora": false': ('"use_dora": true', r"missing layers\.0\.mlp\.down_proj\.lora_magnitude_vector"),
        '"rank_pattern": {}': ('"rank_pattern": {"(a*)*": 8}', "not a simple pattern"),
        '"modules_to_save": null': ('"modules_to_save": ["lm_head"]', r"missing lm_head\.weight"),
        '"alpha_pattern": {}': ('"alpha_pattern": {"q_proj": 1e999}', "values that cannot be"),
    }
    for old, (new, message) in wrong.items():
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            load_adapter(build(GQA), tmp_path)
    config.write_text(text.replace('"o_proj",', ""))
    with pytest.raises(CheckpointError, match=r"unexpected layers\.0\.self_attn\.o_proj"):
        load_adapter(build(GQA), tmp_path)


def gradients(batches: list) -> dict[str, torch.Tensor]:
    model, kept = adapted(), {}
    optimizer = build_optimizer(model, OptimizerConfig())
    ours = lora_parameters(model)
    optimizer.register_step_pre_hook(lambda *_: kept.update({n: p.grad.clone() for n, p in ours.items()}))
    train_step(model, optimizer, batches, next_token, 1e-3, 0, lambda loss, norm: True)
    return kept


def test_packed_equals_unpacked() -> None:
    """A text that sees its neighbour in the pack, or keeps its positions, learns something else."""
    loader = PackedLoader(rows(), 32, 1, pad_id=0, seed=0)
    assert len(loader.packs) < 9
    packed = gradients([loader.batch(loader.packs)])
    single = gradients([loader.batch([[i]]) for i in range(9)])
    for name, gradient in single.items():
        assert (packed[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_document_attention_equals_the_dense_oracle() -> None:
    """Spans are what the CPU path loops over; a border off by one mixes two texts."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 12, 8, generator=generator, dtype=torch.float64)
    documents = Documents(((0, 0, 5), (0, 5, 12), (1, 0, 9)))
    fast, oracle = attention(q, k, v, documents), attention_eager(q, k, v, documents)
    assert torch.allclose(fast[0], oracle[0], atol=1e-12)
    assert torch.allclose(fast[1, :, :9], oracle[1, :, :9], atol=1e-12)
    assert torch.isfinite(fast).all()


@pytest.mark.parametrize("seq_len", [14, 20, 64])
def test_packs_hold_every_row_once_and_fit(seq_len: int) -> None:
    """A row lost by the packer is data paid for and never seen."""
    lengths = [len(r.ids) for r in rows(200)]
    packs = pack(lengths, seq_len)
    assert sorted(i for p in packs for i in p) == list(range(200))
    assert all(sum(lengths[i] for i in p) <= seq_len for p in packs)
    assert len(packs) <= 1.1 * sum(lengths) / seq_len + 1 or seq_len == 14


def test_the_loader_goes_on_exactly() -> None:
    """The position of packed rows is two integers, across epochs; changed rows are refused."""

    def loader() -> PackedLoader:
        return PackedLoader(rows(40), 24, 3, pad_id=0, seed=1)

    straight = loader()
    expected = [next(straight).tokens for _ in range(20)]
    for stop in (1, 6, 11):
        first, second = loader(), loader()
        for _ in range(stop):
            next(first)
        second.load_state_dict(first.state_dict())
        assert all(torch.equal(next(second).tokens, t) for t in expected[stop:])
    with pytest.raises(DataError, match="changed"):
        PackedLoader(rows(39), 24, 3, pad_id=0, seed=1).load_state_dict(straight.state_dict())


ROWS = {
    "openai": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "prompt": {"prompt": "a", "completion": "b"},
    "question": {"question": "a", "answer": "b"},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_shape_of_row(name: str) -> None:
    """The same conversation, whatever its keys."""
    assert to_messages(ROWS[name], "x:1") == ROWS["openai"]["messages"]


def test_rows_that_teach_nothing_are_errors(tokenizer_folder: Path) -> None:
    """A loss of 0.0 over masked labels looks like success."""
    chat = ChatFormat(Tokenizer(tokenizer_folder), "llama3")
    user, answer = {"role": "user", "content": "word " * 30}, {"role": "assistant", "content": "yes"}
    for messages, why in (
        ([user], "no assistant"),
        ([user, answer], "beyond seq_len"),
        ([user, {**answer, "train": False}], "no assistant"),
    ):
        with pytest.raises(DataError, match=why) as error:
            encode_conversations([Conversation("rows.jsonl:7", messages)], chat, 24, "all")
        assert error.value.where == "rows.jsonl:7"
    (row,) = encode_conversations(
        [Conversation("x", [{"role": "user", "content": "a"}, {**answer, "content": "yes " * 199}])], chat, 150, "all"
    )
    assert len(row.ids) == 150
    assert row.trained[-1]
    with pytest.raises(DataError, match=r"found: text"):
        to_messages({"text": "x"}, "rows.jsonl:1")
