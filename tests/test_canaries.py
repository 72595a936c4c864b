"""A file that wants to run code when it is opened, offered to every verb and function that opens files."""

import contextlib
import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command_line import puna_forked
from test_meta import GENERATIONS, publish, random_state
from test_torch_file import CANARY, hostile

import puna
from puna.checkpoint.convert import convert
from puna.checkpoint.registry import load_tokenizer, open_model
from puna.errors import PunaError
from puna.tokenizer.tokenizer import Tokenizer

KINDS = ["saved", "saved before 1.6", "a bare pickle", "bad checksums", "called before it breaks", "renamed array"]
"""One of each wrapping; all of them are tried on the reader itself in test_torch_file."""
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "hf", "r": 2, "lora_alpha": 4,
    "target_modules": ["q_proj"], "bias": "none",
}  # fmt: skip


BROKEN = 9  # of the models below, the first ones, whose weights are the hostile file
TUNE = ["data.path=rows.jsonl", "steps=1", "template=llama3"]


def models(folder: Path, content: bytes, tokenizer: Path) -> list[str]:
    """Everything that is called a model and has `content` where weights, or what lies beside them, should be."""
    config = GENERATIONS["3"]
    meta = publish(folder / "meta", random_state(config), config, 1, by_rows=True)
    Tokenizer(tokenizer).save(meta)
    whole = convert(meta, folder / "whole", "hf")
    old = shutil.copytree(whole, folder / "old")
    (old / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (old / name).write_bytes(content)
    renamed = shutil.copytree(whole, folder / "renamed")
    (renamed / "model.safetensors").write_bytes(content)
    beside = shutil.copytree(whole, folder / "beside")  # a whole model with surprises: nothing may open them
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt", "pytorch_model.bin", "a.npy"):
        (beside / name).write_bytes(content)
    (meta / "consolidated.00.pth").write_bytes(content)
    vocabulary = shutil.copytree(whole, folder / "vocabulary")
    (vocabulary / "tokenizer.json").unlink()
    (vocabulary / "tokenizer.model").write_bytes(content)
    adapter = folder / "adapter"
    adapter.mkdir()
    Tokenizer(tokenizer).save(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**ADAPTER, "base_model_name_or_path": str(whole)}))
    (adapter / "adapter_model.bin").write_bytes(content)
    shutil.copytree(adapter, folder / "adapter_renamed")
    (folder / "adapter_renamed/adapter_model.bin").rename(folder / "adapter_renamed/adapter_model.safetensors")
    state = folder / "run/checkpoints/step-1"
    shutil.copytree(whole, state)
    (state / "optimizer").mkdir()
    (state / "optimizer/.metadata").write_bytes(content)
    for name in ("m.gguf", "m.bin", "m.pth", "m.npy"):
        (folder / name).write_bytes(content)
    files = ["m.gguf", "m.bin", "m.pth", "m.npy"]
    return ["meta", "old", "renamed", "adapter", "adapter_renamed", *files, "beside", "vocabulary", "run"]


def sources(folder: Path, content: bytes) -> list[str]:
    """Files of text and of conversations that are none."""
    for name in ("a.txt", "a.jsonl", "a.json", "a.parquet", "a.arrow", "a.npy", "a.bin", "a.yaml"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).write_bytes(content)
    (folder / "data/a.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "shards").mkdir()
    for name in ("index.json", "tokens.bin", "train.bin", "tokenizer.json", "documents.npy", "train.npy"):
        (folder / "shards" / name).write_bytes(content)
    return [f"data/{path.name}" for path in (folder / "data").iterdir()]


def commands(models: Sequence[str], sources: Sequence[str]) -> list[list[str]]:
    calls = []
    for number, model in enumerate(models):
        calls += [
            ["inspect", model],
            ["verify", model],
            ["verify", "whole", "--against", model],
            ["convert", model, f"out{number}", "--to", "hf"],
            ["chat", model, "--max-tokens", "1"],
            ["tokenizer", "encode", model, "a"],
            ["run", "sft", f"model={model}", *TUNE, f"output=sft{number}"],
        ]
        if number < BROKEN:  # the others have sound weights, with which these take seconds
            calls += [
                ["merge", model, f"merged{number}"],
                ["generate", model, "-p", "a", "--max-tokens", "1"],
                ["eval", model, "--text", "data/a.txt"],
            ]
    for number, source in enumerate(sources):
        calls += [
            ["run", "tokenizer", f"sources.path={source}", "vocab_size=300", f"output=tokenizer{number}"],
            ["run", "sft", "model=whole", f"data.path={source}", "steps=1", f"output=tuned{number}", "template=llama3"],
            ["validate", source],
            ["verify", source],
        ]
    doctors = [["doctor", model] for model in ("meta", "old", "adapter")]  # it examines the machine first, each time
    shards = [["data", "show", "shards"], ["data", "stats", "shards"], ["verify", "shards"]]
    return [*calls, *doctors, *shards, ["run", "pretrain", "data=shards", "steps=1", "output=pretrained"]]


def test_no_verb_wakes_it(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A model from a stranger that takes over the machine, by whichever door it comes in."""
    content = hostile(tmp_path)["saved"]
    calls = commands(models(tmp_path, content, tokenizer_folder), sources(tmp_path, content))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "How many stars?", "completion": "345"}\n' * 8)
    answers = puna_forked(calls, tmp_path, stdin="hello\n/quit\n")
    assert not (tmp_path / CANARY).exists()
    odd = [done.args for done in answers if "unexpected" in done.stderr or "Traceback" in done.stderr]
    assert odd == [], "a file that was not refused, but stumbled over"


@pytest.mark.parametrize("kind", KINDS)
def test_no_function_wakes_it(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """The Python interface has doors of its own."""
    calls: list[Callable[[str], object]] = [
        puna.load,
        open_model,
        load_tokenizer,
        lambda path: convert(path, tmp_path / "out", "hf"),
    ]
    for name in models(tmp_path, hostile(tmp_path)[kind], tokenizer_folder):
        for call in calls:
            with contextlib.suppress(PunaError):  # any other exception is a stumble
                call(str(tmp_path / name))
            assert not (tmp_path / CANARY).exists(), name
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert puna.load(tmp_path / "beside", dtype="fp32").path, "what lies beside a whole model hurts nobody"
