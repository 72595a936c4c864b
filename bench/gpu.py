"""One measurement on a CUDA card, puna beside transformers (+ PEFT): `bench/gpu.sh` runs them all.

python bench/gpu.py pretrain|lora|decode --model PRESET [--batch N] [--length N] [--rounds N] [--device cpu]
`--device cpu` with a small preset tries the script where there is no card.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import Work, compare

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch(given: argparse.Namespace, vocab: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (given.batch, given.length + 1), generator=generator).to(given.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def puna_side(given: argparse.Namespace, folder: str) -> Work:
    import torch

    from puna.data.loader import Batch
    from puna.infer.generate import generate
    from puna.lora import LoraConfig, add_lora
    from puna.train.fit import train_step
    from puna.train.objectives import next_token
    from puna.train.optim import OptimizerConfig, build_optimizer

    model = _puna_model(folder, given)
    if given.what == "decode":
        prompts = batch(given, model.config.vocab_size)[0][:, :16].tolist()
        return Work(partial(_decode, lambda: generate(model, prompts, max_tokens=given.length), given.device))
    if given.what == "lora":
        add_lora(model, LoraConfig(rank=16, alpha=32))
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-5))
    tokens, labels = batch(given, model.config.vocab_size)
    micro = [Batch(tokens, labels, labels.numel())]

    def step() -> float:
        loss = train_step(model, optimizer, micro, next_token, 1e-5, 1.0, lambda loss, norm: True)["loss"]
        if torch.device(given.device).type == "cuda":
            torch.cuda.synchronize()
        return loss

    return Work(step)


def _puna_model(folder: str, given: argparse.Namespace):
    """Full training: fp32 weights computing in bf16. A frozen base, and one that decodes: bf16 weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from puna.checkpoint.names import from_disk_name, from_hf_config
    from puna.model.init import build_model, materialize

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = build_model(from_hf_config(theirs.config.to_dict(), Path(folder)), torch.bfloat16)
    materialize(model, torch.device(given.device), torch.float32 if given.what == "pretrain" else torch.bfloat16)
    model.load_state_dict({from_disk_name(name): value for name, value in theirs.state_dict().items()})
    return model


def transformers_side(given: argparse.Namespace, folder: str) -> Work:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if given.what == "pretrain" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(given.device)
    tokens, labels = batch(given, model.config.vocab_size)
    if given.what == "decode":
        prompt = tokens[:, :16]
        limits = {"max_new_tokens": given.length, "min_new_tokens": given.length, "do_sample": False, "pad_token_id": 0}
        return Work(partial(_decode, lambda: model.generate(prompt, **limits), given.device))
    if given.what == "lora":
        import peft

        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> float:
        with torch.autocast(torch.device(given.device).type, torch.bfloat16, enabled=given.what == "pretrain"):
            loss = model(tokens, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Work(step)


def _decode(generate: Any, device: str) -> float:
    import torch

    generate()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return 0.0


def flops_per_token(given: argparse.Namespace) -> float:
    """6 N + 12 L H D T for training (4 N when the base is frozen), 2 N for decoding; N without the embedding."""
    from puna.model.config import count_parameters
    from puna.model.presets import PRESETS

    shape = PRESETS[given.model]
    n = count_parameters(shape) - (0 if shape.tie_embeddings else shape.vocab_size * shape.dim)
    if given.what == "decode":
        return 2 * n
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
    parser.add_argument("what", choices=["pretrain", "lora", "decode"])
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
        speeds = compare(sides, given.batch * given.length, given.rounds, loss_within=5e-2, device=given.device)
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
