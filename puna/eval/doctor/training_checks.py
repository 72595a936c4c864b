"""Is what is trained what one thinks, and does it survive being stopped, merged and saved?"""

import shutil
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from puna.checkpoint.adapter import load_adapter, save_adapter
from puna.checkpoint.model_directory import save_model
from puna.checkpoint.weight_files import weight_files
from puna.data.loader import Batch
from puna.eval.doctor import written_out
from puna.eval.doctor.case import Case, Gradients
from puna.eval.doctor.data_checks import Parts
from puna.eval.doctor.model_checks import apart, gradients_apart
from puna.infer.llama import Llama, load
from puna.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from puna.model.mode import evaluating
from puna.model.transformer import Transformer
from puna.ops.cross_entropy import IGNORE
from puna.run_folder import Run
from puna.tokenizer.chat.format import Encoded
from puna.train.fit import TrainConfig, fit
from puna.train.objectives import next_token
from puna.train.optim import OptimizerConfig, build_optimizer

_LORA = LoraConfig(rank=4, alpha=12, dropout=0.1)  # alpha / rank is not 1, and dropout draws random numbers


def gradients(case: Case) -> Parts:
    """Loss and gradients of a training step against plain ones, each text alone: packed rows, and one long text."""
    row, ours = case.packed_gradients
    loss, theirs = _written_out(case, case.windows)
    whole = Encoded(case.long[0].tolist(), [True] * case.long.shape[1])
    long_batch = Batch(case.long[:, :-1], case.long[:, 1:], case.long.shape[1] - 1)
    long_row, ours_long = case.gradients([long_batch])
    loss_long, theirs_long = _written_out(case, [whole])
    return {
        "loss of packed rows": abs(row["loss"] - loss) / loss,
        "gradients of packed rows": gradients_apart(ours, theirs),
        f"loss of {case.long.shape[1]} ids": abs(long_row["loss"] - loss_long) / loss_long,
        f"gradients of {case.long.shape[1]} ids": gradients_apart(ours_long, theirs_long),
    }


def accumulation(case: Case) -> Parts:
    """Four micro-batches with unequal numbers of trained ids against one batch of all four."""
    micro, whole = _unequal(case)
    (row, ours), (one, theirs) = case.gradients(micro), case.gradients([whole])
    return {"loss": abs(row["loss"] - one["loss"]) / one["loss"], "gradients": gradients_apart(ours, theirs)}


def clipping(case: Case) -> Parts:
    """A gradient clipped to half its norm against half the gradient, over micro-batches; and the norm that is told."""
    micro, _ = _unequal(case)
    row, theirs = case.gradients(micro)
    norm = row["grad_norm"]
    clipped = case.gradients(micro, clip=norm / 2)[1]
    scale = (norm + 1e-6) / (norm / 2)  # torch adds 1e-6, lest it divides by nothing
    true_norm = torch.stack([g.double().norm() for g in theirs.values()]).norm().item()
    return {
        "clipped": gradients_apart({n: scale * g for n, g in clipped.items()}, theirs),
        "reported norm": abs(norm - true_norm) / true_norm,
    }


def packing(case: Case) -> Parts:
    """Texts that share a row against the same texts alone: logits, loss, gradients."""
    row, ours = case.packed_gradients
    loader = case.packed(max(len(row.ids) for row in case.windows))
    alone = [loader.batch([[i]]) for i in range(len(loader.rows))]
    single, theirs = case.gradients(alone)
    return {
        "logits": _packed_logits(case),
        "loss": abs(row["loss"] - single["loss"]) / single["loss"],
        "gradients": gradients_apart(ours, theirs),
    }


def decay(case: Case) -> Parts:
    """Every weight in one group of the optimizer; matrices decay, norms do not."""
    wrong = 0
    for kind in ("adamw", "muon"):
        optimizer = build_optimizer(case.model, OptimizerConfig(kind=kind, lr=1e-3))
        found = [
            (id(p), p.ndim >= 2, group["weight_decay"] > 0) for group in optimizer.param_groups for p in group["params"]
        ]
        wrong += sum(matrix != decays for _, matrix, decays in found) + len(found) - len({i for i, *_ in found})
        wrong += len({id(p) for p in case.model.parameters()} ^ {i for i, *_ in found})
    return {"weights that decay wrongly": wrong}


def resume(case: Case, optimizer: OptimizerConfig | None = None, lora: bool = True) -> Parts:
    """Three steps at a stretch against one, a stop, a fresh process's model and two more: losses and weights."""
    config = TrainConfig(
        accumulate=2,
        save_every=1,
        evaluate_every=10,
        keep=9,
        optimizer=optimizer or OptimizerConfig(lr=1e-3, warmup_steps=2),
    )
    kind = f"{config.optimizer.kind}-{'adapters' if lora else 'weights'}"
    straight, again = Run(case.scratch / f"straight-{kind}"), Run(case.scratch / f"again-{kind}")
    for run in (straight, again):
        run.folder.mkdir()
    results = []
    threads = torch.get_num_threads()
    for run in (straight, again):
        if run is again:
            shutil.copytree(straight.checkpoints / "step-1", again.checkpoints / "step-1")
            shutil.copy(straight.metrics.path, again.metrics.path)
            torch.rand(7)  # another process has drawn other numbers
        model = case.twin()
        save: Any = partial(save_model, model=model, save_dtype="fp32", tokenizer=case.tokenizer, lineage={})
        if lora:
            add_lora(model, _LORA, dtype=torch.float32 if case.dtype != "fp64" else torch.float64)
            save = partial(save_adapter, model=model, config=_LORA, tokenizer=case.tokenizer, base="base", lineage={})
        if run is straight:
            torch.manual_seed(0)
        fit(run, model, case.batches(), next_token, config, 3, lambda model, step: {}, save)
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    torch.set_num_threads(threads)
    logged = [[(r["step"], r["loss"], r["lr"]) for r in run.metrics.read() if "loss" in r] for run in (straight, again)]
    different = sum(not torch.equal(results[0][n], results[1][n]) for n in results[0])
    return {"weights that differ": different, "steps whose loss differs": logged[0] != logged[1]}


def resume_weights(case: Case) -> Parts:
    """`resume` of full training, where every weight moves."""
    return resume(case, lora=False)


@torch.no_grad()
def merge(case: Case) -> Parts:
    """Logits of an adapter on its base against the merged model: the user's own, or one with random weights."""
    tokens = case.long[:, :64]
    if lora_parameters(case.source.model):
        with evaluating(case.source.model), evaluating(case.model):
            return {"logits": apart(case.model(tokens), case.source.model(tokens))}
    model = adapted(case)
    before = model(tokens)
    merge_lora(model)
    moved = apart(before, case.model.eval()(tokens))
    return {"logits": apart(model(tokens), before), "adapters that do nothing": moved == 0}


@torch.no_grad()
def adapter_files(case: Case) -> Parts:
    """An adapter as it was trained against the one that comes back from its files."""
    model, again = adapted(case), case.twin()
    folder = case.scratch / "adapter"
    folder.mkdir()
    save_adapter(folder, model, _LORA, case.tokenizer, "base", {})
    load_adapter(again, folder, torch.float32)
    again.eval()
    ours, theirs = lora_parameters(again), lora_parameters(model)
    tokens = case.long[:, :64]
    return {
        "adapter weights that differ": sum(not torch.equal(ours[n], theirs[n]) for n in theirs),
        "logits": apart(again(tokens), model(tokens)),
    }


@torch.no_grad()
def reload(case: Case) -> Parts:
    """The model saved in its own dtype and loaded: weights, logits, ids, template, stop ids, the tied head."""
    folder, llama = case.scratch / "model", case.llama
    exact = "fp64" if case.dtype == "fp64" else "fp32"
    llama.save(folder, dtype=exact)
    again = load(folder, dtype=exact, device=str(case.device))
    again.model.compute_dtype = case.model.compute_dtype
    tokens, stored = case.long[:, :64], dict(again.model.named_parameters())
    with evaluating(case.model):
        return {
            "weights that differ": sum(not torch.equal(p, stored[n]) for n, p in case.model.named_parameters()),
            "logits": apart(again.model(tokens), case.model(tokens)),
            "ids, stop ids or template that differ": _tokenizer_differences(again, llama, case.texts),
            "a tied head apart": _head_apart(again, folder) if case.model.config.tie_embeddings else 0,
        }


def adapted(case: Case) -> Transformer:
    """A copy of the model with adapters that do something: B is not zero."""
    model = case.twin()
    add_lora(model, _LORA, seed=1)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(model).items():
        if "lora_B" in name:
            # Noticed by merging and saving, yet small beside the layers of a trained model.
            parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return model.eval()


def _written_out(case: Case, rows: list[Encoded]) -> tuple[float, Gradients]:
    """Mean loss over all trained ids of the rows and its gradients, by plain autograd."""
    names = [n for n, _ in case.model.named_parameters()]
    leaves = {n: p.detach().requires_grad_() for n, p in case.model.named_parameters()}
    weights = {n if n.startswith("lm_head.") else f"model.{n}": p for n, p in leaves.items()}
    n = sum(sum(row.trained[1:]) for row in rows)
    total = 0.0
    for row in rows:
        part = written_out.loss(case.disk_values(), weights, row.ids, row.trained) / n
        part.backward()
        total += part.item()
    return total, {name: g for name in names if (g := leaves[name].grad) is not None}


def _unequal(case: Case) -> tuple[list[Batch], Batch]:
    """Four micro-batches of one, two, ... trained ids, and one batch of the same rows."""
    loader = case.packed(max(len(row.ids) for row in case.windows))
    micro = []
    for number, index in enumerate(i % len(loader.rows) for i in range(4)):
        batch = loader.batch([[index]])
        order = (batch.labels != IGNORE).cumsum(1)
        labels = torch.where(order <= 1 + 2 * number, batch.labels, IGNORE)
        micro.append(Batch(batch.tokens, labels, int((labels != IGNORE).sum())))
    tokens, labels = (torch.cat([getattr(b, part) for b in micro]) for part in ("tokens", "labels"))
    return micro, Batch(tokens, labels, sum(b.n for b in micro))


@torch.no_grad()
def _packed_logits(case: Case) -> float:
    loader, worst = case.packed(), 0.0
    with evaluating(case.model):
        for members in loader.packs:
            batch = loader.batch([members]).to(case.device)
            packed = case.model(batch.tokens, positions=batch.positions, mask=batch.documents)[0]
            start = 0
            for row in (loader.rows[i].ids for i in members):
                alone: Tensor = case.model(torch.tensor([row], device=case.device))[0]
                worst = max(worst, apart(packed[start : start + len(row)], alone))
                start += len(row)
    return worst


def _tokenizer_differences(ours: Llama, theirs: Llama, texts: list[str]) -> int:
    different = sum(ours.encode(text) != theirs.encode(text) for text in texts)
    templates = [llama.tokenizer.files.get("chat_template.jinja") for llama in (ours, theirs)]
    return different + (set(ours.stop_ids) != set(theirs.stop_ids)) + (templates[0] != templates[1])


def _head_apart(llama: Llama, folder: Any) -> int:
    """Whether a tied head is a second matrix in memory, or a second tensor on disk."""
    names = [n for file in weight_files(folder) for n in safe_open(file, framework="pt").keys()]  # noqa: SIM118
    return (llama.model.lm_head.weight is not llama.model.embed_tokens.weight) + ("lm_head.weight" in names)
