"""A Llama written out: head by head, row by row, from the keys of a config.json and tensors by their names on disk.

The doctor's oracle. It shares nothing with `puna.model` and `puna.ops`, so that a mistake there cannot hide in it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from puna.checkpoint.gguf.file import open_gguf
from puna.errors import CheckpointError

Values = Mapping[str, Any]
Weights = Mapping[str, Tensor]
_LENGTHS = ("low_freq_factor", "high_freq_factor", "original_context_length")
_GGUF = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def logits(values: Values, weights: Weights, ids: Sequence[int], interleaved: bool = False) -> Tensor:
    """(T,) ids -> (T, V) in the weights' dtype. `interleaved`: RoPE pairs neighbours, as in Meta's files and GGUF."""
    heads, dim = values["num_attention_heads"], values["hidden_size"]
    kv_heads = values.get("num_key_value_heads") or heads
    size = values.get("head_dim") or dim // heads
    embedding = weights["model.embed_tokens.weight"]
    cos, sin = _tables(values, size, len(ids), embedding.device)
    future = torch.full((len(ids), len(ids)), -math.inf, device=embedding.device).triu(1)

    def turn(x: Tensor) -> Tensor:  # (T, size)
        a, b = (x[:, 0::2], x[:, 1::2]) if interleaved else (x[:, : size // 2], x[:, size // 2 :])
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=1)  # the order is the same for q and k

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(1, keepdim=True) + values["rms_norm_eps"]).sqrt() * weights[f"model.{name}.weight"]

    x = embedding[torch.tensor(ids, device=embedding.device)]
    for layer in range(values["num_hidden_layers"]):
        place = f"layers.{layer}"
        h = norm(x, f"{place}.input_layernorm")
        q, k, v = (h @ weights[f"model.{place}.self_attn.{n}_proj.weight"].T for n in "qkv")
        answers = []
        for head in range(heads):
            own, shared = head * size, head // (heads // kv_heads) * size
            scores = turn(q[:, own : own + size]) @ turn(k[:, shared : shared + size]).T / math.sqrt(size)
            answers.append((scores + future).softmax(1) @ v[:, shared : shared + size])
        x = x + torch.cat(answers, dim=1) @ weights[f"model.{place}.self_attn.o_proj.weight"].T
        h = norm(x, f"{place}.post_attention_layernorm")
        gate, up = (h @ weights[f"model.{place}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[f"model.{place}.mlp.down_proj.weight"].T
    tied = values.get("tie_word_embeddings", False)
    return norm(x, "norm") @ (embedding if tied else weights["lm_head.weight"]).T


def loss(values: Values, weights: Weights, ids: Sequence[int], trained: Sequence[bool]) -> Tensor:
    """Sum of -log p(id | ids before it) over the trained ids; the first has nothing before it."""
    places = [t for t in range(1, len(ids)) if trained[t]]
    log_p = F.log_softmax(logits(values, weights, ids), dim=1)
    return -sum((log_p[t - 1, ids[t]] for t in places), log_p.new_zeros(()))


def read(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Values, Weights, bool]:
    """What lies on disk: config keys, tensors by name, and whether RoPE pairs neighbours in them."""
    if folder.suffix == ".gguf":
        values, weights = _read_gguf(folder)
    else:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = {n: t for file in folder.glob("model*.safetensors") for n, t in load_file(file).items()}
    return values, {n: t.to(device, dtype) for n, t in weights.items()}, folder.suffix == ".gguf"


def add_adapter(weights: Weights, folder: Path) -> Weights:
    """The weights with scale B A of an adapter directory added, DoRA's rows stretched, and what was trained whole."""
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    added = dict(weights)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in (n for n in tensors if n.endswith(".lora_A.weight")):
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        a, b = (tensors[n].to(weights[target]) for n in (name, name.replace("lora_A", "lora_B")))
        scale = values["lora_alpha"] / (math.sqrt(len(a)) if values.get("use_rslora") else len(a))
        added[target] = weights[target] + scale * (b @ a)
        if values.get("use_dora"):
            length = tensors[name.replace("lora_A.weight", "lora_magnitude_vector")].to(added[target])
            added[target] *= (length / added[target].norm(dim=1))[:, None]
    whole = {n.removeprefix("base_model.model."): t for n, t in tensors.items() if ".lora_" not in n}
    return added | {n: t.to(weights[n]) for n, t in whole.items() if n in weights}  # a tied head is not


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = open_gguf(path)
    found: dict[str, Any] = {k.removeprefix("llama."): v for k, v in file.metadata.items() if k.startswith("llama.")}
    values = {
        "hidden_size": found["embedding_length"],
        "num_hidden_layers": found["block_count"],
        "num_attention_heads": found["attention.head_count"],
        "num_key_value_heads": found.get("attention.head_count_kv"),
        "head_dim": found.get("attention.key_length"),
        "rope_theta": found.get("rope.freq_base", 10000.0),
        "rms_norm_eps": float(f"{found['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, not its nearest fp32
        "tie_word_embeddings": "output.weight" not in file.names(),
    }
    if "rope_freqs.weight" in file.names():
        values["rope_scaling"] = _scaling(values, torch.from_numpy(file.read("rope_freqs.weight")), found)
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names["output.weight"] = "lm_head.weight"
    for name in file.names():
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            names[name] = f"model.layers.{layer}.{_GGUF[part]}.weight"
    return values, {names[n]: torch.from_numpy(file.read(n)) for n in file.names() if n in names}


def _scaling(values: Values, divisors: Tensor, found: Values) -> dict[str, Any] | None:
    """The llama3 scaling that divides by `divisors`, or None; its lengths are Llama 3.1's or told by `found`."""
    turns = _turns(values["rope_theta"], 2 * len(divisors))
    own = [found.get(f"rope.scaling.{key}") for key in _LENGTHS]
    for low, high, old in ((1.0, 4.0, 8192), own):
        if not (low and high and old):
            continue
        for factor in (1.0, 8.0, 32.0, divisors.max().item()):
            rope = {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": old,
            }  # fmt: skip
            if torch.allclose(_stretched(turns, rope), turns / divisors, rtol=1e-4, atol=0):
                return rope if factor != 1 else None
    raise CheckpointError("rope_freqs.weight is not Llama 3.1's scaling")


def _tables(values: Values, size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, size / 2); fp32 as every reader of these weights has them: other digits are another model."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    turns = _turns(values.get("rope_theta") or rope.get("rope_theta") or 10000.0, size)
    if rope.get("rope_type", rope.get("type")) == "llama3":
        turns = _stretched(turns, rope)
    angles = torch.arange(length).float()[:, None] * turns
    return angles.cos().to(device), angles.sin().to(device)


def _turns(theta: float, size: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, size, 2).float() / size)


def _stretched(turns: Tensor, rope: Values) -> Tensor:
    low, high, old = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    scaled = []
    for turn in turns:
        wave = 2 * math.pi / turn
        if wave < old / high:
            scaled.append(turn)
        elif wave > old / low:
            scaled.append(turn / rope["factor"])
        else:
            smooth = (old / wave - low) / (high - low)
            scaled.append((1 - smooth) * turn / rope["factor"] + smooth * turn)
    return torch.stack(scaled)
