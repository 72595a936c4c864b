"""Every way to tune a model, through the recipe: what is trained, by what it is divided, what a kill leaves.

A method is its words in a config. Whatever else it is, these hold for it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from method_ranks import Prepared, first_step, gradients, prepare
from test_crash import Killer, assert_same, killer  # noqa: F401 (a fixture)
from test_model import build

from puna.checkpoint.model_directory import save_model
from puna.data.packing import PackedLoader
from puna.dist.launch import launch
from puna.model.config import ModelConfig
from puna.tokenizer.tokenizer import Tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "full": {"lora": None},
    "lora": {"lora.rank": 3},
    "dora": {"lora.rank": 3, "lora.dora": True},
    "qlora": {"lora.rank": 3, "quantize": "nf4", "model": "TEACHER"},  # blocks of 64
    "qat": {"lora": None, "qat.group": 32},
    "qat, untied": {"lora": None, "qat.group": 32, "model": "TEACHER"},
    "qat+lora": {"lora.rank": 3, "qat.group": 32},
    "kd": {"lora": None, "distill.teacher": "TEACHER", "distill.divergence": "symmetric"},
    "kd+lora": {"lora.rank": 3, "distill.teacher": "TEACHER", "distill.temperature": 2.0},
}
SHAPE = ModelConfig(
    dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=600, max_seq_len=128,
    rope_theta=10000.0, rope_scaling=None, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
WORDS = {
    "template": "llama3", "seq_len": 144, "batch_size": 2, "steps": 4, "dtype": "fp64", "valid_fraction": 0,
    "save_dtype": "fp32", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student` and `teacher`, of different sizes, with random weights and one tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), Tokenizer(tokenizer_folder)
    larger = SHAPE.model_copy(update={"dim": 64, "n_heads": 4, "vocab_size": 608, "tie_embeddings": False})
    for name, shape, seed in (("student", SHAPE, 0), ("teacher", larger, 1)):
        (folder / name).mkdir()
        save_model(folder / name, build(shape, seed=seed), tokenizer, "fp32", {})
    return folder


def conversations(file: Path, last: str = "12", answer: str = "llamas") -> Path:
    """Twenty of them, with answers of very different lengths; the user has the last word."""
    rows = []
    for i in range(20):
        said = f"{2 * i} {answer}." if i % 4 else f"There are {2 * i} {answer} in the puna, and they graze."
        told = (("user", f"How many are {i} and {i}?"), ("assistant", said), ("user", f"And {last}?"))
        rows.append({"messages": [{"role": role, "content": text} for role, text in told]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def words_of(method: str, models: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    own = {k: str(models / "teacher") if v == "TEACHER" else v for k, v in METHODS[method].items()}
    return {**WORDS, "model": str(models / "student"), "data.path": str(data), "output": str(output), **own, **more}


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def prepared(method: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """What the recipe hands to `fit`, in fp64 throughout, after adapters have moved."""
    folder = tmp_path_factory.mktemp("prepared")
    found = prepare(words_of(method, models, conversations(folder / "rows.jsonl"), folder / "run"))
    return moved(found)


def moved(prepared: Prepared) -> Prepared:
    """B of an adapter starts at zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in prepared.model.double().named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return prepared


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], near: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= near * gradient.norm(), name
    assert any(gradient.norm() > 0 for gradient in theirs.values())


def test_only_the_assistants_words_are_trained(prepared: Prepared, models: Path) -> None:
    """A gradient from a prompt's label, or none from the end of an answer, and the loss falls as nicely."""
    model, tokenizer = prepared.model, Tokenizer(models / "student")
    begin = tokenizer.encode("<|start_header_id|>assistant<|end_header_id|>\n\n", special=True)
    end = tokenizer.special_tokens["<|eot_id|>"]
    batch = prepared.batches.batch(prepared.batches.packs[:3])
    expected = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    for row, ids in enumerate(batch.tokens.tolist()):
        inside = False
        for place in range(len(ids) - 1):
            inside = inside or ids[place + 1 - len(begin) : place + 1] == begin
            expected[row, place] = inside  # what comes after `place` is the answer's
            inside = inside and ids[place + 1] != end
    hidden: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda module, given, out: (out.retain_grad(), hidden.append(out))[0])
    prepared.objective(model, batch).sum.backward()
    hook.remove()
    model.zero_grad()
    assert hidden[0].grad is not None
    assert torch.equal(hidden[0].grad.abs().amax(-1) > 0, expected)
    assert batch.n == int(expected.sum())
    assert torch.equal(batch.labels[expected], batch.tokens.roll(-1, 1)[expected])


def test_a_prompts_words_are_no_labels(method: str, models: Path, tmp_path: Path) -> None:
    """What the user says last is seen by no trained word, so only as a label could it move a gradient."""
    found = []
    for number, told in enumerate([{}, {"last": "34"}, {"answer": "alpaca"}]):
        data = conversations(tmp_path / f"{number}.jsonl", **told)
        each = moved(prepare(words_of(method, models, data, tmp_path / f"run{number}")))
        found.append((each.batches, gradients(each, [next(each.batches), next(each.batches)])[1]))
    (rows, ours), (other, same), (_, different) = found
    assert [len(row.ids) for row in rows.rows] == [len(row.ids) for row in other.rows]
    assert rows.fingerprint != other.fingerprint
    assert all(torch.equal(same[name], gradient) for name, gradient in ours.items())
    assert not all(torch.equal(different[name], gradient) for name, gradient in ours.items())


def test_micro_batches_are_one_batch(prepared: Prepared) -> None:
    """Means of means: four micro-batches with unequal numbers of trained words weigh each word differently."""
    packs = prepared.batches.packs[:4]
    apart = [prepared.batches.batch([pack]) for pack in packs]
    assert len({batch.n for batch in apart}) > 1
    (row, ours), (whole, theirs) = gradients(prepared, apart), gradients(prepared, [prepared.batches.batch(packs)])
    assert_near(ours, theirs, 1e-10)
    assert {k: v for k, v in row.items() if k != "grad_norm"} == pytest.approx(
        {k: v for k, v in whole.items() if k != "grad_norm"}, rel=1e-10
    )


def test_packed_rows_are_rows_alone(prepared: Prepared) -> None:
    """A neighbour in the row that is seen, or positions that go on from it."""
    loader = prepared.batches
    packs = [pack for pack in loader.packs if len(pack) > 1][:3]
    longest = max(len(loader.rows[i].ids) for pack in packs for i in pack)
    alone = PackedLoader(loader.rows, longest, 2, loader.pad_id, seed=0)
    single = [alone.batch([[i]]) for pack in packs for i in pack]
    assert len(single) > len(packs) > 0
    (row, ours), (other, theirs) = gradients(prepared, [loader.batch(packs)]), gradients(prepared, single)
    assert_near(ours, theirs, 1e-10)
    assert row["loss"] == pytest.approx(other["loss"], rel=1e-10)


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first step of every method on two ranks, and the rows it was made on."""
    folder = tmp_path_factory.mktemp("ranks")
    data = conversations(folder / "rows.jsonl")
    words = {name: words_of(name, models, data, folder) for name in METHODS}
    script = Path(__file__).with_name("method_ranks.py")
    assert launch(2, [sys.executable, str(script), str(folder), json.dumps(words)]) == 0
    return folder


def test_two_ranks_are_one(method: str, models: Path, two_ranks: Path, tmp_path: Path) -> None:
    """Ranks with unequal numbers of trained words, an adapter or a teacher in parts: an average of averages."""
    words = words_of(method, models, two_ranks / "rows.jsonl", tmp_path / "run")
    first_step(words, tmp_path / "one.pt")
    ours, theirs = (torch.load(file, weights_only=True) for file in (two_ranks / f"{method}.pt", tmp_path / "one.pt"))
    assert_near(ours, theirs, 1e-6)  # parameters are fp32, and so are their gradients


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="events are named by /proc/self/fd")
def test_killed_it_goes_on(method: str, models: Path, killer: Killer, tmp_path: Path) -> None:  # noqa: F811
    """Before anything is saved, and after the first checkpoint: the same bits in the end."""
    data = conversations(tmp_path / "rows.jsonl")
    more = {
        "dtype": "fp32", "valid_fraction": 0.2, "train.accumulate": 2, "train.save_every": 2, "train.keep": 9,
        "train.evaluate_every": 2,
    }  # fmt: skip

    def sft(folder: Path, at: str | None) -> int:
        folder.mkdir(exist_ok=True)
        words = words_of(method, models, data, folder / "run", **more)
        typed = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in words.items()]
        done = killer.run(folder, "run", "sft", *typed, at=at)
        assert done["code"] in (0, -9), done["said"]
        return done["code"]

    places = "run/checkpoints"
    assert sft(tmp_path / "straight", None) == 0
    for at, saved in ((f"rename {places}/~step-N {places}/step-N", 0), (f"fsynced {places}", 1)):
        assert sft(tmp_path / "killed", at) == -9
        assert len([*(tmp_path / "killed" / places).glob("step-*")]) == saved
    assert sft(tmp_path / "killed", None) == 0
    assert_same(tmp_path / "killed/run", tmp_path / "straight/run")
