"""Distillation: gradients by the formula, and what a teacher has to be."""

# ruff: noqa: F811 (a fixture that is imported)

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
from test_methods import SHAPE, conversations, models, words_of  # noqa: F401 (a fixture)
from test_model import build
from test_quantize import TEXT, UNTIED
from torch import Tensor

from puna.checkpoint.model_directory import save_model
from puna.data.loader import Batch
from puna.errors import UsageError
from puna.eval.certificate import quantize
from puna.log import Metrics
from puna.ops.cross_entropy import IGNORE
from puna.ops.divergence import Divergence, Mix, linear_distillation, linear_distillation_eager
from puna.quant.quantize import quantize_model
from puna.recipes import run, sft
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.distill import DistillConfig, distill
from puna.train.objectives import next_token

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "symmetric")


def by_hand(z: Tensor, y: Tensor, label: int, mix: Mix) -> tuple[float, list[float]]:
    """Loss and dloss/dz of one position, from the definitions, a number at a time.

    q_i = exp(z_i / t) / sum, p likewise of y, both over the shared ids.
      forward  D = sum p_i (log p_i - log q_i); since dlog q_i/dz_j = (delta_ij - q_j) / t,  dD/dz_j = (q_j - p_j) / t
      reverse  D = sum q_i (log q_i - log p_i); since dq_i/dz_j = q_i (delta_ij - q_j) / t,
               dD/dz_j = q_j (log q_j - log p_j - D) / t, the terms of dlog q_i adding to nothing
    """
    n, t = mix.ids, mix.temperature
    normal = sum(math.exp(v) for v in z.tolist())
    s = [math.exp(v) / normal for v in z.tolist()]
    q, p = ([math.exp(v / t) for v in each.tolist()[:n]] for each in (z, y))
    q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
    forward = sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True))
    reverse = sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True))
    slopes = {
        "forward": [(a - b) / t for a, b in zip(q, p, strict=True)],
        "reverse": [a * (math.log(a) - math.log(b) - reverse) / t for a, b in zip(q, p, strict=True)],
    }
    slopes["symmetric"] = [(a + b) / 2 for a, b in zip(slopes["forward"], slopes["reverse"], strict=True)]
    value = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[mix.divergence]
    loss = (1 - mix.ratio) * -math.log(s[label]) + mix.ratio * t**2 * value
    grad = [(1 - mix.ratio) * (s[i] - (i == label)) for i in range(len(s))]
    for i in range(n):
        grad[i] += mix.ratio * t**2 * slopes[mix.divergence][i]
    return loss, grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ratio", "t"), [(0.5, 1.0), (0.3, 2.5), (1.0, 0.7)])
def test_gradients_are_the_formulas(kind: Divergence, ratio: float, t: float) -> None:
    """KL turned round, a temperature's square forgotten, padded rows in a softmax: the loss falls all the same."""
    generator = torch.Generator().manual_seed(0)
    rows, dim, theirs, vocab, padded, ids = 11, 6, 5, 13, 16, 12  # both heads have rows of no id, of their own number
    hidden, weight, teacher, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, dim), (vocab, dim), (rows, theirs), (padded, theirs))
    )
    head[ids:] += 3  # much mass on rows that are no ids
    labels = torch.randint(0, ids, (rows,), generator=generator)
    labels[[2, 3, 7]] = IGNORE
    mix = Mix(ids, ratio, kind, t)
    total, grad_hidden, grad_weight = 0.0, torch.zeros_like(hidden), torch.zeros_like(weight)
    for row in (labels != IGNORE).nonzero()[:, 0].tolist():
        loss, grad = by_hand(weight @ hidden[row], head @ teacher[row], int(labels[row]), mix)
        total += loss
        grad_hidden[row] = torch.tensor(grad, dtype=torch.float64) @ weight
        grad_weight += torch.outer(torch.tensor(grad, dtype=torch.float64), hidden[row])
    for function in (linear_distillation, linear_distillation_eager):
        more = {"chunk": 3} if function is linear_distillation else {}
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, cross_entropy, divergence = function(*inputs, teacher, lambda x: x @ head.T, labels, mix, **more)
        assert float(loss.detach()) == pytest.approx(total, rel=1e-10)
        assert float((1 - ratio) * cross_entropy + ratio * divergence) == pytest.approx(total, rel=1e-10)
        found = torch.autograd.grad(3 * loss, inputs)
        for ours, expected in zip(found, (3 * grad_hidden, 3 * grad_weight), strict=True):
            assert (ours - expected).norm() < 1e-10 * expected.norm()


def test_nothing_trained_is_nothing() -> None:
    """A micro-batch without a trained token, as a rank may get: an empty chunk must not be NaN."""
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    labels = torch.full((4,), IGNORE)
    loss, *parts = linear_distillation(
        hidden, weight, torch.randn(4, 3), lambda x: x @ torch.ones(3, 9), labels, Mix(9)
    )
    loss.backward()
    assert [float(v) for v in (loss.detach(), *parts)] == [0, 0, 0]
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_objective_asks_the_teacher(kind: Divergence, packed: bool) -> None:
    """A teacher in training mode, one that gets gradients, or whose packed head is passed over."""
    ids = torch.randint(0, 600, (2, 21), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:].clone(), 30)
    batch.labels[:, :5] = IGNORE
    student, teacher = build(UNTIED, torch.float64), build(UNTIED, torch.float64, seed=1).eval()
    if packed:
        quantize_model(teacher, "int8-int4")
    mix = Mix(600, 0.4, kind, 1.5)
    before = [b.clone() for b in (*teacher.parameters(), *teacher.buffers())]
    loss = distill(student, batch, teacher=teacher, mix=mix)
    loss.sum.backward()
    found = {n: p.grad for n, p in student.named_parameters()}
    twin = build(UNTIED, torch.float64)
    hidden, labels = twin(batch.tokens, head=False).flatten(0, 1), batch.labels.flatten()
    known = teacher(batch.tokens, head=False).flatten(0, 1)
    expected, cross_entropy, divergence = linear_distillation_eager(
        hidden, twin.lm_head.weight, known, teacher.lm_head, labels, mix
    )
    expected.backward()
    assert float(loss.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(loss.metrics["cross_entropy"]) == pytest.approx(
        float(next_token(student, batch).sum.detach()), rel=1e-12
    )
    assert float(loss.metrics["divergence"]) == pytest.approx(float(divergence), rel=1e-12)
    for name, p in twin.named_parameters():
        assert p.grad is not None
        assert (found[name] - p.grad).norm() <= 1e-10 * p.grad.norm(), name
    assert all(torch.equal(a, b) for a, b in zip(before, (*teacher.parameters(), *teacher.buffers()), strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert float(cross_entropy) > 0


def test_a_student_that_is_its_teacher_learns_nothing_from_it() -> None:
    """The divergence from oneself is zero, and so is its gradient: of each kind, at each temperature."""
    ids = torch.randint(0, 600, (2, 21), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], 40)
    for kind in KINDS:
        student, teacher = build(UNTIED, torch.float64), build(UNTIED, torch.float64)
        loss = distill(student, batch, teacher=teacher, mix=Mix(640, 1.0, kind, 0.5))
        loss.sum.backward()
        assert abs(float(loss.sum.detach())) < 1e-10
        assert all(p.grad is not None and p.grad.abs().max() < 1e-10 for p in student.parameters())


def test_what_a_config_may_say() -> None:
    """A ratio of 50 trains away from the rows; a temperature of 0 divides by it."""
    assert DistillConfig(teacher="x") == DistillConfig(teacher="x", ratio=0.5, divergence="forward", temperature=1.0)
    for odd in ({"ratio": 50}, {"ratio": -0.1}, {"temperature": 0}, {"divergence": "kl"}):
        with pytest.raises(ValueError, match=next(iter(odd))):
            DistillConfig.model_validate({"teacher": "x", **odd})


def test_a_run_that_is_taught(models: Path, tmp_path: Path) -> None:
    """Of a quantized teacher, too: both parts are told, the gap is between like losses, and the teacher is a parent."""
    quantize(models / "teacher", tmp_path / "teacher", "int8", text=TEXT, prompts=["a"], max_tokens=1)
    words = words_of("kd", models, conversations(tmp_path / "rows.jsonl"), tmp_path / "run", dtype="fp32")
    words |= {"distill.teacher": tmp_path / "teacher", "valid_fraction": 0.2, "distill.ratio": 0.25}
    rows = Metrics(run("sft", **words) / "metrics.jsonl").read()
    steps = [row for row in rows if "lr" in row]
    for row in steps:
        assert row["loss"] == pytest.approx(0.75 * row["cross_entropy"] + 0.25 * row["divergence"], rel=1e-6)
    (last,) = (row for row in rows if "gap" in row and row["step"] == 4)
    assert last["train_loss"] == pytest.approx(fmean(row["cross_entropy"] for row in steps), rel=1e-6)
    made_from = json.loads((tmp_path / "run/final/puna.json").read_text())
    assert [parent["path"] for parent in made_from["parents"]] == [words["model"], str(tmp_path / "teacher")]
    assert all(parent["fingerprint"] for parent in made_from["parents"])


def test_a_teacher_of_other_ids_is_refused(
    models: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its probabilities would be those of other words; and no weight is read to find that out."""
    other = run("tokenizer", **{"output": tmp_path / "bpe", "vocab_size": 590, "sources.path": texts})
    (tmp_path / "other").mkdir()
    save_model(tmp_path / "other", build(SHAPE, seed=1), Tokenizer(other), "fp32", {})
    words = words_of("kd", models, conversations(tmp_path / "rows.jsonl"), tmp_path / "run")
    monkeypatch.setattr(sft, "load_tuned", lambda *_: pytest.fail("the student was loaded"))
    monkeypatch.setattr(sft, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(UsageError, match="another tokenizer than the student"):
        run("sft", **{**words, "distill.teacher": tmp_path / "other"})
