"""LoRA of SmolLM2-135M (rank 16 on every linear layer, full rows): puna beside PEFT on transformers, both in bf16.

python bench/lora.py [--batch 4] [--length 512] [--rounds 5] [--compile]
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from side_by_side import Step, compare

MODEL = "smollm2-135m"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch(rows: int, length: int):
    """Random ids: the cost of a step does not depend on what they say."""
    import torch

    return torch.randint(0, 49152, (rows, length + 1), generator=torch.Generator().manual_seed(0))


def puna_side(rows: int, length: int, compiled: bool) -> Step:
    import torch

    import puna
    from puna.data.loader import Batch
    from puna.lora import LoraConfig, add_lora
    from puna.train.fit import train_step
    from puna.train.objectives import next_token
    from puna.train.optim import OptimizerConfig, build_optimizer

    torch.manual_seed(0)
    model = puna.load(MODEL, dtype="bf16").model
    add_lora(model, LoraConfig(rank=16, alpha=32, targets=TARGETS))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    ids = batch(rows, length)
    micro = [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * length)]
    if compiled:
        from puna.train.compile import compile_blocks

        compile_blocks(model)
    return lambda: train_step(model, optimizer, micro, next_token, 1e-4, 1.0, lambda loss, norm: True)["loss"]


def peft_side(rows: int, length: int, folder: str) -> Step:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, weight_decay=0.0)
    ids = batch(rows, length)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        loss = model(tokens, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    import puna

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        puna.load(MODEL, dtype="bf16").save(path)
        size = {"rows": given.batch, "length": given.length}
        sides = {
            "puna": partial(puna_side, **size, compiled=given.compile),
            "PEFT + transformers": partial(peft_side, **size, folder=str(path)),
        }
        compare(sides, given.batch * given.length, given.rounds)


if __name__ == "__main__":
    main()
