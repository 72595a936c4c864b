"""Fine-tune a chat model on conversations: model + conversations -> adapter or model directory in `final/`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.model_directory import save_model
from puna.checkpoint.registry import load_tokenizer
from puna.config import Config as BaseConfig
from puna.config import RecipeConfig, UserPath
from puna.data.conversations import ChatSource, given, read_conversations
from puna.data.packing import PackedLoader, encode_conversations, split_rows
from puna.device import choose_dtype
from puna.dist.collectives import from_first, on_first
from puna.dist.fsdp import shard
from puna.dist.shared import shared_run, stop_together, use_machine
from puna.errors import DataError
from puna.eval.conversations import mean_loss, replies
from puna.eval.tasks import TaskConfig, check_tasks, compare, evaluate_tasks
from puna.files import atomic_folder, write_json
from puna.infer.llama import Llama, load
from puna.infer.rehearsal import rehearsal
from puna.lineage import lineage, parent
from puna.log import clock, harmless, log
from puna.lora import LoraConfig, add_lora, lora_parameters
from puna.ranks import rank
from puna.run_folder import Run
from puna.tokenizer.chat.format import ChatFormat, Encoded, Train, has_template
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.compile import compile_blocks
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


class SampleConfig(BaseConfig):
    """Messages the model answers before training and at every validation, so that one can watch it change."""

    prompts: list[str] = []
    max_tokens: int = 48


class Config(RecipeConfig):
    """Supervised fine-tuning: the assistant's words are trained, everything else is read."""

    recipe: Literal["sft"] = "sft"  # type: ignore[assignment]
    output: UserPath = Path("runs/sft")
    model: str = "runs/pretrain"
    """What to start from: a model or run folder, a .gguf file, or smollm2-135m."""
    data: ChatSource = ChatSource()
    template: str | None = None
    """llama2, llama3, llama3.1, llama3.2, llama3.2-pythonic, llama3.3 or chatml; null takes the model's own."""
    date_string: str = "26 Jul 2024"
    """The day that templates of Llama 3.1 and later name: today's would make other ids of the same data every day."""
    variables: dict[str, Annotated[bool | str | list[str], Field(union_mode="left_to_right")]] = {}
    """What else the template asks for: `builtin_tools: [brave_search, code_interpreter]`, say, of Llama 3.1."""
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
    rehearse: NonNegativeInt = 0
    """Questions the untuned chat model asks and answers itself first; trained along they keep it from forgetting."""
    watch: ChatSource = ChatSource()
    """Conversations of another kind: the loss on them tells what tuning forgets. None by default."""
    judge: TaskConfig = TaskConfig()
    """Tasks to measure before and after: before with solved examples and against the majority answer."""
    samples: SampleConfig = SampleConfig()
    save_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of a fully trained model; adapters are fp32."""
    compile: bool = False
    """Compile what lies around attention (torch.compile): worth it above some minutes of training."""
    train: Training = Training()


def main(config: Config) -> Path:
    """Train on packed conversations and write `final/`. Run again after an interruption, it goes on."""
    with shared_run(config) as run:
        check_tasks(config.judge.tasks)  # what can be wrong in data and tasks is told before anything is computed
        tokenizer, rows = encode(config, load_tokenizer(config.model), config.data)
        watched = encode(config, tokenizer, config.watch)[1] if given(config.watch) else []
        use_machine(run)
        base = _load(config)
        llama = replace(base, tokenizer=tokenizer, stop_ids=list(dict.fromkeys([*base.stop_ids, *tokenizer.stop_ids])))
        train, valid = split_rows(rows, config.valid_fraction)
        if config.rehearse:
            own = partial(rehearsal, llama, config.rehearse, config.seq_len, config.seed)
            train += [Encoded(*row) for row in run.once("rehearsal", own)]
        packed = partial(PackedLoader, seq_len=config.seq_len, batch_size=config.batch_size, pad_id=tokenizer.eos_id)
        batches = packed(train, seed=config.seed)
        what = f"{len(train)} conversations in {len(batches.packs)} rows of {config.seq_len} ids"
        log.info("%s, %d held out", what, len(valid))
        named = {"valid_loss": valid, "watched_loss": watched}
        held_out = {name: packed(rows, seed=0) for name, rows in named.items() if rows}
        parents, asked = [parent(config.model, base.path)], config.model_dump(mode="json")
        made_from = lineage("sft", parents, config=asked, data=batches.fingerprint)
        save: Any = partial(save_model, model=llama.model, save_dtype=config.save_dtype, tokenizer=tokenizer)
        save = partial(save, stop_ids=llama.stop_ids)
        if config.lora:
            save = partial(save_adapter, model=llama.model, config=config.lora, base=config.model, tokenizer=tokenizer)
        evaluate = partial(_evaluate, run=run, llama=llama, config=config, held_out=held_out)
        before = run.once("judged", partial(_judge, base if has_template(base.tokenizer) else llama, config.judge))
        if not from_first(lambda: bool(run.metrics.read())):
            run.samples.rewind(-1)  # of a start that was cut short
            run.metrics.write(step=0, **evaluate(llama.model, 0))
        if config.compile:
            compile_blocks(llama.model)
        shard(llama.model)
        # Of dropout: what was drawn until here differs between a start and a resume.
        torch.manual_seed(config.seed + rank())
        saved = partial(save, lineage=made_from)
        state = fit(run, llama.model, batches, next_token, config.train, config.steps, evaluate, saved)
        result: dict[str, Any] = {"steps": state.step, "tokens": state.tokens, "seconds": state.seconds}
        # Of each loss the last one stays.
        result |= from_first(lambda: {k: row[k] for row in run.metrics.read() for k in held_out if k in row})
        if config.judge.tasks:
            after = _judge(llama, config.judge.model_copy(update={"shots": 0}))
            result["tasks"] = compare(before, after, config.judge)
        stop_together(run, f"all steps are saved in {run.folder}, final/ is not written yet")
        from_first(write_json, run.folder / "result.json", result)
        with on_first(atomic_folder(run.final)) as folder:
            save(folder, lineage={**made_from, "metrics": result})
    log.info("tuned in %s: %s", clock(state.seconds), run.final)
    return config.output


def encode(config: Config, tokenizer: Tokenizer, source: ChatSource) -> tuple[Tokenizer, list[Encoded]]:
    """The tokenizer with the chat template in force, and every conversation of the source as ids and mask."""
    chat = ChatFormat(tokenizer, config.template, **_variables(config))
    rows = encode_conversations(read_conversations(source), chat, config.seq_len, config.train_on)
    return tokenizer.with_template(chat.source), rows


def _variables(config: Config) -> dict[str, Any]:
    return {"date_string": config.date_string, **config.variables}


def _load(config: Config) -> Llama:
    """The base in the compute dtype under adapters, or in fp32 with that compute dtype to train every weight."""
    if config.lora:
        llama = load(config.model, dtype=config.dtype, device=config.device, variables=_variables(config))
        if lora_parameters(llama.model):
            raise DataError("the model is an adapter itself", where=config.model, fix="puna merge it first")
        add_lora(llama.model, config.lora, config.seed)
        count = sum(p.numel() for p in lora_parameters(llama.model).values())
        log.info("training %s adapter weights of rank %d", f"{count:,}", config.lora.rank)
        return llama
    llama = load(config.model, dtype="fp32", device=config.device, variables=_variables(config))
    llama.model.compute_dtype = choose_dtype(config.dtype, next(llama.model.parameters()).device)
    return llama


def _evaluate(
    model: Any, step: int, *, run: Run, llama: Llama, config: Config, held_out: dict[str, PackedLoader]
) -> dict[str, float]:
    """Mean loss over the trained tokens of each held-out set; answers to the fixed prompts go to samples.jsonl."""
    for prompt, answer in replies(llama, config.samples.prompts, config.samples.max_tokens):
        log.info("  %s -> %s", prompt, shorten(harmless(answer).replace("\n", " / "), 100, placeholder=" ..."))
        run.samples.write(step=step, prompt=prompt, text=answer)
    return {name: mean_loss(model, conversations) for name, conversations in held_out.items()}


def _judge(llama: Llama, config: TaskConfig) -> dict[str, str]:
    return {score.task: score.marks for score in evaluate_tasks(llama, config)}
