"""Fine-tune a chat model on conversations: model + conversations -> adapter or model directory in `final/`."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.model_directory import save_model
from puna.config import RecipeConfig, UserPath
from puna.data.conversations import ChatSource, read_conversations
from puna.data.packing import PackedLoader, encode_conversations
from puna.device import calibrate_threads, choose_dtype
from puna.errors import DataError
from puna.files import atomic_folder, write_json
from puna.infer.llama import Llama, load
from puna.log import clock, log
from puna.lora import LoraConfig, add_lora, lora_parameters
from puna.run_folder import lineage, open_run
from puna.tokenizer.chat import ChatFormat, Encoded, Train
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.fit import TrainConfig, fit
from puna.train.objectives import next_token
from puna.train.optim import OptimizerConfig


# Own classes, not a changed default instance: `train.keep=3` builds the section anew from its class.
class Optimizer(OptimizerConfig):
    """Rates of fine-tuning: adapters take 1e-4 to 1e-3, full training about 2e-5."""

    lr: NonNegativeFloat | None = 5e-4
    weight_decay: float = 0.0
    warmup_steps: int = 10


class Training(TrainConfig):
    """As in pretraining, with fine-tuning's optimizer."""

    optimizer: Optimizer = Optimizer()  # type: ignore[assignment]


class Config(RecipeConfig):
    """Supervised fine-tuning: the assistant's words are trained, everything else is read."""

    recipe: Literal["sft"] = "sft"  # type: ignore[assignment]
    output: UserPath = Path("runs/sft")
    model: str = "runs/pretrain"
    """What to start from: a model or run folder, a .gguf file, or smollm2-135m."""
    data: ChatSource = ChatSource()
    template: str | None = None
    """llama3 or chatml; null takes the model's own."""
    train_on: Train = "all"
    """all: every assistant message; last: the last one of each conversation."""
    lora: LoraConfig | None = LoraConfig()
    """Adapters on a frozen base; null trains every weight."""
    seq_len: PositiveInt = 512
    """Ids in a packed row. Longer conversations are cut."""
    batch_size: PositiveInt = 4
    steps: PositiveInt = 200
    valid_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Conversations held out (by hash) to measure the loss on."""
    save_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of a fully trained model; adapters are fp32."""
    train: Training = Training()


def main(config: Config) -> Path:
    """Train on packed conversations and write `final/`. Run again after an interruption, it goes on."""
    with open_run(config) as run:
        torch.set_num_threads(run.once("threads", calibrate_threads))
        llama = _load(config)
        tokenizer, rows = encode(config, llama.tokenizer)
        train, valid = _split(rows, config.valid_fraction)
        batches = PackedLoader(train, config.seq_len, config.batch_size, tokenizer.eos_id, config.seed)
        what = f"{len(train)} conversations in {len(batches.packs)} rows of {config.seq_len} ids"
        log.info("%s, %d held out", what, len(valid))
        held_out = PackedLoader(valid, config.seq_len, config.batch_size, tokenizer.eos_id, 0) if valid else None
        made_from = lineage(config, data=batches.fingerprint, parents=[config.model])
        save: Any = partial(save_model, model=llama.model, save_dtype=config.save_dtype, tokenizer=tokenizer)
        if config.lora:
            save = partial(save_adapter, model=llama.model, config=config.lora, base=config.model, tokenizer=tokenizer)
        evaluate = partial(_evaluate, held_out=held_out)
        saved = partial(save, lineage=made_from)
        state = fit(run, llama.model, batches, next_token, config.train, config.steps, evaluate, saved)
        result: dict[str, Any] = {"steps": state.step, "tokens": state.tokens, "seconds": state.seconds}
        result |= {k: row[k] for row in run.metrics.read() for k in ("valid_loss",) if k in row}  # the last one stays
        with atomic_folder(run.final) as folder:
            save(folder, lineage={**made_from, "metrics": result})
        write_json(run.folder / "result.json", result)
    log.info("tuned in %s: %s", clock(state.seconds), run.final)
    return config.output


def encode(config: Config, tokenizer: Tokenizer) -> tuple[Tokenizer, list[Encoded]]:
    """The tokenizer with the chat template in force, and every conversation as ids and mask."""
    chat = ChatFormat(tokenizer, config.template)
    rows = encode_conversations(read_conversations(config.data), chat, config.seq_len, config.train_on)
    return Tokenizer({**tokenizer.files, "chat_template.jinja": chat.source.encode()}), rows


def _load(config: Config) -> Llama:
    """The base in the compute dtype under adapters, or in fp32 with that compute dtype to train every weight."""
    if config.lora:
        llama = load(config.model, dtype=config.dtype, device=config.device)
        if lora_parameters(llama.model):
            raise DataError("the model is an adapter itself", where=config.model, fix="puna merge it first")
        add_lora(llama.model, config.lora, config.seed)
        count = sum(p.numel() for p in lora_parameters(llama.model).values())
        log.info("training %s adapter weights of rank %d", f"{count:,}", config.lora.rank)
        return llama
    llama = load(config.model, dtype="fp32", device=config.device)
    llama.model.compute_dtype = choose_dtype(config.dtype, next(llama.model.parameters()).device)
    return llama


def _split(rows: Sequence[Encoded], share: float) -> tuple[list[Encoded], list[Encoded]]:
    sides: tuple[list[Encoded], list[Encoded]] = ([], [])
    for row in rows:
        draw = int.from_bytes(hashlib.sha256(repr(row.ids).encode()).digest()[:8], "little") / 2**64
        sides[draw < share].append(row)
    return sides


@torch.no_grad()
def _evaluate(model: Any, _step: int, *, held_out: PackedLoader | None) -> dict[str, float]:
    """Mean loss over the trained tokens of the held-out conversations."""
    if held_out is None:
        return {}
    model.eval()
    device = next(model.parameters()).device
    total, n = 0.0, 0
    for start in range(0, len(held_out.packs), held_out.batch_size):
        batch = held_out.batch(held_out.packs[start : start + held_out.batch_size]).to(device)
        total, n = total + float(next_token(model, batch).sum), n + batch.n
    return {"valid_loss": total / n}
