"""Mistakes that train and serve without a word, planted one by one: `puna doctor` has to see each of them.

The fault is put into the product's own code; the check that is named has to fail, and to pass without the fault.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import tiny, vocabulary
from test_model import BASE, build

from puna.checkpoint import adapter, model_directory, stored_directory, train_state
from puna.checkpoint.gguf import model as gguf_model
from puna.checkpoint.stored import Stored
from puna.data.packing import PackedLoader
from puna.eval.doctor.case import Case, open_case
from puna.eval.doctor.diagnose import CHECKS, diagnose
from puna.files import atomic_folder
from puna.infer import generate as generation
from puna.infer import llama
from puna.lora import LoraLinear
from puna.model.cache import KVCache
from puna.model.config import ModelConfig, RopeScaling
from puna.ops import attention, blocked_attention, cross_entropy, norm, rope
from puna.tokenizer.chat.format import ChatFormat, Encoded
from puna.tokenizer.tokenizer import Tokenizer
from puna.train import fit, optim
from puna.train.objectives import Loss

SHAPE = {
    "dim": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 40, "max_seq_len": 300, "norm_eps": 1e-5,
}  # fmt: skip
SCALED = {"rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=8, original_max_seq_len=64)}
Function = Callable[..., Any]


@pytest.fixture(scope="module")
def patients(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(model, data) of each kind: chat rows, plain text, a GGUF, a config.json without rope_theta, more stop ids."""
    folder, tokenizer = tmp_path_factory.mktemp("patients"), Tokenizer(tokenizer_folder)
    rows = [
        [f"How many llamas are {i} and {i}?" + " Please." * (i % 4), f"{2 * i} llamas" + " graze" * (i % 5) + "."]
        for i in range(8)
    ]
    turns = [[{"role": r, "content": c} for r, c in zip(("user", "assistant"), row, strict=True)] for row in rows]
    turns[0] = [*turns[0], {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    (folder / "text.txt").write_text("".join(f"{q}\n{a}\n" for q, a in rows) * 4)
    shape = {**BASE, **SHAPE, "vocab_size": tokenizer.vocab_size}
    models = {"model": {**SCALED, "tie_embeddings": True}, "untied": {"rope_theta": 10000.0}}
    for name, more in models.items():
        with atomic_folder(folder / name) as target:
            model_directory.save_model(target, build(ModelConfig(**{**shape, **more})), tokenizer, "fp32", {})
    config = json.loads((folder / "untied" / "config.json").read_text())
    del config["rope_theta"]
    (folder / "untied" / "config.json").write_text(json.dumps(config))
    stops = shutil.copytree(folder / "model", folder / "more stops") / "generation_config.json"
    values = json.loads(stops.read_text())
    stops.write_text(json.dumps({**values, "eos_token_id": [*values["eos_token_id"], 7]}))
    size = len(vocabulary()["tokenizer.ggml.tokens"])
    tiny(folder / "m.gguf", build(ModelConfig(**{**BASE, **SHAPE, "vocab_size": size})))
    return {
        "chat": (folder / "model", folder / "rows.jsonl"),
        "text": (folder / "model", folder / "text.txt"),
        "no theta": (folder / "untied", folder / "text.txt"),
        "more stops": (folder / "more stops", folder / "text.txt"),
        "gguf": (folder / "m.gguf", folder / "text.txt"),
    }


def opened(patients: dict[str, tuple[Path, Path]], kind: str, scratch: Path) -> Case:
    return open_case(*patients[kind], scratch, template="llama3" if kind == "chat" else None)


@pytest.mark.parametrize("kind", ["chat", "text", "no theta", "gguf"])
def test_what_is_sound_passes(kind: str, patients: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A doctor who finds something in everyone finds nothing."""
    findings = list(diagnose(opened(patients, kind, tmp_path)))
    assert [f"{f.name}: {f.parts} {f.error}" for f in findings if not f.ok] == []
    expected = [c.name for c in CHECKS if kind == "chat" or c.name not in ("mask", "stop", "prompt")]
    assert [f.name for f in findings] == expected


@dataclass(frozen=True)
class Fault:
    """`place` is the object whose `function` is replaced by what `spoil` makes of it."""

    story: str
    place: Any
    function: str
    spoil: Callable[[Function], Function]
    caught_by: str
    kind: str = "chat"


def leak(first: int) -> Callable[[Function], Function]:
    """Queries of the block that starts at `first` or later see one id too far."""

    def spoil(sound: Function) -> Function:
        def weights(q: torch.Tensor, k: torch.Tensor, start: int, end: int) -> torch.Tensor:
            if start < first:
                return sound(q, k, start, end)
            size = end - start
            scores = q[:, :, start:end].flatten(1, 2) @ k[:, :end].mT
            future = torch.full((size, size), float("-inf"), dtype=q.dtype).triu_(2)
            scores.unflatten(1, (-1, size))[..., start:].add_(future)
            return scores.softmax(-1)

        return weights

    return spoil


def interleaved(sound: Function) -> Function:
    def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)

    return apply_rope


def tiled_heads(sound: Function) -> Function:
    def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        times = q.shape[1] // k.shape[1]
        return sound(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))

    return causal_attention


def own_denominator(sound: Function) -> Function:
    def train_step(model: Any, optimizer: Any, micro: Any, objective: Any, *rest: Any) -> Any:
        whole = sum(batch.n for batch in micro)

        def mean(model: Any, batch: Any) -> Loss:
            loss = objective(model, batch)
            return Loss(loss.sum * whole / (batch.n * len(micro)), loss.metrics)

        return sound(model, optimizer, micro, mean, *rest)

    return train_step


def parameters_alone(sound: Function) -> Function:
    return lambda folder, tensors: sound(folder, {n: t for n, t in tensors.items() if n.startswith("parameter.")})


def one_pack_further(sound: Function) -> Function:
    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        sound(self, {**state, "index": state["index"] + 1})

    return load_state_dict


def batch_with(change: Callable[[Any], dict[str, Any]]) -> Callable[[Function], Function]:
    def spoil(sound: Function) -> Function:
        def batch(self: Any, packs: Any) -> Any:
            made = sound(self, packs)
            return replace(made, **change(made))

        return batch

    return spoil


def clipped_before_division(sound: Function) -> Function:
    def clip(parameters: Any, max_norm: float, *rest: Any) -> Any:
        parameters, n = list(parameters), 37
        for p in parameters:
            p.grad *= n
        norm = sound(parameters, max_norm, *rest)
        for p in parameters:
            p.grad /= n
        return norm / n

    return clip


def untied(sound: Function) -> Function:
    def load(*given: Any) -> Any:
        model = sound(*given)
        model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.detach().clone())
        return model

    return load


def everything_decays(sound: Function) -> Function:
    def build_optimizer(model: Any, config: Any) -> Any:
        optimizer = sound(model, config)
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
        return optimizer

    return build_optimizer


def end_untrained(sound: Function) -> Function:
    def cut(self: Any, text: str) -> tuple[str, str]:
        answer, after = sound(self, text)
        end = answer.rindex("<|")
        return answer[:end], answer[end:] + after

    return cut


def encoded_as(change: Callable[[Any, Encoded], Encoded]) -> Callable[[Function], Function]:
    return lambda sound: lambda self, *given, **named: change(self, sound(self, *given, **named))


FAULTS = {
    "future leak": Fault("the loss falls to nearly nothing, the text is nonsense",
        blocked_attention, "_weights", leak(0), "causality"),
    "future leak beyond one block": Fault("only long texts learn to cheat",
        blocked_attention, "_weights", leak(128), "causality"),
    "RoPE pairs neighbours": Fault("a published model talks gibberish",
        rope, "apply_rope", interleaved, "disk"),
    "k permuted with n_heads": Fault("a GGUF with grouped heads is a little stupid",
        gguf_model, "to_halves",
        lambda sound: lambda w, d: sound(w, d // 2 if w.shape[0] == 16 else d), "disk", "gguf"),
    "key heads tiled": Fault("trains well, and answers worse everywhere else",
        attention, "causal_attention", tiled_heads, "disk"),
    "RoPE scaling ignored": Fault("good until the original context ends",
        rope, "scale_frequencies", lambda sound: lambda frequencies, **scaling: frequencies, "disk"),
    "rope_theta's default ignored": Fault("an old config.json loads as another model",
        stored_directory, "from_hf_config",
        lambda sound: lambda values, where: sound({"rope_theta": 500000.0, **values}, where), "disk", "no theta"),
    "norm eps ignored": Fault("a loss in the fourth digit that nobody explains",
        norm, "rms_norm", lambda sound: lambda x, weight, eps: sound(x, weight, 1e-6), "disk"),
    "a micro-batch divides by its own n": Fault("more accumulation, worse model",
        fit, "train_step", own_denominator, "accumulation"),
    "clipped before it is divided": Fault("tiny steps, as if the rate were wrong",
        torch.nn.utils, "clip_grad_norm_", clipped_before_division, "clipping"),
    "the last chunk of the loss left out": Fault("the ends of batches are never learned",
        cross_entropy, "linear_cross_entropy",
        lambda sound: lambda h, w, t: sound(h[: len(h) // 100 * 100], w, t[: len(t) // 100 * 100]), "gradients"),
    "norms decay": Fault("long runs shrink their norms",
        optim, "build_optimizer", everything_decays, "decay"),
    "labels not shifted": Fault("the model learns to repeat its input",
        PackedLoader, "batch", batch_with(lambda b: {"labels": b.labels.roll(1, 1)}), "labels"),
    "labels shifted twice": Fault("every second word is missing",
        PackedLoader, "batch", batch_with(lambda b: {"labels": b.labels.roll(-1, 1)}), "gradients"),
    "packed without document masks": Fault("answers borrow from the row before",
        PackedLoader, "batch", batch_with(lambda b: {"documents": None}), "packing"),
    "positions go on through a pack": Fault("short texts are learned far from where they are used",
        PackedLoader, "batch",
        batch_with(lambda b: {"positions": torch.arange(b.tokens.shape[1]).expand_as(b.tokens)}), "labels"),
    "the end of turn untrained": Fault("the chat model never stops",
        ChatFormat, "_cut_after_turn", end_untrained, "mask"),
    "the user's words trained": Fault("the model asks back what it was asked",
        ChatFormat, "encode", encoded_as(lambda self, row: Encoded(row.ids, [True] * len(row.ids))), "mask"),
    "BOS twice": Fault("a small loss of quality in every answer",
        ChatFormat, "encode",
        encoded_as(lambda self, row: Encoded([self.tokenizer.bos_id, *row.ids], [False, *row.trained])), "bos"),
    "the end of turn does not stop": Fault("answers run on into the user's next question",
        llama, "load", lambda sound: lambda *a, **k: replace(found := sound(*a, **k), stop_ids=found.stop_ids[:1]),
        "stop"),
    "stop ids not looked at": Fault("every answer has max_tokens ids",
        generation, "generate", lambda sound: lambda *a, stop_ids=(), **k: sound(*a, **k), "generation"),
    "cache slots off by one": Fault("generated text is worse than its loss",
        KVCache, "update",
        lambda sound: lambda self, layer, k, v, at: sound(self, layer, k, v, (at - 1).clamp(min=0)), "cache"),
    "padding attended to": Fault("an answer depends on who else is in the batch",
        KVCache, "mask", lambda sound: lambda self, at: sound(self, at.amax().expand_as(at)), "generation"),
    "random numbers not restored": Fault("a resumed run draws other dropout",
        torch, "set_rng_state", lambda sound: lambda state: None, "resume"),
    "moments not restored": Fault("a bump in the loss after every resume",
        train_state, "_read", parameters_alone, "resume"),
    "data position off by one": Fault("a resumed run skips a batch",
        PackedLoader, "load_state_dict", one_pack_further, "resume"),
    "merged with alpha alone": Fault("the merged model is not the one that was judged",
        LoraLinear, "merged",
        lambda sound: lambda self: (setattr(self, "scale", self.scale * self.lora_A.out_features), sound(self))[1],
        "merge"),
    "adapter rounded to bf16 when saved": Fault("the adapter comes back a little different",
        adapter, "gathered",
        lambda sound: lambda *given: {n: t.bfloat16().float() for n, t in sound(*given).items()},
        "adapter"),
    "model rounded to bf16 when saved": Fault("fp32 was asked for, bf16 is on disk",
        model_directory, "save_model",
        lambda sound: lambda folder, model, tokenizer, dtype, *rest: sound(folder, model, tokenizer, "bf16", *rest),
        "reload"),
    "stop ids lost when saved": Fault("a merged model talks on where its base stopped",
        model_directory, "write_json",
        lambda sound: lambda path, values: sound(path, {k: v[:1] if k == "eos_token_id" and isinstance(v, list) else v
                                                        for k, v in values.items()}), "reload", "more stops"),
    "a tied head loaded as its own": Fault("embedding and head drift apart in training",
        Stored, "load", untied, "reload"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(
    name: str, patients: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promise that nothing checks is kept until somebody changes a line."""
    fault = FAULTS[name]
    sound: Function = getattr(fault.place, fault.function)
    spoiled, calls = fault.spoil(sound), []

    def planted(*given: Any, **named: Any) -> Any:
        calls.append(name)
        return spoiled(*given, **named)

    monkeypatch.setattr(fault.place, fault.function, planted)
    for module in [m for n, m in sys.modules.items() if n.startswith("puna.")]:  # also where it was imported by name
        for attribute in [a for a, value in vars(module).items() if value is sound]:
            monkeypatch.setattr(module, attribute, planted)
    (finding,) = diagnose(opened(patients, fault.kind, tmp_path), [fault.caught_by])
    assert calls, "the fault was never reached"
    assert not finding.ok, finding
    assert not finding.error, "it stopped the check instead of being measured"
    assert finding.cause
