"""The memory ladder: each rung, alone and with others, trains as the plain run does and resumes exactly."""

import logging
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_lora import GQA, LORA, rows
from test_model import build
from test_train import TINY, pretrain, ragged_batches
from test_train import rows as metrics

from puna.checkpoint.train_state import load_train_state, save_train_state
from puna.data.loader import Batch
from puna.data.packing import PackedLoader
from puna.errors import NumericError, ResourceError, UsageError
from puna.lora import add_lora
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer
from puna.ops.attention import Documents
from puna.recipes import run
from puna.run_folder import Run
from puna.train import blocks
from puna.train import fit as loop
from puna.train.blocks import Checkpointed, checkpoint_blocks
from puna.train.fit import TrainConfig, check_held_out, check_training, train_step
from puna.train.guard import Halving, best_step, worn_out
from puna.train.objectives import Loss, next_token
from puna.train.optim import OptimizerConfig, build_optimizer

WIDE = ModelConfig(**{**GQA.model_dump(), "dim": 96, "vocab_size": 97})
"""Its matrices have more than 4,096 numbers, so that 8 bits hold their moments."""


def model_of(kind: str, which: Checkpointed = "none", dtype: torch.dtype = torch.float64) -> Transformer:
    """All weights, or adapters that do something under dropout."""
    model = build(WIDE, dtype)
    if kind == "lora":
        add_lora(model, LORA.model_copy(update={"dropout": 0.3, "rank": 48}), seed=1, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype)
    checkpoint_blocks(model, which)
    return model


def packed() -> PackedLoader:
    return PackedLoader(rows(), 16, 4, pad_id=0, seed=0)


def gradients(model: Transformer, halving: Halving | None = None, objective: Any = next_token) -> dict[str, Any]:
    """Of one step under dropout, its loss and gradient norm beside them."""
    torch.manual_seed(5)
    kept: dict[str, Any] = {}
    optimizer = build_optimizer(model, OptimizerConfig())

    def look(loss: float, norm: float) -> bool:
        kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return False

    loader = packed()
    row = train_step(model, optimizer, [next(loader), next(loader)], objective, 1e-3, 0, look, False, halving)
    return {"row": row, **kept}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], within: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name == "row":
            assert ours[name] == pytest.approx(value, rel=max(within, 1e-15))
        else:
            assert (ours[name] - value).norm() <= within * value.norm(), name


@pytest.mark.parametrize(("kind", "which"), list(product(("full", "lora"), ("selective", "full"))))
def test_blocks_computed_twice_have_the_same_gradients(kind: str, which: Checkpointed) -> None:
    """Other dropout in the second computation trains on a gradient of no loss at all, and nothing shows it."""
    assert_close(gradients(model_of(kind, which)), gradients(model_of(kind)), 1e-12)


def test_checkpointed_blocks_keep_less() -> None:
    """A wrapper that still keeps everything would pass every comparison of gradients."""

    def held(which: Checkpointed) -> int:
        model, kept = model_of("full", which), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage()
            if place.data_ptr() not in weights:
                kept[place.data_ptr()] = place.nbytes()
            return tensor

        batch = next(packed())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = next_token(model, batch)
        del loss
        return sum(kept.values())

    everything, half, little = held("none"), held("selective"), held("full")
    assert half < 0.75 * everything
    assert little < 0.5 * everything


def test_a_checkpointed_model_still_generates() -> None:
    """Computed twice, a block would put its keys into the cache twice; without gradients nothing is checkpointed."""
    from puna.infer.generate import generate

    words = {"max_tokens": 6}
    assert generate(model_of("full", "full"), [[1, 2, 3]], **words) == generate(model_of("full"), [[1, 2, 3]], **words)


def test_offloaded_activations_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits elsewhere must be the same bits; on a CPU the way there and back is all that can be tried."""
    seen = []
    real = blocks._in_cpu_memory

    def watched() -> Any:
        hooks = real()
        pack = hooks.pack_hook
        hooks.pack_hook = lambda tensor: (seen.append(tensor.shape), pack(tensor))[1]
        return hooks

    monkeypatch.setattr(blocks, "_in_cpu_memory", watched)
    model = build(WIDE, torch.float64)
    checkpoint_blocks(model, "full", offload=True)
    assert_close(gradients(model), gradients(model_of("full")), 1e-12)
    batch = next(packed())
    assert seen.count((*batch.tokens.shape, WIDE.dim)) == 2 * WIDE.n_layers


def train(run: Run, config: TrainConfig, kind: str, steps: int, which: Checkpointed) -> dict[str, torch.Tensor]:
    """The weights after `steps`, from the run's newest checkpoint if it has one."""
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    model = model_of(kind, which, torch.float32)
    loop.fit(run, model, packed(), next_token, config, steps, lambda model, step: {}, lambda folder: None)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


PAIRS = [
    (kind, which, in_backward, optimizer)
    for kind, which, in_backward, optimizer in product(
        ("full", "lora"), ("none", "selective", "full"), (False, True), ("adamw", "adamw8bit", "muon")
    )
]


@pytest.mark.parametrize(("kind", "which", "in_backward", "optimizer"), PAIRS)
def test_rungs_together(kind: str, which: Checkpointed, in_backward: bool, optimizer: Any, tmp_path: Path) -> None:
    """Each pair of rungs is the run without them, bit for bit, and resumes into the same bits.

    Adam of 8 bits is compared with itself on the bare model: that it is another optimizer is its purpose.
    """
    plain = {"kind": optimizer, "lr": 1e-2, "muon_lr": 1e-2, "warmup_steps": 1, "clip": 0.0}
    common = {"skip_budget": 0, "save_every": 1, "keep": 9}
    with_rungs = TrainConfig(optimizer=OptimizerConfig(**plain, in_backward=in_backward), **common)
    straight = train(Run(tmp_path / "straight"), with_rungs, kind, 3, which)
    bare = train(Run(tmp_path / "bare"), TrainConfig(optimizer=OptimizerConfig(**plain), **common), kind, 3, "none")
    assert all(torch.equal(straight[n], bare[n]) for n in bare)
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    (tmp_path / "straight/checkpoints/step-2").rename(tmp_path / "again/checkpoints/step-2")
    again = train(Run(tmp_path / "again"), with_rungs, kind, 3, which)
    assert all(torch.equal(straight[n], again[n]) for n in straight)


def test_a_step_in_the_backward_frees_its_gradient() -> None:
    """Its purpose; and it tells the gradient's norm all the same."""
    rows_of = {}
    for in_backward in (False, True):
        model = model_of("full")
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
        alive: list[int] = []
        for p in model.parameters():  # registered first, and so called first
            p.register_post_accumulate_grad_hook(
                lambda p, model=model, alive=alive: alive.append(sum(q.grad is not None for q in model.parameters()))
            )
        batch = [next(packed())]
        row = train_step(model, optimizer, batch, next_token, 1e-3, 0, lambda loss, norm: True, in_backward)
        rows_of[in_backward] = row
        assert max(alive) == (1 if in_backward else len(list(model.parameters())))
    assert rows_of[True] == pytest.approx(rows_of[False], rel=1e-12)


def test_a_bad_step_in_the_backward_ends_the_run(tmp_path: Path) -> None:
    """It cannot be skipped any more: the run must not save what it did to the weights."""

    def poisoned(model: Any, batch: Batch) -> Loss:
        return Loss(next_token(model, batch).sum * math.nan, {})

    optimizer = OptimizerConfig(lr=1e-3, clip=0, in_backward=True)
    config = TrainConfig(skip_budget=0, optimizer=optimizer, save_every=1)
    folder = Run(tmp_path / "run")
    folder.folder.mkdir()
    with pytest.raises(NumericError):
        loop.fit(folder, model_of("full"), packed(), poisoned, config, 3, lambda m, s: {}, lambda folder: None)
    assert not list(folder.folder.glob("checkpoints/step-*"))


@pytest.mark.parametrize(
    ("words", "told", "fix"),
    [
        ({"optimizer": {"in_backward": True}}, "in_backward", "train.optimizer.clip=0 train.skip_budget=0"),
        ({"optimizer": {"in_backward": True, "clip": 0}, "skip_budget": 0, "accumulate": 2}, "in_backward",
         "train.accumulate=1"),
        ({"offload_activations": True}, "offload_activations", "checkpoint_activations=full"),
        ({"offload_activations": True, "checkpoint_activations": "full"}, "on cpu", "offload_activations=false"),
        ({"patience": 2}, "nothing is held out", "valid_fraction"),
        ({"keep_best": True}, "nothing is held out", "keep_best=false"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(words: dict[str, Any], told: str, fix: str) -> None:
    """A rung that silently does nothing, or silently drops clipping, costs days; each refusal says what to set."""
    config = TrainConfig.model_validate(words)

    def check() -> None:
        check_training(config, "cpu")
        check_held_out(config, held_out=False)

    with pytest.raises(UsageError, match=told) as error:
        check()
    assert fix in error.value.fix


def test_ranks_and_8_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a weight end within blocks of 256; a step in the backward of one rank is not told to the others."""
    for name, value in {"MASTER_ADDR": "here", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="adamw8bit with 2 ranks"):
        check_training(TrainConfig(optimizer=OptimizerConfig(kind="adamw8bit")), "cpu")
    alone = TrainConfig(skip_budget=0, optimizer=OptimizerConfig(in_backward=True, clip=0))
    with pytest.raises(UsageError) as error:
        check_training(alone, "cpu")
    assert "one process" in error.value.fix


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_halves_after_running_out_of_memory(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What the failed backward had added up stays in the gradient, or a half is weighted as a whole: the same bits?"""
    model, calls = model_of("full"), []
    failed = []

    def objective(model: Any, batch: Batch) -> Loss:
        calls.append(len(batch.tokens))
        loss = next_token(model, batch)
        if len(calls) == 2:  # the second micro-batch, when the upper layers' gradients are there

            def fail(_: torch.Tensor) -> None:
                failed.append(sum(p.grad is not None for p in model.parameters()))
                raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

            hook = model.layers[0].mlp.up_proj.weight.register_hook(fail)
            model.hooks = [hook]
        else:
            for hook in model.__dict__.pop("hooks", []):
                hook.remove()
        return loss

    halving = Halving()
    with caplog.at_level(logging.WARNING, logger="puna"):
        found = gradients(model, halving, objective)
    assert failed
    assert calls == [4, 4, 2, 2, 2, 2]
    assert halving.times == 1
    assert [r.message for r in caplog.records] == [
        "out of memory: from here on a step is computed in 4 parts instead of 2, its sums are the same"
    ]
    assert_close(found, gradients(model_of("full")), 1e-12)


def test_a_row_that_does_not_fit_is_told() -> None:
    """Halving a single row for ever; another error taken for a lack of memory."""

    def full(model: Any, batch: Batch) -> Loss:
        raise MemoryError  # says nothing

    halving = Halving()
    with pytest.raises(ResourceError, match="a single row at a time") as error:
        gradients(model_of("full"), halving, full)
    assert halving.times == 3  # 4, 2, 1 rows
    assert all(word in error.value.fix for word in ("seq_len", "checkpoint_activations", "quantize"))
    with pytest.raises(ResourceError, match="out of memory in a step") as error:
        gradients(model_of("full"), Halving(refused="other ranks wait"), full)
    assert "batch_size" in error.value.fix

    def broken(model: Any, batch: Batch) -> Loss:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        gradients(model_of("full"), Halving(), broken)


def test_halves_of_a_batch() -> None:
    """A text that is seen from another half's row, positions or labels left whole; an odd number of rows."""
    batch = packed().batch(packed().packs[:3])
    assert batch.documents
    first, second = batch.halves() or pytest.fail("three rows have halves")
    assert (len(first.tokens), len(second.tokens)) == (1, 2)
    assert first.n + second.n == batch.n
    assert isinstance(second.documents, Documents)
    assert {r for r, *_ in second.documents.spans} == {0, 1}
    q = torch.zeros(3, 1, 16, 2)
    assert torch.equal(second.documents.dense(q[1:]), batch.documents.dense(q)[1:])
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(half, name) for half in (first, second)]), getattr(batch, name))
    assert first.halves() is None
    plain = replace(ragged_batches()[0], tokens=torch.zeros(2, 16).long(), labels=torch.zeros(2, 16).long(), n=32)
    assert [half.n for half in plain.halves() or ()] == [16, 16]


def test_halving_is_kept_for_the_rest_of_the_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run would run out of memory again first; and the whole run is the one that never did."""
    words = {"train.save_every": 2, "train.evaluate_every": 100, "batch_size": 4, "steps": 6, "dtype": "fp64"}
    whole = pretrain(tmp_path / "whole", shards, **words)
    real, calls = loop.train_step, []

    def small(model: Any, batch: Batch) -> Loss:
        calls.append(len(batch.tokens))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return next_token(model, batch)

    def stopped(*given: Any) -> Any:
        if len(calls) > 7:
            raise KeyboardInterrupt
        return real(*given[:3], small, *given[4:])

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "run", shards, **words)
    assert calls == [4, 4, 4, 2, 2, 2, 2, 2, 2][: len(calls)]
    calls[:] = [0, 0, 0]
    monkeypatch.setattr(loop, "train_step", lambda *given: real(*given[:3], small, *given[4:]))
    pretrain(tmp_path / "run", shards, **words)
    assert set(calls[3:]) == {2}
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


LOSSES = {3: 2.0, 6: 1.0, 9: math.inf, 12: 1.5, 15: 1.0}


def test_best_and_worn_out() -> None:
    """Equal is no improvement; a validation that was not finite is the worst."""
    assert best_step(LOSSES) == 6
    assert best_step({}) is None
    assert [worn_out({s: LOSSES[s] for s in LOSSES if s <= step}, 2) for step in LOSSES] == [False] * 3 + [True] * 2
    assert not worn_out(LOSSES, None)
    assert not worn_out({}, 1)


def overfit(output: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, **words: Any) -> Path:
    """A run whose validation loss is told by a table, step by step, as if it began to overfit at step 6."""
    from puna.recipes import pretrain as recipe

    real = recipe._evaluate

    def told(model: Any, step: int, **rest: Any) -> dict[str, float]:
        return {**real(model, step, **rest), "valid_loss": LOSSES[step]}

    monkeypatch.setattr(recipe, "_evaluate", told)
    options = {"train.evaluate_every": 3, "train.save_every": 4, "train.keep": 1, "save_dtype": "fp32", "steps": 15}
    return run("pretrain", **{**TINY, "output": output, "data": shards, **options, **words})


def test_the_best_step_is_kept_and_the_last_one_is_not_waited_for(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`final/` of the last step after it had overfitted; the best checkpoint pruned, or not there to go back to."""
    stopped = overfit(tmp_path / "stopped", shards, monkeypatch, **{"train.patience": 2, "train.keep_best": True})
    assert max(row["step"] for row in metrics(stopped)) == 12
    assert {p.name for p in (stopped / "checkpoints").iterdir()} == {"step-6", "step-12"}
    assert "the model is that of step 6" in (stopped / "log.txt").read_text()
    final, best = (load_file(stopped / f"{name}/model.safetensors") for name in ("final", "checkpoints/step-6"))
    assert all(torch.equal(final[n], best[n]) for n in best)
    straight = overfit(tmp_path / "straight", shards, monkeypatch, **{"train.keep": 9})
    sixth = [row for row in metrics(straight) if row["step"] <= 6]
    assert [row for row in metrics(stopped) if row["step"] <= 6] == sixth
    # Told the same after a crash at any of its checkpoints, from the files alone.
    words = {"train.patience": 2, "train.keep_best": True, "train.keep": 9}
    whole = overfit(tmp_path / "whole", shards, monkeypatch, **words)
    for step in (4, 12):
        copy = tmp_path / f"from-{step}"
        shutil.copytree(whole, copy)
        for gone in [copy / "final", *(p for p in (copy / "checkpoints").iterdir() if int(p.name[5:]) > step)]:
            shutil.rmtree(gone)
        overfit(copy, shards, monkeypatch, **words)
        assert metrics(copy) == metrics(whole)
        ours = load_file(copy / "final/model.safetensors")
        assert all(torch.equal(ours[n], best[n]) for n in best)


def test_memory_is_told_in_every_row(shards: Path, tmp_path: Path) -> None:
    """What the planner's promise is measured by."""
    from puna.log import Metrics

    written = Metrics(pretrain(tmp_path / "run", shards, steps=3) / "metrics.jsonl").read()
    peaks = [row["memory"] for row in written]
    assert peaks == sorted(peaks)
    assert 50e6 < peaks[0] < 100e9


def test_a_step_from_8_bits_is_saved_exactly(tmp_path: Path) -> None:
    """Codes and scales that come back through fp32 would be other moments."""
    model = model_of("full", dtype=torch.float32)
    config = OptimizerConfig(kind="adamw8bit", lr=1e-2)
    optimizer, loader = build_optimizer(model, config), packed()
    step = partial(train_step, objective=next_token, lr=1e-2, clip=1.0, admit=lambda loss, norm: True)
    step(model, optimizer, [next(loader)])
    folder = Run(tmp_path / "run")
    folder.folder.mkdir()
    saved = save_train_state(folder, loop.TrainState(1), model, optimizer, loader, lambda folder: None)
    again = model_of("full", dtype=torch.float32)
    other, at_once = build_optimizer(again, config), list[int]()
    other.register_step_pre_hook(lambda *_: at_once.append(sum(p.grad is not None for p in again.parameters())))
    load_train_state(saved, again, other, packed())
    assert set(at_once) == {1}  # all gradients together were more than a run that steps in the backward ever had
    kept = {t.dtype for state in optimizer.state.values() for t in state.values()}
    assert kept == {torch.uint8, torch.float32}
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(other.state[q][name], value) for name, value in optimizer.state[p].items())
