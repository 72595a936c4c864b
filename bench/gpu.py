"""Training on a CUDA card, puna beside transformers (+ PEFT): `bench/gpu.sh` runs it all.

python bench/gpu.py pretrain|lora --model PRESET [--batch N] [--length N] [--rounds N] [--device cpu]
`--device cpu` with a small preset tries the script where there is no card. Gradients are compared on 256 tokens.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from lora import start
from side_by_side import Work, compare

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch(given: argparse.Namespace, vocab: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (given.batch, given.length + 1), generator=generator).to(given.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def watched(given: argparse.Namespace) -> list[str]:
    """Weights whose gradients are compared: of the first layer and the last, under puna's names."""
    from puna.model.presets import PRESETS

    wanted = ["self_attn.q_proj", "mlp.down_proj"]
    kinds = ["lora_A.weight", "lora_B.weight"] if given.what == "lora" else ["weight"]
    return [f"layers.{i}.{w}.{k}" for i in (0, PRESETS[given.model].n_layers - 1) for w in wanted for k in kinds]


def gradients_of(parameters: dict[str, Any], backward: Any) -> dict[str, Any]:
    """What `backward` leaves in these parameters; nothing is kept on the card, where three libraries have to fit."""
    import gc

    import torch

    backward()
    found = {name: parameter.grad.float().cpu() for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    return found


def puna_side(given: argparse.Namespace, folder: str) -> Work:
    import torch

    from puna.data.loader import Batch
    from puna.lora import LoraConfig, add_lora, lora_parameters
    from puna.train.fit import train_step
    from puna.train.objectives import next_token
    from puna.train.optim import OptimizerConfig, build_optimizer

    model = puna_model(folder, given.device, torch.float32 if given.what == "pretrain" else torch.bfloat16)
    if given.what == "lora":
        add_lora(model, LoraConfig(rank=16, alpha=32, targets=TARGETS))
        start(lora_parameters(model))
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-5))
    tokens, labels = batch(given, model.config.vocab_size)
    micro = [Batch(tokens, labels, labels.numel())]

    def gradients() -> dict[str, Any]:
        few = [x[:1, :256].contiguous() for x in (tokens, labels)]
        all_of_them = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = gradients_of(
            all_of_them, lambda: (next_token(model, Batch(*few, few[1].numel())).sum / few[1].numel()).backward()
        )
        return {name: found[name] for name in watched(given)}

    def step() -> float:
        loss = train_step(model, optimizer, micro, next_token, 1e-5, 1.0, lambda loss, norm: True)["loss"]
        if torch.device(given.device).type == "cuda":
            torch.cuda.synchronize()
        return loss

    return Work(step, gradients)


def puna_model(folder: str, device: str, dtype: Any):
    """The weights of a directory in `dtype`, computing in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    from puna.checkpoint.names import from_disk_name, from_hf_config
    from puna.model.init import build_model, materialize

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = build_model(from_hf_config(theirs.config.to_dict(), Path(folder)), torch.bfloat16)
    materialize(model, torch.device(device), dtype)
    model.load_state_dict({from_disk_name(name): value for name, value in theirs.state_dict().items()})
    return model


def transformers_side(given: argparse.Namespace, folder: str, exact: bool = False) -> Work:
    """`exact`: all in fp32, whose gradients the others are held against."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if exact or given.what == "pretrain" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(given.device)
    before = "model."
    if given.what == "lora":
        import peft

        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
        model, before = peft.get_peft_model(model, config), "base_model.model.model."
    model.train()
    named = {n.removeprefix(before).replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    if given.what == "lora":
        start(named)
    tokens, labels = batch(given, model.config.vocab_size)
    optimizer = torch.optim.AdamW(list(named.values()), lr=1e-5, fused=True)
    mixed = given.what == "pretrain" and not exact

    def loss_of(tokens: Any, labels: Any) -> Any:
        with torch.autocast(torch.device(given.device).type, torch.bfloat16, enabled=mixed):
            return model(tokens, shift_labels=labels, labels=labels).loss

    def gradients() -> dict[str, Any]:
        found = gradients_of(named, lambda: loss_of(tokens[:1, :256], labels[:1, :256]).backward())
        return {name: found[name] for name in watched(given)}

    def step() -> float:
        loss = loss_of(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Work(step, gradients)


def flops_per_token(given: argparse.Namespace) -> float:
    """6 N + 12 L H D T (4 N when the base is frozen); N without the embedding."""
    from puna.model.config import count_parameters
    from puna.model.presets import PRESETS

    shape = PRESETS[given.model]
    n = count_parameters(shape) - (0 if shape.tie_embeddings else shape.vocab_size * shape.dim)
    return (4 if given.what == "lora" else 6) * n + 12 * shape.n_layers * shape.n_heads * shape.head_dim * given.length


def write_model(path: Path, preset: str) -> None:
    """Random weights of a preset as a Hugging Face directory in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from puna.checkpoint.names import to_hf_config
    from puna.model.presets import PRESETS

    values = to_hf_config(PRESETS[preset], torch.bfloat16, 1, 2)
    config = LlamaConfig(**{k: v for k, v in values.items() if k not in ("architectures", "model_type", "torch_dtype")})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pretrain", "lora"])
    parser.add_argument("--model", default="llama3.2-1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), given.model)
        sides = {"puna": partial(puna_side, given, folder), "transformers": partial(transformers_side, given, folder)}
        print(f"{given.what} {given.model}, {given.batch} x {given.length}")
        started = time.perf_counter()
        exact = partial(transformers_side, given, folder, exact=True)
        units = given.batch * given.length
        # Under autocast the peer's residual stream is fp32, ours is bf16.
        near = 2.0 if given.what == "pretrain" else 1.2
        speeds = compare(sides, units, given.rounds, loss_within=5e-2, gradients_within=near, reference=exact,
                         device=given.device)  # fmt: skip
        for name, speed in speeds.items():
            print(f"{name}: {_share(speed * flops_per_token(given), given.device)}")
        print(f"{time.perf_counter() - started:.0f} s in all")


def _share(flops: float, device: str) -> str:
    import torch

    card = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else device
    peak = next((value for name, value in PEAK.items() if name in card), None)
    return f"{flops / 1e12:.2f} TFLOP/s" + (f", MFU {flops / peak:.1%}" if peak else f" ({card}: peak not known)")


if __name__ == "__main__":
    main()
