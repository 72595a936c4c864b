"""The planner: each of its numbers against what training really holds and computes."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import puna
from puna.checkpoint.model_directory import save_model
from puna.data.loader import Batch
from puna.errors import ResourceError, UsageError
from puna.log import log
from puna.model.config import ModelConfig
from puna.model.init import build_model, init_weights, materialize
from puna.planner import memory, plan, time
from puna.planner.activations import cast_by_block, kept_by_block
from puna.planner.change import cheapest, typed
from puna.planner.memory import fullest, moments
from puna.planner.work import Work, know, work_of
from puna.recipes import load, run
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.fit import train_step
from puna.train.objectives import next_token
from puna.train.optim import build_optimizer
from puna.tune.model import load_tuned

FULL: dict[str, Any] = {"lora": None}
LORA: dict[str, Any] = {}
QLORA = {"quantize": "nf4"}


@pytest.fixture(scope="session")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths are whole blocks of NF4."""
    tokenizer = Tokenizer(tokenizer_folder)
    shape = ModelConfig(
        dim=128, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=192, vocab_size=tokenizer.vocab_size,
        max_seq_len=512, rope_theta=1e4, rope_scaling=None, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    made = build_model(shape)
    materialize(made, torch.device("cpu"))
    init_weights(made, 0)
    folder = tmp_path_factory.mktemp("planned") / "model"
    folder.mkdir()
    save_model(folder, made, tokenizer, "bf16", {})
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    said = [{"role": "user", "content": "where is the grass"}, {"role": "assistant", "content": "under the snow"}]
    path.write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(40)), encoding="utf-8")
    return path


@pytest.fixture
def planned(model: Path) -> Callable[..., tuple[Any, Work]]:
    """(config, work) of an sft config whose rows are one text each, all of it trained."""

    def of(**words: Any) -> tuple[Any, Work]:
        given = {"model": str(model), "dtype": "bf16", "device": "cpu", "seq_len": 64, "batch_size": 2, **words}
        config = load("sft", None, given)
        return config, work_of(config, know(config, 1))

    return of


def batch(work: Work) -> Batch:
    tokens = torch.randint(0, work.known.shape.vocab_size, (work.rows, work.asked["seq_len"]))
    return Batch(tokens, tokens, tokens.numel())


@pytest.mark.parametrize(
    "words",
    [
        FULL, LORA, {**FULL, "dtype": "fp32"}, {"lora.targets": "[q_proj, v_proj]"}, {"lora.dropout": 0.1},
        {"lora.dora": True}, QLORA, {"seq_len": 256},
    ],
    ids=["full", "lora", "fp32", "q and v", "dropout", "dora", "qlora", "longer"],
)  # fmt: skip
def test_activations_are_what_autograd_saves(planned: Any, words: dict[str, Any]) -> None:
    """A formula that forgets a tensor, or counts one that an op does not keep, is gigabytes off in a large model."""
    config, work = planned(**_yaml(words))
    tuned = load_tuned(config, {}).model.train()
    held = {p.untyped_storage().data_ptr() for p in [*tuned.parameters(), *tuned.buffers()]}

    def kept(layers: int) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        shortened = tuned.layers[:layers]
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            tuned_layers, tuned.layers = tuned.layers, shortened
            try:
                alive = tuned(batch(work).tokens, head=False)
            finally:
                tuned.layers = tuned_layers
        assert alive.requires_grad
        return sum(saved.values())

    predicted = work.tokens * sum(kept_by_block(work).values()) + cast_by_block(work)
    assert kept(3) - kept(2) == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("words", [FULL, LORA, QLORA, {"quantize": "int8"}, {"lora.modules_to_save": "[embed_tokens]"}])
def test_weights_are_what_a_model_holds(planned: Any, words: dict[str, Any]) -> None:
    """A base counted in the dtype of its file, or an adapter in bf16, is a plan of another run."""
    config, work = planned(**_yaml(words))
    tuned = load_tuned(config, {}).model
    tensors = {t.untyped_storage().data_ptr(): t.nbytes for t in [*tuned.parameters(), *tuned.buffers()]}
    classes = moments(work)[0].classes
    assert classes["weights"] + classes["adapters"] == pytest.approx(sum(tensors.values()), rel=0.01)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("words", [FULL, LORA], ids=["full", "lora"])
def test_moments_are_what_the_optimizer_holds(planned: Any, kind: str, words: dict[str, Any]) -> None:
    """Moments are the largest part of full training: 8, 4 or 2 bytes a weight."""
    config, work = planned(**words, **{"train.optimizer.kind": kind})
    tuned = load_tuned(config, {}).model
    optimizer = build_optimizer(tuned, config.train.optimizer)
    train_step(tuned, optimizer, [batch(work)], next_token, 1e-3, 1.0, lambda loss, norm: True)
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert moments(work)[0].classes["optimizer"] == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(
    "words",
    [FULL, LORA, {**FULL, "train.checkpoint_activations": "full"}, {"train.checkpoint_activations": "full"}],
    ids=["full", "lora", "full again", "lora again"],
)
def test_flops_are_those_of_a_step(planned: Any, words: dict[str, Any]) -> None:
    """A forward that is not counted, or a gradient that a frozen weight never has, makes the time wrong by a third."""
    from puna.train.blocks import checkpoint_blocks

    config, work = planned(**words)
    tuned = load_tuned(config, {}).model
    checkpoint_blocks(tuned, config.train.checkpoint_activations)
    optimizer = build_optimizer(tuned, config.train.optimizer)
    with FlopCounterMode(display=False) as counter:
        train_step(tuned, optimizer, [batch(work)], next_token, 1e-3, 1.0, lambda loss, norm: True)
    # The counter does not see products that are added in place: the adapters' outputs, and what they add to dL/dx.
    again = config.train.checkpoint_activations == "full"
    in_place = sum(w.adapter + again * w.rank * w.shape[0] for w in work.weights.values() if w.rank)
    counted = counter.get_total_flops() + 2 * work.tokens * in_place
    assert time.flops(work) == pytest.approx(counted, rel=0.03)


def test_each_rung_takes_less(planned: Any) -> None:
    """A change that is proposed has to be worth something: none may be planned to take as much as nothing."""

    def total(**words: Any) -> float:
        return fullest(planned(**FULL, model="llama3.2-1b", batch_size=32, seq_len=256, **words)[1]).total

    plain = total()
    assert plain > total(**{"train.checkpoint_activations": "selective"})
    assert total(**{"train.checkpoint_activations": "selective"}) > total(**{"train.checkpoint_activations": "full"})
    assert plain > total(**{"train.optimizer.kind": "adamw8bit"})
    early = {"train.optimizer.in_backward": True, "train.optimizer.clip": 0, "train.skip_budget": 0}
    ends = [moments(planned(**FULL, **words)[1])[3].total for words in ({}, early)]
    assert ends[0] > ends[1]


def test_ranks_divide_what_stays(planned: Any) -> None:
    """FSDP's point: moments by the number of ranks, and of the weights no more than what is gathered at a time."""
    config, _ = planned(**FULL, batch_size=8)
    one, four = (moments(work_of(config, know(config, count)))[0].classes for count in (1, 4))
    assert four["optimizer"] == one["optimizer"] / 4
    assert one["weights"] / 4 < four["weights"] <= one["weights"]


def test_the_change_fits_and_is_cheapest(planned: Any) -> None:
    """What is proposed is typed by somebody who is out of memory: it has to fit by the planner's own word."""
    config, work = planned(**FULL, batch_size=32, seq_len=256)
    known, rates = work.known, time.Rates(1e11, 1e10)
    has = fullest(work).total - 1
    change = cheapest(config, known, rates, has)
    assert change is not None
    assert change.what == "the same gradients"
    assert change.memory <= has
    again = load("sft", None, {**_plain(config), **dict(word.split("=") for word in change.words)})
    assert fullest(work_of(again, known)).total == change.memory
    # With less, more is given up; with nothing, nothing helps.
    stays = sum(moments(work)[0].classes[name] for name in ("weights", "optimizer"))
    less = cheapest(config, known, rates, memory.FLOOR["cpu"] + stays)
    assert less is None or less.what != "the same gradients"
    assert cheapest(config, known, rates, 0) is None
    assert typed({"train.optimizer.in_backward": True}) == ("train.optimizer.in_backward=true",)


def test_sampled_conversations_tell_how_long_texts_are(planned: Any, rows: Path) -> None:
    """Attention weights of short texts in a long row are few; taken for one text, they would be the most of it."""
    given = {"data.path": str(rows), "template": "llama3", "seq_len": 512}
    short, whole = planned(**given)[1], planned(seq_len=512)[1]
    assert short.texts.kept < whole.texts.kept / 4
    assert 0 < short.texts.trained < 1
    assert whole.known.notes  # what is assumed is said


def test_the_command_says_what_does_not_fit(model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script has to learn from the exit code, a person from 80 columns, a program from JSON."""
    from puna.cli import plan as command

    words = [f"model={model}", f"data.path={rows}", "template=llama3", "device=cpu", "dtype=bf16", "lora=null"]
    shown, code = _shown(command.plan, "sft", words)
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 80
    assert all(name in shown for name in ("weights", "optimizer", "activations", "in all", "a step"))
    monkeypatch.setattr(plan, "_free", lambda known: 100.5e6)
    shown, code = _shown(command.plan, "sft", words)
    assert code == ResourceError.exit_code
    assert "does not fit" in shown
    shown, code = _shown(command.plan, "sft", words, as_json=True)
    assert json.loads(shown)["fits"] is False
    with pytest.raises(UsageError, match="not planned"):
        puna.plan("tokenizer")


def test_presets_are_planned_without_weights() -> None:
    """Whether an 8B model can be tuned is asked before it is downloaded."""
    words = {"model": "llama3.1-8b", "seq_len": 2048, "batch_size": 2, "dtype": "bf16", "device": "cpu"}
    config = load("sft", None, {**words, "quantize": "nf4"})
    lora = load("sft", None, words)
    small, large = (fullest(work_of(c, know(c, 1))).classes["weights"] for c in (config, lora))
    assert large == pytest.approx(16.06e9, rel=0.01)
    assert small == pytest.approx(5.7e9, rel=0.02)


def test_pretraining_is_planned_with_and_without_shards(shards: Path, tmp_path: Path) -> None:
    """The vocabulary decides half of a small model: it is the shards', or said to be assumed."""
    words: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}
    with_shards = puna.plan("pretrain", data=str(shards), **words)
    without = puna.plan("pretrain", data=str(tmp_path / "none"), **words)
    assert with_shards.memory["weights"] < without.memory["weights"]
    assert not with_shards.notes
    assert "no shards" in without.notes[0]


def test_a_run_tells_its_forecast_and_survives_a_bad_one(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has predicted beside measured; a planner that breaks costs one line, never the run."""
    words: dict[str, Any] = {
        "model": str(model), "data.path": str(rows), "template": "llama3", "steps": 2, "seq_len": 64, "batch_size": 2,
        "valid_fraction": 0, "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    with _logged() as lines:
        run("sft", output=tmp_path / "good", **words)
    assert "memory in GB" in (tmp_path / "good/report.html").read_text(encoding="utf-8")
    assert any(line.startswith("predicted ") and "measured" in line for line in lines)

    def broken(*_: Any) -> Any:
        raise ValueError("no such number")

    monkeypatch.setattr(plan, "work_of", broken)
    with _logged() as lines:
        run("sft", output=tmp_path / "bad", **words)
    assert (tmp_path / "bad/final").exists()
    assert sum("no forecast" in line for line in lines) == 1


class _logged:
    """The lines that were logged in a block."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.level = log.level
        log.addHandler(self.handler)
        log.setLevel(logging.INFO)
        return self.lines

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self.handler)
        log.setLevel(self.level)


def _shown(command: Any, *given: Any, as_json: bool = False) -> tuple[str, int]:
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            command(*given, nproc=1, as_json=as_json)
        except SystemExit as stopped:
            return out.getvalue(), int(str(stopped.code))
    return out.getvalue(), 0


def _plain(config: Any) -> dict[str, Any]:
    return dict(_leaves(config.model_dump(mode="json", exclude_unset=True), ""))


def _leaves(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _yaml(words: dict[str, Any]) -> dict[str, Any]:
    """Lists as they are typed."""
    lists = {k: v.strip("[]").split(", ") for k, v in words.items() if isinstance(v, str) and v.startswith("[")}
    return {**words, **lists}
