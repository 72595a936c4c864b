"""torchtune's configs as puna's: what each rule writes, what is named as lost, what is refused.

`PUNA_TORCHTUNE_CONFIGS` names torchtune 0.6.1's wheel, or a folder of its configs: then all of them are migrated, and
each takes two steps on a tiny model.
"""

import json
import os
import re
import shlex
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import commands, puna_forked
from typer.main import get_command

from puna.cli import app
from puna.config import parse_words, plain, read_yaml
from puna.errors import UsageError
from puna.migrate.page import KNOBS, Page, scalar, written
from puna.migrate.torchtune import migrated
from puna.recipes import CONFIGS, config_file, load, recipe_of, run

LORA = """\
# tune run --nnodes 1 --nproc_per_node 2 lora_finetune_distributed --config mine
output_dir: runs/mine
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: [q_proj, output_proj]
  apply_lora_to_mlp: True
  lora_rank: 4
  lora_alpha: 32
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: weights/original/tokenizer.model
  max_seq_len: 1024
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: weights/
  checkpoint_files: [model.safetensors]
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: True
seed: 7
shuffle: True
batch_size: 3
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 50
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
epochs: 2
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: 0.5
compile: True
metric_logger:
  _component_: torchtune.training.metric_logging.WandBLogger
  project: llamas
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
"""
FULL = LORA.replace("torchtune.models.llama3_1.lora_llama3_1_8b", "torchtune.models.llama3_1.llama3_1_8b").replace(
    "  lora_attn_modules: [q_proj, output_proj]\n  apply_lora_to_mlp: True\n  lora_rank: 4\n  lora_alpha: 32\n", ""
)


def page(folder: Path, text: str = LORA, **changes: str) -> Page:
    """The page of a config; `changes` are pieces of text for others in it, `new=` is appended."""
    for old, new in changes.items():
        text = text + new if old == "new" else text.replace(old, new)
    file = folder / "theirs.yaml"
    file.write_text(text)
    return migrated(file)


def change(folder: Path, old: str, new: str, text: str = LORA) -> Page:
    assert old in text, "the piece that is changed is not there"
    return page(folder, text.replace(old, new))


def test_a_lora_config_is_carried_over_value_by_value(tmp_path: Path) -> None:
    """A value that got lost or a default of puna's in the place of torchtune's: another run under the same name."""
    assert page(tmp_path).given() == {
        "recipe": "sft", "output": "runs/mine", "seed": 7, "dtype": "bf16", "model": "weights", "template": "llama3",
        "quantize": None, "lora.rank": 4, "lora.alpha": 32, "lora.dropout": 0.0, "lora.dora": False,
        "lora.targets": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "data.hub": "yahma/alpaca-cleaned", "data.split": "train", "data.format": "alpaca",
        "train_on": ["assistant", "user"], "seq_len": 1024, "packed": True, "batch_size": 6, "valid_fraction": 0.0,
        "epochs": 2, "compile": True, "train.accumulate": 8, "train.checkpoint_activations": "full",
        "train.offload_activations": False, "train.track": ["wandb"], "train.optimizer.kind": "adamw",
        "train.optimizer.lr": 3e-4, "train.optimizer.betas": [0.9, 0.999], "train.optimizer.eps": 1e-8,
        "train.optimizer.weight_decay": 0.01, "train.optimizer.clip": 0.5, "train.optimizer.warmup_steps": 50,
        "train.optimizer.final_lr": 0.0,
    }  # fmt: skip


def test_every_line_says_which_way_it_pushes(tmp_path: Path) -> None:
    """A config without reasons: what torchtune's users liked about theirs is gone."""
    made = page(tmp_path)
    text = written(made, "theirs.yaml", "ours.yaml")
    for key in made.given():
        assert KNOBS.get(key) or key == "recipe" or key.startswith("data."), key
    assert plain(read_yaml(file_of(tmp_path, text)))["train"]["optimizer"]["lr"] == 3e-4
    assert "puna run sft --config ours.yaml --nproc 2" in text
    assert all(len(line) <= 160 for line in text.splitlines())


def file_of(folder: Path, text: str) -> Path:
    (folder / "ours.yaml").write_text(text)
    return folder / "ours.yaml"


def test_values_survive_the_page(tmp_path: Path) -> None:
    """A text that YAML reads as a number or a switch; a float that loses digits on the page."""
    for value in (
        "on",
        "1e3",
        "0x10",
        "a: b",
        "null",
        "~",
        "runs/x",
        "",
        "ü #",
        2e-5,
        3.0e-4,
        1e-8,
        0.1,
        7,
        None,
        True,
    ):
        assert plain(read_yaml(file_of(tmp_path, f"x: {scalar(value)}\n")))["x"] == value
    assert plain(read_yaml(file_of(tmp_path, f"x: {scalar({'a': ['b c', 1]})}\n")))["x"] == {"a": ["b c", 1]}


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("lora_llama3_1_8b", "qlora_llama3_1_8b", "quantize", "nf4"),
        ("  lora_rank: 4", "  quantize_base: True\n  lora_rank: 4", "quantize", "nf4"),
        ("  lora_rank: 4", "  use_dora: True\n  lora_rank: 4", "lora.dora", True),
        ("  lora_rank: 4\n  lora_alpha: 32\n", "", "lora.alpha", 16),
        ("apply_lora_to_mlp: True", "apply_lora_to_output: True", "lora.targets", ["q_proj", "o_proj", "lm_head"]),
        ("max_seq_len: 1024", "max_seq_len: null", "seq_len", 2048),
        ("packed: True", "packed: off", "packed", False),
        ("packed: True", "train_on_input: False", "train_on", "all"),
        ("packed: True", "masking_strategy: train_on_last", "train_on", "last"),
        ("packed: True", 'split: "train[:500]"', "data.limit", 500),
        ("alpaca_cleaned_dataset", "alpaca_dataset", "data.hub", "tatsu-lab/alpaca"),
        ("seed: 7", "seed: null", "seed", 0),
        ("max_steps_per_epoch: null", "max_steps_per_epoch: 30", "steps", 60),
        ("  fused: True", "  betas: [0.8, 0.9]", "train.optimizer.betas", [0.8, 0.9]),
        ("clip_grad_norm: 0.5", "clip_grad_norm: null", "train.optimizer.clip", 0.0),
        ("clip_grad_norm: 0.5", "clip_grad_norm: inf", "train.optimizer.clip", 0.0),
        ("enable_activation_checkpointing: True", "ac_mode: selective", "train.checkpoint_activations", "selective"),
        ("enable_activation_checkpointing: True", "", "train.checkpoint_activations", "none"),
        (
            "enable_activation_offloading: False",
            "enable_activation_offloading: True",
            "train.offload_activations",
            True,
        ),
        ("WandBLogger", "TensorBoardLogger", "train.track", ["tensorboard"]),
        ("dtype: bf16", "dtype: fp32", "dtype", "fp32"),
        ("device: cuda", "device: cpu", "device", "cpu"),
        ("# tune run --nnodes 1 --nproc_per_node 2", "#", "batch_size", 3),
        ("llama3.llama3_tokenizer", "llama2.llama2_tokenizer", "template", "llama2"),
        ("output_dir: runs/mine", "base: runs\noutput_dir: ${base}/mine", "output", "runs/mine"),
    ],
)
def test_a_rule(tmp_path: Path, old: str, new: str, key: str, value: Any) -> None:
    """One key of torchtune's that no longer means what it meant."""
    assert change(tmp_path, old, new).given()[key] == value


def test_a_constant_rate_stays_constant(tmp_path: Path) -> None:
    """Full configs have no schedule; puna's default cosine would end at a tenth."""
    start, end = FULL.index("lr_scheduler:"), FULL.index("loss:")
    given = page(tmp_path, FULL[:start] + FULL[end:]).given()
    assert given["lora"] is None
    assert (given["train.optimizer.warmup_steps"], given["train.optimizer.final_lr"]) == (0, 1.0)


def test_the_optimizer_in_the_backward_pass(tmp_path: Path) -> None:
    """It excludes clipping, accumulation and the guard; a config that has both is told so, not half obeyed."""
    with pytest.raises(UsageError, match="takes no accumulation"):
        change(tmp_path, "compile: True", "optimizer_in_bwd: True")
    alone = FULL.replace("gradient_accumulation_steps: 8\nclip_grad_norm: 0.5", "optimizer_in_bwd: True")
    alone = alone.replace("--nproc_per_node 2", "")
    given = page(tmp_path, alone).given()
    assert given["train.optimizer.in_backward"] is True
    assert (given["train.accumulate"], given["train.optimizer.clip"], given["train.skip_budget"]) == (1, 0.0, 0)


def test_several_devices_have_what_they_can_have(tmp_path: Path) -> None:
    """8-bit moments and steps in the backward are of one process: puna would have refused the migrated config."""
    old = "gradient_accumulation_steps: 8\nclip_grad_norm: 0.5"
    new = "gradient_accumulation_steps: 1\noptimizer_in_bwd: True"
    made = change(tmp_path, old, new)
    assert made.ranks == 2
    assert made.lost["optimizer_in_bwd"]
    assert "train.optimizer.in_backward" not in made.given()
    for name in ("bitsandbytes.optim.PagedAdamW8bit", "torchao.prototype.low_bit_optim.AdamW8bit"):
        eight = change(tmp_path, "torch.optim.AdamW", name)
        assert eight.given()["train.optimizer.kind"] == "adamw"
        alone = change(tmp_path, "torch.optim.AdamW", name, LORA.replace("--nproc_per_node 2", ""))
        assert alone.given()["train.optimizer.kind"] == "adamw8bit"


def test_what_bf16_weights_lose_is_told_of_bf16_alone(tmp_path: Path) -> None:
    """`torchtune keeps weights in bf16` of a config that says fp32."""
    (tmp_path / "full.yaml").write_text(FULL)
    assert "dtype of the weights" in migrated(tmp_path / "full.yaml").lost
    (tmp_path / "full.yaml").write_text(FULL.replace("dtype: bf16", "dtype: fp32"))
    assert "dtype of the weights" not in migrated(tmp_path / "full.yaml").lost


def test_quantization_aware_training(tmp_path: Path) -> None:
    """The rounding that is trained for must be the one that is named for afterwards."""
    quantizer = "quantizer:\n  _component_: torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer\n"
    made = page(tmp_path, FULL + quantizer + "  groupsize: 128\n")
    assert (made.given()["qat.scheme"], made.given()["qat.group"]) == ("int8-int4", 128)
    assert "puna quantize runs/mine runs/mine-int8-int4 --scheme int8-int4 --group 128" in made.after.values()
    assert made.method == "QAT of llama3_1_8b"
    assert page(tmp_path, LORA + quantizer).method == "QAT with LoRA of llama3_1_8b"
    with pytest.raises(UsageError, match="does not train for"):
        page(tmp_path, LORA + quantizer.replace("Int8DynActInt4WeightQAT", "Int8Mixed"))


@pytest.mark.parametrize(
    ("loss", "divergence"),
    [("ForwardKLLoss", "forward"), ("ReverseKLWithChunkedOutputLoss", "reverse"), ("SymmetricKLLoss", "symmetric")],
)
def test_distillation(tmp_path: Path, loss: str, divergence: str) -> None:
    """A teacher that was left out, or the divergence turned around."""
    teacher = (
        "teacher_model:\n  _component_: torchtune.models.llama3_1.llama3_1_8b\n"
        "teacher_checkpointer:\n  _component_: torchtune.training.FullModelHFCheckpointer\n  checkpoint_dir: big\n"
        f"kd_ratio: 0.25\nkd_loss:\n  _component_: torchtune.modules.loss.{loss}\n"
    )
    given = page(tmp_path, LORA + teacher).given()
    assert {key: value for key, value in given.items() if key.startswith("distill")} == {
        "distill.teacher": "big", "distill.ratio": 0.25, "distill.divergence": divergence, "distill.temperature": 1.0,
    }  # fmt: skip


DATASETS = {
    "instruct_dataset\n  source: json\n  data_files: my.json\n  column_map: {input: q, output: a}": {
        "data.path": "my.json", "data.format": "columns", "data.columns": {"prompt": "q", "completion": "a"},
    },
    "instruct_dataset\n  source: org/set\n  data_files: part.csv": {
        "data.hub": "org/set", "data.file": "part.csv", "data.split": "train", "data.format": "columns",
        "data.columns": {"prompt": "input", "completion": "output"},
    },
    "chat_dataset\n  source: org/set\n  conversation_column: talk\n  conversation_style: sharegpt": {
        "data.hub": "org/set", "data.split": "train", "data.format": "sharegpt",
        "data.columns": {"messages": "talk"},
    },
    "chat_dataset\n  source: json\n  data_files: c.jsonl\n  conversation_style: openai": {
        "data.path": "c.jsonl", "data.format": "openai",
    },
    "slimorca_dataset": {"data.hub": "Open-Orca/SlimOrca-Dedup", "data.split": "train", "data.format": "sharegpt"},
    "alpaca_dataset\n  column_map: {instruction: ask, input: about, output: say}": {
        "data.hub": "tatsu-lab/alpaca", "data.split": "train", "data.format": "columns",
        "data.columns": {"prompt": "{ask}\n\n{about}", "completion": "say"},
    },
    "samsum_dataset": {
        "data.hub": "Samsung/samsum", "data.split": "train", "data.format": "columns",
        "data.columns": {"prompt": "dialogue", "completion": "summary"},
    },
    "grammar_dataset": {
        "data.hub": "liweili/c4_200m", "data.split": "train", "data.format": "columns",
        "data.columns": {"prompt": "input", "completion": "output"},
    },
    "cnn_dailymail_articles_dataset": {
        "data.hub": "ccdv/cnn_dailymail", "data.file": "3.0.0/*", "data.split": "train", "data.format": "text",
        "data.columns": {"text": "article"},
    },
    "wikitext_dataset\n  subset: wikitext-2-v1": {
        "data.hub": "EleutherAI/wikitext_document_level", "data.file": "wikitext-2-v1/*", "data.split": "train",
        "data.format": "text", "data.columns": {"text": "page"},
    },
    "text_completion_dataset\n  source: json\n  data_files: books.jsonl\n  column: body": {
        "data.path": "books.jsonl", "data.format": "text", "data.columns": {"text": "body"},
    },
}  # fmt: skip


@pytest.mark.parametrize("written_as", DATASETS, ids=lambda text: text.split("\n")[0])
def test_dataset_builders(tmp_path: Path, written_as: str) -> None:
    """The wrong column as the answer, or another data set than the builder's."""
    given = change(tmp_path, "alpaca_cleaned_dataset", written_as).given()
    assert {key: value for key, value in given.items() if key.startswith("data.")} == DATASETS[written_as]


def test_validation_rows(tmp_path: Path) -> None:
    """The last tenth, on which nothing is trained, is trained on; or a set of its own is taken for held out."""
    part = 'dataset_val:\n  _component_: torchtune.datasets.alpaca_cleaned_dataset\n  split: "SPLIT"\n'
    text = LORA.replace("packed: True", 'packed: True\n  split: "train[:90%]"') + part + "run_val_every_n_steps: 20\n"
    made = page(tmp_path, text.replace("SPLIT", "train[90%:]"))
    assert made.given()["valid_fraction"] == pytest.approx(0.1)
    assert made.given()["train.evaluate_every"] == 20
    assert "dataset.split" not in made.lost
    apart = page(tmp_path, text.replace("SPLIT", "test"))
    assert (apart.given()["valid.split"], apart.given()["valid_fraction"]) == ("test", 0.0)
    assert "dataset.split" in apart.lost


def test_text_around_a_column(tmp_path: Path) -> None:
    """The question without the words that torchtune's prompt templates put around it; braces taken for columns."""
    text = LORA.replace("alpaca_cleaned_dataset", "samsum_dataset")
    limit = "  max_seq_len: 1024\n"
    named = change(tmp_path, limit, f"{limit}  prompt_template: torchtune.data.SummarizeTemplate\n", text)
    assert named.given()["data.columns"]["prompt"] == "Summarize this dialogue:\n{dialogue}\n---\nSummary:\n"
    own = change(tmp_path, limit, limit + '  prompt_template: {user: ["{Q} ", " A:"], assistant: ["", ""]}\n', text)
    assert own.given()["data.columns"]["prompt"] == "{{Q}} {dialogue} A:"
    answered = change(tmp_path, limit, limit + '  prompt_template: {user: ["", ""], assistant: ["A", ""]}\n', text)
    assert "tokenizer.prompt_template" in answered.lost
    assert "tokenizer.prompt_template" not in own.lost | named.lost


def test_several_datasets_are_a_mixture(tmp_path: Path) -> None:
    """The second of two sets is dropped, or both under one name."""
    mixture = (
        "dataset:\n  - _component_: torchtune.datasets.alpaca_dataset\n    source: a/rows\n"
        "  - _component_: torchtune.datasets.instruct_dataset\n    source: b/rows\n    odd: 1\n"
    )
    old = "dataset:\n  _component_: torchtune.datasets.alpaca_cleaned_dataset\n  packed: True\n"
    made = change(tmp_path, old, mixture)
    assert made.given()["data.sources.rows.hub"] == "a/rows"
    assert made.given()["data.sources.rows_1.hub"] == "b/rows"
    assert {"dataset.train_on_input", "dataset.odd"} <= made.lost.keys()


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("shuffle: True", "shuffle: False", "shuffle"),
        ("seed: 7", "sede: 7", "sede"),
        ("  lora_rank: 4", "  lora_rnak: 4", "model.lora_rnak"),
        ("  packed: True", "  new_system_prompt: Be kind.", "dataset.new_system_prompt"),
        ("  packed: True", "  filter_fn: f", "dataset.filter_fn"),
        ("  packed: True", '  split: "train[:10%]"', "dataset.split"),
        ("weights/original", "elsewhere", "tokenizer.path"),
        ("max_seq_len: 1024", "prompt_template: torchtune.data.SummarizeTemplate", "tokenizer.prompt_template"),
        ("resume_from_checkpoint: False", "resume_from_checkpoint: True", "resume_from_checkpoint"),
        ("resume_from_checkpoint: False", "fsdp_cpu_offload: True", "fsdp_cpu_offload"),
        ("resume_from_checkpoint: False", "tensor_parallel_dim: 2", "tensor_parallel_dim"),
        ("  project: llamas", "  project: llamas", "metric_logger.project"),
        ("WandBLogger", "CometLogger", "metric_logger"),
        ("torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW", "optimizer (paged)"),
        ("dtype: bf16", "dtype: fp16", "dtype"),
        ("compile: True", "profiler: {enabled: True}", "profiler"),
        ("alpaca_cleaned_dataset", "alpaca_cleaned_dataset", "dataset: frame"),
        ("max_steps_per_epoch: null", "max_steps_per_epoch: 100", "max_steps_per_epoch"),
        ("torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit", "optimizer (8-bit)"),
    ],
)
def test_what_is_lost_is_named(tmp_path: Path, old: str, new: str, lost: str) -> None:
    """A key that is dropped in silence, a misspelt one among them: torchtune itself ignores those."""
    made = change(tmp_path, old, new)
    assert made.lost[lost]
    assert lost in written(made, "theirs.yaml", "ours.yaml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("torchtune.models.llama3_1.lora_llama3_1_8b", "torchtune.models.gemma.lora_gemma_2b", "family gemma"),
        ("torchtune.models.llama3_1.lora_llama3_1_8b", "torchtune.models.qwen2_5.qwen2_5_3b", "family qwen2_5"),
        ("llama3_1.lora_llama3_1_8b", "llama3_2_vision.lora_llama3_2_vision_11b", "reads images"),
        ("torchtune.models.llama3_1.lora_llama3_1_8b", "my.models.llama", "builder of your own"),
        ("lora_llama3_1_8b", "llama2_reward_7b", "a reward model"),
        ("torchtune.modules.loss.CEWithChunkedOutputLoss", "torchtune.rlhf.loss.DPOLoss", "a DPO config"),
        ("alpaca_cleaned_dataset", "stack_exchange_paired_dataset", "a DPO config"),
        ("alpaca_cleaned_dataset", "my_dataset", "not a dataset that puna knows"),
        ("model:\n", "policy_model:\n  _component_: torchtune.models.llama2.llama2_7b\nmodel:\n", "PPO or GRPO"),
        ("alpaca_cleaned_dataset", "text_completion_dataset\n  source: text\n  data_files: a.txt", "reads plain text"),
        ("torch.optim.AdamW", "torch.optim.SGD", "no optimizer `SGD`"),
        ("get_cosine_schedule_with_warmup", "get_rex_schedule", "no schedule"),
        ("CEWithChunkedOutputLoss", "FocalLoss", "no loss"),
        ("FullModelHFCheckpointer", "FullModelTorchTuneCheckpointer", "torchtune's own names"),
        ("llama3.llama3_tokenizer", "gemma.gemma_tokenizer", "not a tokenizer of a text Llama"),
        ("[q_proj, output_proj]", "[q_proj, o_proj]", "no layer `o_proj`"),
        ("packed: True", "packed: often", "neither True nor False"),
        ("${output_dir}", "${oc.env:HOME}", "points at nothing"),
        ("output_dir: runs/mine", "output_dir: ${output_dir}", "points at nothing"),
        ("seed: 7", "tasks: [truthfulqa_mc2]", "an evaluation"),
        ("seed: 7", "max_new_tokens: 5", "puna generate weights/ -p TEXT --max-tokens 5"),
        ("seed: 7", "recipe: sft", "a puna config already"),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    """A config that puna would run as something else; the message must say what it is and what to type."""
    with pytest.raises(UsageError, match=says.replace("(", r"\(")) as told:
        change(tmp_path, old, new)
    assert told.value.fix


def test_a_quantization_is_a_verb(tmp_path: Path) -> None:
    """Its config has a quantizer and no data."""
    start, end = FULL.index("dataset:"), FULL.index("seed:")
    quantizer = "quantizer:\n  _component_: x.Int8DynActInt4WeightQuantizer\n  groupsize: 256\n"
    with pytest.raises(UsageError, match="puna quantize weights/ runs/mine --scheme int8-int4 --group 256"):
        page(tmp_path, FULL[:start] + FULL[end:] + quantizer)


def test_no_torchtune_config_at_all(tmp_path: Path) -> None:
    """Some YAML, or nothing."""
    with pytest.raises(UsageError, match="not a torchtune config"):
        page(tmp_path, "a: 1\n")
    with pytest.raises(UsageError, match="tune cp"):
        migrated(tmp_path / "none.yaml")


def test_nonsense_is_told(tmp_path: Path) -> None:
    """A traceback for a value of a wrong kind, wherever it stands."""
    lines = LORA.splitlines()
    for number, line in enumerate(lines):
        for value in ("null", "[]", "{}", "[[1]]", "-1", "x y", "{a: {b: 1}}"):
            changed = line.split(":")[0] + ": " + value
            with suppress(UsageError):
                page(tmp_path, "\n".join([*lines[:number], changed, *lines[number + 1 :]]) + "\n")


def stock(folder: Path) -> list[Path]:
    """The configs of torchtune's wheel."""
    place = os.environ.get("PUNA_TORCHTUNE_CONFIGS")
    if not place:
        pytest.skip("PUNA_TORCHTUNE_CONFIGS is not set: torchtune's own configs are not migrated")
    if place.endswith(".whl"):
        with zipfile.ZipFile(place) as wheel:
            names = [n for n in wheel.namelist() if n.startswith("recipes/configs/") and n.endswith(".yaml")]
            wheel.extractall(folder, names)
        place = str(folder / "recipes/configs")
    return sorted(Path(place).rglob("*.yaml"))


REASONS = ("family", "images", "DPO", "PPO", "evaluation", "generation", "quantization")


def test_torchtunes_own_configs(tmp_path: Path) -> None:
    """A config that thousands have copied is refused without reason, or a key of it is not understood."""
    made, refused = {}, {}
    files = stock(tmp_path)
    for file in files:
        try:
            made[f"{file.parent.name}/{file.stem}"] = migrated(file)
        except UsageError as error:
            refused[f"{file.parent.name}/{file.stem}"] = str(error)
    assert len(files) > 150
    assert [name for name, why in refused.items() if not any(reason in why for reason in REASONS)] == []
    odd = {name: [k for k, why in p.lost.items() if "not understood" in why] for name, p in made.items()}
    assert {name: keys for name, keys in odd.items() if keys} == {}
    assert {name.split("/")[0] for name in made} >= {"llama2", "llama3", "llama3_1", "llama3_2", "llama3_3"}
    assert len(made) == 55


@pytest.fixture(scope="module")
def tiny(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole groups of 32 and blocks of 64, with a head of its own."""
    shape = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "ffn_dim": 64}
    words = {"model": {**shape, "tie_embeddings": False}, "seq_len": 32, "steps": 1, "samples.prompts": []}
    return run("pretrain", output=tmp_path_factory.mktemp("tiny") / "run", data=shards, dtype="fp32", **words)


def test_torchtunes_own_configs_take_two_steps(tiny: Path, tmp_path: Path) -> None:
    """A page that reads well and does not run: a key that puna does not have, or two that exclude each other.

    What is equal once it is small is run once.
    """
    alpaca = [{"instruction": f"Count to {i}.", "input": "", "output": f"{i} llamas."} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca))
    validated, ran = 0, set()
    for number, file in enumerate(stock(tmp_path)):
        try:
            made = migrated(file)
        except UsageError:
            continue
        ours, output = tmp_path / f"{number}.yaml", tmp_path / str(number)
        ours.write_text(written(made, file.name, str(ours)))
        validated += 1
        assert load("sft", ours).model_dump(exclude_unset=True)["lora"] == of(made.given(), "lora"), file
        small = shrunk(made.given(), tiny, tmp_path / "rows.jsonl")
        method = {k: v for k, v in {**made.given(), **small}.items() if k != "output" and not k.startswith("data.")}
        if repr(method) not in ran:
            ran.add(repr(method))
            run("sft", ours, **small, output=output)
            assert json.loads((output / "result.json").read_text())["steps"] == 2, file
            shutil.rmtree(output)
    assert validated == 55
    assert len(ran) > 20


def shrunk(given: dict[str, Any], tiny: Path, rows: Path) -> dict[str, Any]:
    """What has to be said over a config for it to take two steps in a second: sizes, places, nothing of the method."""
    small: dict[str, Any] = {
        "model": tiny, "data": {"path": rows, "format": "alpaca"}, "seq_len": 96, "batch_size": 2, "epochs": None,
        "steps": 2, "dtype": "fp32", "compile": False, "train.save_every": 2, "train.offload_activations": False,
        "train.optimizer.lr": 1e-3,
    }  # fmt: skip
    small |= {"qat.group": 32} if "qat.group" in given else {}
    small |= {"lora.rank": 4, "lora.alpha": 8} if "lora.rank" in given else {}
    return small | ({"distill.teacher": tiny} if "distill.teacher" in given else {})


def of(given: dict[str, Any], section: str) -> Any:
    """The values of a section as a mapping, or the one that stands in its place."""
    inner = {key.partition(".")[2]: value for key, value in given.items() if key.startswith(f"{section}.")}
    return inner or given[section]


DOCUMENT = Path(__file__).parent.parent / "docs/from-torchtune.md"


@pytest.mark.parametrize("command", commands(DOCUMENT.read_text(encoding="utf-8")))
def test_the_document_names_commands_that_are_there(command: str) -> None:
    """A verb, an option or a key in docs/from-torchtune.md that puna does not have."""
    verbs, words = get_command(app), shlex.split(command)[1:]
    with verbs.make_context("puna", list(words), resilient_parsing=True) as context:
        name, verb, rest = verbs.resolve_command(context, words)  # type: ignore[attr-defined]
        while hasattr(verb, "commands"):
            name, verb, rest = verb.resolve_command(context, rest)  # type: ignore[union-attr]
        parsed = verb.make_context(name, list(rest), parent=context).params  # type: ignore[union-attr]
    config = parsed.get("config")
    if name in ("run", "plan", "validate", "cat", "cp") and not str(config).endswith(".yaml"):
        config = config or parsed.get("recipe")
        recipe = recipe_of(config_file(config)) if config in CONFIGS else config
        assert load(recipe, config if config in CONFIGS else None, parse_words(parsed.get("words") or []))


@pytest.mark.parametrize("name", ["lora", "qlora", "full"])
def test_shipped_configs_say_which_way_they_push(name: str) -> None:
    """A number that a newcomer has to look up elsewhere."""
    lines = config_file(name).read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if re.match(r" *\w+: \S", line) and "#" not in line]
    assert [line.split(":")[0] for line in bare] == ["recipe", "output"]


def test_the_verb(tmp_path: Path) -> None:
    """Notes among the YAML on stdout; an existing file overwritten; a refusal with exit code 0."""
    (tmp_path / "theirs.yaml").write_text(LORA)
    (tmp_path / "bad.yaml").write_text(LORA.replace("lora_rank: 4", "lora_rank: -4"))
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "dpo.yaml").write_text(LORA.replace("modules.loss.CEWithChunkedOutputLoss", "rlhf.loss.DPOLoss"))
    printed, made, again, refused, bad, rows = puna_forked(
        [["migrate", "theirs.yaml"], ["migrate", "theirs.yaml", "-o", "ours.yaml", "--nproc", "4"],
         ["migrate", "theirs.yaml", "-o", "ours.yaml"], ["migrate", "dpo.yaml"],
         ["migrate", "bad.yaml", "-o", "worse.yaml"], ["migrate", "rows.jsonl"]], tmp_path,
    )  # fmt: skip
    assert [done.returncode for done in (printed, made, again, refused)] == [0, 0, 2, 2]
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    assert plain(read_yaml(tmp_path / "printed.yaml"))["batch_size"] == 6
    assert "not carried over: metric_logger.project" in printed.stderr
    assert made.stdout == "ours.yaml\n"
    assert plain(read_yaml(tmp_path / "ours.yaml"))["batch_size"] == 12
    assert "puna ls recipes" in refused.stderr
    assert (bad.returncode, (tmp_path / "worse.yaml").exists()) == (2, False)
    assert "lora.rank" in bad.stderr
    assert "try: a file that `tune cp` wrote" in rows.stderr
