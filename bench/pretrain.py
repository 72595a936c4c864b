"""Pretraining steps of a small Llama in bf16: puna beside transformers, litgpt and torchtune, equal weights and ids.

python bench/pretrain.py [--vocab 32000] [--batch 4] [--length 512] [--rounds 5] [--compile]
The peers are not among puna's dependencies: pip install litgpt, pip install torchtune; those missing are left out.
puna keeps fp32 weights and computes in bf16; the peers train bf16 weights, which is their fastest setting.
"""

import argparse
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import Work, compare

LAYERS, DIM, HEADS, FFN = 8, 512, 8, 1376
WATCHED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.7.mlp.down_proj.weight", "lm_head.weight")


def batch(rows: int, length: int, vocab: int):
    import torch

    ids = torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def write_model(path: Path, vocab: int) -> None:
    """Fresh weights as a Hugging Face directory, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        intermediate_size=FFN, vocab_size=vocab, max_position_embeddings=2048, tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)


def puna_side(folder: str, size: tuple[int, int, int], compiled: bool) -> Work:
    import torch
    from safetensors.torch import load_file

    from puna.data.loader import Batch
    from puna.model.config import ModelConfig
    from puna.model.init import build_model, materialize
    from puna.ops.native.allocator import fit_holes
    from puna.train.blocks import compile_blocks
    from puna.train.fit import train_step
    from puna.train.objectives import next_token
    from puna.train.optim import OptimizerConfig, build_optimizer

    fit_holes()  # as its recipes do
    shape = ModelConfig(
        dim=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=HEADS, head_dim=DIM // HEADS, ffn_dim=FFN,
        vocab_size=size[2], max_seq_len=2048, rope_theta=1e4, rope_scaling=None, norm_eps=1e-5,
        tie_embeddings=False,
    )  # fmt: skip
    model = build_model(shape, torch.bfloat16)
    materialize(model, torch.device("cpu"))
    weights = load_file(f"{folder}/model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    del weights
    if compiled:
        compile_blocks(model)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4))
    micro = [Batch(*batch(*size), size[0] * size[1])]

    def gradients() -> dict[str, Any]:
        loss = next_token(model, micro[0])
        (loss.sum / micro[0].n).backward()
        found = {n: model.get_parameter(n.removeprefix("model.")).grad.clone() for n in WATCHED}
        optimizer.zero_grad(set_to_none=True)
        return found

    return Work(
        lambda: train_step(model, optimizer, micro, next_token, 1e-4, 1.0, lambda loss, norm: True)["loss"], gradients
    )


def trainer(model: Any, forward: Any, names: dict[str, str], fused: bool = True) -> Work:
    """A peer's step: loss, clipped gradient, fused AdamW; `names` says where it keeps the watched weights."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused, weight_decay=0.1, betas=(0.9, 0.95))

    def gradients() -> dict[str, Any]:
        forward().backward()
        found = {name: model.get_parameter(where).grad.clone() for name, where in names.items()}
        optimizer.zero_grad(set_to_none=True)
        return found

    def step() -> float:
        loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Work(step, gradients)


def transformers_side(folder: str, size: tuple[int, int, int], dtype: str = "bfloat16") -> Work:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    tokens, labels = batch(*size)
    return trainer(model, lambda: model(tokens, shift_labels=labels, labels=labels).loss, {n: n for n in WATCHED})


def litgpt_side(folder: str, size: tuple[int, int, int]) -> Work:
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    config = Config(
        n_layer=LAYERS, n_embd=DIM, n_head=HEADS, n_query_groups=HEADS, intermediate_size=FFN, vocab_size=size[2],
        padded_vocab_size=size[2], block_size=size[1], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = GPT(config)
    theirs = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight"}
    theirs["lm_head.weight"] = "lm_head.weight"
    for i in range(LAYERS):
        for to, of in {
            "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
            "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
        }.items():  # fmt: skip
            theirs[f"transformer.h.{i}.{to}.weight"] = f"model.layers.{i}.{of}.weight"
    weights = load_file(f"{folder}/model.safetensors")
    state = {name: weights[of] for name, of in theirs.items()}
    for i in range(LAYERS):
        parts = [weights[f"model.layers.{i}.self_attn.{p}_proj.weight"] for p in "qkv"]
        state[f"transformer.h.{i}.attn.qkv.weight"] = torch.cat(parts)
    model.load_state_dict(state, strict=False)
    model.to(torch.bfloat16)
    tokens, labels = batch(*size)
    watched = {of: name for name, of in theirs.items() if of in WATCHED}
    return trainer(model, lambda: chunked_cross_entropy(model(tokens), labels, chunk_size=0), watched)


def torchtune_side(folder: str, size: tuple[int, int, int]) -> Work:
    import torch
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama2 import llama2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from transformers import AutoModelForCausalLM

    model = llama2(
        vocab_size=size[2], num_layers=LAYERS, num_heads=HEADS, num_kv_heads=HEADS, embed_dim=DIM,
        max_seq_len=2048, intermediate_dim=FFN, norm_eps=1e-5,
    )  # fmt: skip
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model.load_state_dict(hf_to_tune(weights, num_heads=HEADS, num_kv_heads=HEADS, dim=DIM), strict=False)
    model.to(torch.bfloat16)
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    tokens, labels = batch(*size)
    watched = {"model.layers.7.mlp.down_proj.weight": "layers.7.mlp.w2.weight", "lm_head.weight": "output.weight"}
    return trainer(model, lambda: loss(model(tokens), labels), watched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    size = (given.batch, given.length, given.vocab)
    peers = {"transformers": transformers_side, "litgpt": litgpt_side, "torchtune": torchtune_side}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), given.vocab)
        sides = {"puna": partial(puna_side, folder, size, given.compile)}
        sides |= {name: partial(side, folder, size) for name, side in peers.items() if importlib.util.find_spec(name)}
        reference = partial(transformers_side, folder, size, dtype="float32")
        matrices = LAYERS * (4 * DIM * DIM + 3 * DIM * FFN) + DIM * given.vocab
        flops = 6 * matrices + 6 * LAYERS * DIM * given.length  # forward 2, backward 4; attention is causal
        near = 0.04 if "litgpt" in sides else 0.01  # whose loss is bf16: at 10 its numbers lie 0.06 apart
        compare(sides, given.batch * given.length, given.rounds, reference=reference, flops=flops, loss_within=near)


if __name__ == "__main__":
    main()
