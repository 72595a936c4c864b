"""The loop's promises: the loss denominator, exact resume, guards, checkpoints that others open."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import BASE, build

import puna
from puna.checkpoint import train_state
from puna.checkpoint.stored_directory import open_model_directory
from puna.checkpoint.weight_files import read_json
from puna.data.loader import Batch
from puna.data.shards import Shards
from puna.device import generators, set_generators
from puna.errors import CheckpointError, DataError, NumericError, ResourceError, UsageError
from puna.eval.perplexity import bits_per_byte
from puna.files import MANIFEST, hash_file, write_json
from puna.infer.llama import Llama
from puna.log import Metrics
from puna.model.config import ModelConfig
from puna.ops.cross_entropy import IGNORE
from puna.recipes import run
from puna.tokenizer.tokenizer import Tokenizer
from puna.train import budget
from puna.train.fit import build_optimizer, train_step
from puna.train.guard import Guard
from puna.train.objectives import Loss, next_token
from puna.train.optim import OptimizerConfig, learning_rate

CPU = torch.device("cpu")
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 48}
TINY = {
    "model": SMALL,
    "seq_len": 32, "batch_size": 2, "dtype": "fp32", "train.optimizer.lr": 0.01, "train.optimizer.warmup_steps": 2,
    "samples.prompts": [],
}  # fmt: skip


def pretrain(output: Path, shards: Path, **words: Any) -> Path:
    return run("pretrain", **{**TINY, "output": output, "data": shards, "steps": 12, **words})


# Windows of 64 over little text: twelve steps cross the end of an epoch.
SAVING = {
    "train.save_every": 4, "train.evaluate_every": 3, "train.keep": 9, "samples.prompts": ["The llama"],
    "seq_len": 64, "batch_size": 56, "train.accumulate": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run with a checkpoint at every fourth step."""
    return pretrain(tmp_path_factory.mktemp("run") / "run", shards, **SAVING)


def unfinished(finished: Path, copy: Path, keep: str = "step-*") -> Path:
    """A copy of the finished run as a crash would have left it, with only some of its checkpoints."""
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "final")
    for folder in {*copy.glob("checkpoints/*")} - {*copy.glob(f"checkpoints/{keep}")}:
        shutil.rmtree(folder)
    return copy


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    timed = ("seconds", "tok_s", "memory")
    return [{k: v for k, v in row.items() if k not in timed} for row in Metrics(folder / "metrics.jsonl").read()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in Metrics(folder / "metrics.jsonl").read() if "loss" in row]


def ragged_batches() -> list[Batch]:
    """Eight rows with very unequal numbers of trained positions."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for row in range(8):
        tokens = torch.randint(0, 97, (1, 16), generator=generator)
        labels = torch.where(torch.arange(16) < 1 + 2 * row, tokens.roll(-1, 1), IGNORE)
        batches.append(Batch(tokens, labels, int((labels != IGNORE).sum())))
    return batches


def gradients(micro: list[Batch]) -> dict[str, torch.Tensor]:
    model = build(ModelConfig(**BASE), torch.float64)
    kept = {}
    optimizer = build_optimizer(model, OptimizerConfig())
    optimizer.register_step_pre_hook(lambda *_: kept.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    train_step(model, optimizer, micro, next_token, 1e-3, 0, lambda loss, norm: True)
    return kept


def test_accumulation_equals_one_batch() -> None:
    """Averages of averages weigh a short row like a long one: the field's most repeated silent bug."""
    micro = ragged_batches()
    one = Batch(torch.cat([b.tokens for b in micro]), torch.cat([b.labels for b in micro]), sum(b.n for b in micro))
    accumulated, whole = gradients(micro), gradients([one])
    assert len({b.n for b in micro}) == 8
    for name, gradient in whole.items():
        assert (accumulated[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_a_step_without_trained_positions_is_an_error() -> None:
    """0/0 is NaN, or a loss of 0.0 that looks like success."""
    batch = Batch(torch.ones(1, 4, dtype=torch.long), torch.full((1, 4), IGNORE), 0)
    with pytest.raises(DataError, match="nothing to train"):
        gradients([batch])


def test_resume_is_bit_identical(shards: Path, finished: Path, tmp_path: Path) -> None:
    """Going on from any checkpoint, in the first epoch or the second, moved elsewhere, gives the same bits."""
    states = [json.loads((finished / f"checkpoints/step-{n}/state.json").read_text()) for n in (4, 8)]
    assert [s["data"]["epoch"] for s in states] == [0, 1]
    for step in ("step-4", "step-8"):
        copy = unfinished(finished, tmp_path / step, keep=step)
        _as_of_an_older_version(copy, step)
        pretrain(copy, shards, **SAVING)
        assert rows(copy) == rows(finished)
        for file in ("final/model.safetensors", "checkpoints/step-12/optimizer/model-00001-of-00001.safetensors"):
            ours, theirs = load_file(copy / file), load_file(finished / file)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file


def _as_of_an_older_version(run: Path, step: str) -> None:
    """Before the config had `compile` and `train.skip_budget`, and when a run had one generator."""
    resolved = run / "resolved.yaml"
    lines = resolved.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.split(":")[0].strip() not in ("compile", "skip_budget")]
    assert len(kept) == len(lines) - 2
    resolved.write_text("".join(kept))
    state = run / "checkpoints" / step / "state.json"
    values = json.loads(state.read_text())
    assert values.pop("device_generators") == [{}]
    (values["generator"],) = values.pop("generators")
    write_json(state, values)
    manifest = read_json(state.with_name(MANIFEST))
    manifest["files"]["state.json"] = {"bytes": state.stat().st_size, "hash": hash_file(state)}
    write_json(state.with_name(MANIFEST), manifest)


def test_the_device_s_generator_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on a GPU draws from the GPU's generator: a resume dropped other places than the straight run."""
    there = {torch.device("cuda:1"): torch.tensor([7, 0, 255], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", there.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: there.update({device: state}))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([9], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: there.update({torch.device("mps"): state}))
    for kind, kept in (
        ("cuda:1", [7, 0, 255]),
        ("mps", [9]),
    ):  # a step done over again after running out of memory, too
        stored = generators(torch.device(kind))
        set_generators(torch.device(kind), stored)
        assert there[torch.device(kind)].tolist() == kept
        before, drawn = torch.get_rng_state(), torch.rand(1)
        there.clear()
        set_generators(torch.device("cpu"), {**stored, "cpu": before})  # another kind of device than it was saved on
        assert torch.equal(torch.rand(1), drawn)
        assert not there


def test_a_validation_lost_in_a_crash_is_made_up_for(shards: Path, finished: Path, tmp_path: Path) -> None:
    """Killed after the checkpoint of step 12 and before its validation: the number is there in the end."""
    copy = unfinished(finished, tmp_path / "copy")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    pretrain(copy, shards, **SAVING)
    assert rows(copy) == rows(finished)


def test_the_gap_is_to_the_last_ten_steps(finished: Path) -> None:
    """The mean since the last validation was of older weights: the gap showed how fast it learns."""
    trained = [loss for _, loss in losses(finished)]
    validated = [row for row in rows(finished) if "valid_loss" in row]
    assert [row["step"] for row in validated] == [3, 6, 9, 12]
    for row in validated:
        assert row["train_loss"] == fmean(trained[max(0, row["step"] - 10) : row["step"]])
        assert row["gap"] == row["valid_loss"] - row["train_loss"]


def test_the_report_of_a_pretraining(finished: Path) -> None:
    """Its validation loss was shown as that of conversations, "before" being some hundred steps in."""
    page = (finished / "report.html").read_text()
    titles = re.findall(r"<h2 id=[^>]+>([^<]+)", page)
    assert titles[:4] == ["Training and validation loss", "At the last validation", "Held-out text", "Speed"]
    assert "onversations" not in page
    assert all(told in page for told in ("gap: validation less training", "passes over text", "bits per byte"))


COMMAND = [
    sys.executable, "-m", "puna", "run", "pretrain", "steps=60", "train.save_every=7", "samples.prompts=[]",
    f"model={json.dumps(SMALL)}", "dtype=bf16", "seq_len=32", "batch_size=2", "train.accumulate=2",
]  # fmt: skip


def kill_after(command: list[str], metrics: Path, step: int, number: int) -> int:
    """Start the command, send the signal once `step` is logged, return its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and not any(r.get("step", 0) >= step for r in Metrics(metrics).read()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait()


def test_killed_twice_equals_undisturbed(shards: Path, tmp_path: Path) -> None:
    """SIGKILL at two random steps, bf16, accumulation: same losses and weights, bit for bit."""
    straight, killed = ([*COMMAND, f"data={shards}", f"output={tmp_path / name}"] for name in ("straight", "killed"))
    first, second = sorted(random.sample(range(8, 42), 2))
    assert kill_after(killed, tmp_path / "killed/metrics.jsonl", first, signal.SIGKILL) == -9
    assert kill_after(killed, tmp_path / "killed/metrics.jsonl", second, signal.SIGKILL) == -9
    for command in (straight, killed):
        assert subprocess.run(command, capture_output=True).returncode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight"), (first, second)
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("killed", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert subprocess.run(killed, capture_output=True).returncode == 2  # finished: refused


def test_sigint_saves_and_goes_on(shards: Path, tmp_path: Path) -> None:
    """Ctrl-C keeps what is done and says so by its exit code."""
    command = [*COMMAND, f"data={shards}", f"output={tmp_path / 'run'}", "steps=2000", "train.save_every=2000"]
    assert kill_after(command, tmp_path / "run/metrics.jsonl", 3, signal.SIGINT) == 130
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-*")
    done = int(checkpoint.name[5:])
    assert len(losses(tmp_path / "run")) == done
    assert kill_after(command, tmp_path / "run/metrics.jsonl", done + 3, signal.SIGTERM) == 143
    assert len(losses(tmp_path / "run")) >= done + 3


def test_a_damaged_checkpoint_is_passed_over(shards: Path, finished: Path, tmp_path: Path) -> None:
    """One flipped bit in the newest checkpoint: the one before it is used, and the result is the same."""
    copy = unfinished(finished, tmp_path / "copy")
    (copy / "checkpoints/step-7-mine").mkdir()  # a user's own copy is no checkpoint of ours
    damaged = copy / "checkpoints/step-12/optimizer/model-00001-of-00001.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    pretrain(copy, shards, **SAVING)
    assert losses(copy) == losses(finished)
    assert (copy / "checkpoints/damaged-step-12").exists()


def test_another_config_or_a_finished_run_is_refused(shards: Path, finished: Path, tmp_path: Path) -> None:
    """A second run on a folder would mix two runs."""
    with pytest.raises(UsageError, match="finished"):
        pretrain(finished, shards, **SAVING)
    with pytest.raises(UsageError, match="steps and seconds"):
        pretrain(tmp_path / "both", shards, seconds=5)
    unfinished(finished, tmp_path / "run")
    with pytest.raises(UsageError, match=r"train\.optimizer\.lr: 0\.01 -> 0\.5"):
        pretrain(tmp_path / "run", shards, **{**SAVING, "train.optimizer.lr": 0.5})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds no run"):
        pretrain(tmp_path / "other", shards)


def test_a_full_disk_keeps_the_old_checkpoint(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills while the second checkpoint is written: the first stays whole, exit code 6."""

    real, calls = train_state._write, []

    def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        calls.append(folder)
        if len(calls) == 2:
            folder.mkdir()
            (folder / "half").write_bytes(b"x" * 1000)
            raise OSError(28, "No space left on device")
        real(folder, tensors)

    monkeypatch.setattr(train_state, "_write", write)
    with pytest.raises(ResourceError) as error:
        pretrain(tmp_path / "run", shards, **{"train.save_every": 5})
    assert error.value.exit_code == 6
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-5"]
    monkeypatch.undo()
    pretrain(tmp_path / "run", shards, **{"train.save_every": 5})
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_steps_change_nothing(poison: float) -> None:
    """One NaN in the weights ends a run that looks alive for hours."""
    model = build(ModelConfig(**BASE))
    optimizer = build_optimizer(model, OptimizerConfig())
    before = {n: p.clone() for n, p in model.named_parameters()}

    def poisoned(model: Any, batch: Batch) -> Loss:
        return Loss(next_token(model, batch).sum * poison, {})

    guard = Guard(2)
    admit = partial(guard.admits, 7, {"epoch": 0, "index": 40})
    for _ in range(2):
        train_step(model, optimizer, ragged_batches(), poisoned, 1e-3, 1.0, admit)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(NumericError, match="'index': 40") as error:
        train_step(model, optimizer, ragged_batches(), poisoned, 1e-3, 1.0, admit)
    assert error.value.exit_code == 5
    optimizer.zero_grad()
    train_step(model, optimizer, ragged_batches(), next_token, 1e-3, 1.0, admit)
    assert not torch.equal(model.norm.weight, before["norm.weight"])


def test_learning_rate_golden_values() -> None:
    """Llama 3 405B's published schedule: 8e-5 peak, 8,000 steps of warm-up, cosine to 8e-7 at 1.2 M."""
    config = OptimizerConfig(lr=8e-5, warmup_steps=8000, final_lr=0.01)
    golden = {
        0: 1e-8,
        3999: 4e-5,
        7999: 8e-5,
        100_000: 7.88416e-5,
        300_000: 6.88407e-5,
        604_000: 4.04e-5,
        1_000_000: 6.17518e-6,
    }
    for step, expected in golden.items():
        assert learning_rate(step, 1_200_000, config) == pytest.approx(expected, rel=1e-5)


def test_norms_do_not_decay() -> None:
    """Weight decay on norm weights shrinks the residual stream."""
    model = build(ModelConfig(**BASE))
    decayed, kept = build_optimizer(model, OptimizerConfig()).param_groups
    assert all(p.ndim == 2 for p in decayed["params"])
    assert (kept["weight_decay"], len(kept["params"])) == (0.0, 2 * 2 + 1)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for the budget alone that moves 20 ms at every look: no test may depend on how busy a machine is."""
    ticks = itertools.count()
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: 0.02 * next(ticks)))


def test_the_steps_of_a_time_budget_are_stored(steady: None, shards: Path, tmp_path: Path) -> None:
    """Measured once; a resumed run that measured again would have another schedule."""
    folder = run("pretrain", **{**TINY, "output": tmp_path / "run", "data": shards, "seconds": 1.5})
    plan = json.loads((folder / "measured.json").read_text())["plan"]
    # 0.92 x 1.5 s, less 0.48 s of measuring and five validations of 20 ms, at 20 ms a step
    assert len(losses(folder)) == plan["steps"] == 40
    shutil.rmtree(folder / "final")
    run("pretrain", **{**TINY, "output": folder, "data": shards, "seconds": 1.5})
    assert len(losses(folder)) == plan["steps"]


def test_the_probe_leaves_no_trace(steady: None, shards: Path, tmp_path: Path) -> None:
    """A run with a measured number of steps starts from the same weights and data as one told that number."""
    measured = run("pretrain", **{**TINY, "output": tmp_path / "measured", "data": shards, "seconds": 1.5})
    told = pretrain(tmp_path / "told", shards, steps=len(losses(measured)))
    assert losses(measured) == losses(told)


def test_loss_falls_and_bits_per_byte_is_exact(shards: Path, finished: Path) -> None:
    """Bits per byte against a token-by-token computation; a window dropped or a byte miscounted is a better score."""
    assert losses(finished)[-1][1] < losses(finished)[0][1] - 0.5
    llama = puna.load(finished, dtype="fp32")
    valid = Shards(shards, "valid")
    ids = valid.read(0, valid.tokens)
    nats = 0.0
    for start in range(0, valid.tokens - 1, 32):
        window = torch.from_numpy(ids[start : start + 33])
        logits = llama.logits(window[None, :-1])[0].double()
        nats -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
    expected = nats / 0.6931471805599453 / valid.bytes
    assert bits_per_byte(llama.model, valid, 32, 5) == pytest.approx(expected, rel=1e-5)
    assert bits_per_byte(llama.model, valid, 32, 5, max_windows=40) == pytest.approx(expected, rel=0.1)


def test_transformers_opens_the_directory(finished: Path, shape: ModelConfig, tmp_path: Path) -> None:
    """What we write must be the model others load: same logits, same tokenizer, stop ids."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(finished / "final"), dtype=torch.float32)
    ours = puna.load(finished, dtype="fp32")
    tokens = torch.randint(0, 600, (2, 30), generator=torch.Generator().manual_seed(0))
    assert (theirs(tokens).logits - ours.logits(tokens)).abs().max() < 1e-5
    assert theirs.generation_config.eos_token_id == ours.tokenizer.stop_ids
    scaled = Llama(
        build(shape), ours.tokenizer, finished, ours.stop_ids
    )  # GQA, RoPE scaling, tied: through the config file
    scaled.save(tmp_path / "scaled", dtype="fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "scaled"), dtype=torch.float32)
    tokens = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    assert (theirs(tokens).logits - scaled.logits(tokens)).abs().max() < 1e-5


def test_transformers_directories_load(tmp_path: Path, finished: Path) -> None:
    """New (`rope_parameters`) and sharded directories, as transformers writes them today."""
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(str(finished / "final")))
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    ours = open_model_directory(tmp_path / "hf").load(torch.float32, CPU)
    tokens = torch.arange(20)[None]
    assert (model(tokens).logits - ours(tokens)).abs().max() < 1e-5


def test_a_directory_that_does_not_fit_is_refused(finished: Path, tmp_path: Path) -> None:
    """A silent partial load trains or serves random weights; everything wrong is listed."""
    shutil.copytree(finished / "final", tmp_path / "m")
    config = tmp_path / "m/config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"missing layers\.2\.self_attn\.q_proj"):
        puna.load(tmp_path / "m")
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 1'))
    with pytest.raises(CheckpointError, match=r"unexpected layers\.1\.mlp"):
        puna.load(tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(CheckpointError):
        puna.load(tmp_path / "m")


def test_spm_text_goes_on_where_the_prompt_ended(texts: Path, tmp_path: Path) -> None:
    """SentencePiece drops a leading space when it decodes: alone, a continuation would be glued to its prompt."""
    words = {"sources.path": texts, "kind": "sentencepiece", "vocab_size": 400}
    tokenizer = Tokenizer(run("tokenizer", output=tmp_path / "spm", **words))
    ids = [tokenizer.bos_id, *tokenizer.encode("the llamas graze 🦙")]
    for cut in range(1, len(ids)):  # a character of four bytes is cut in every way
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + tokenizer.decode_after(ids[:cut], ids[cut:]) == "the llamas graze 🦙"


def test_weights_this_llama_does_not_compute_are_refused(finished: Path, tmp_path: Path) -> None:
    """Quantized or foreign weights cast to floats load without a word and answer garbage."""
    shutil.copytree(finished / "final", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for key, value in [("quantization_config", {"bits": 4}), ("partial_rotary_factor", 0.5), ("hidden_act", "gelu"),
                       ("attention_bias", True), ("hidden_size", "abc"), ("model_type", "mistral")]:  # fmt: skip
        (tmp_path / "m/config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=r"not supported|puna reads llama|not numbers"):
            puna.load(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "m/model.safetensors")
    save_file({n: t.to(torch.int8) for n, t in tensors.items()}, tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match="stored as I8"):
        puna.load(tmp_path / "m")


def test_stop_ids_of_the_directory_are_kept(finished: Path, tmp_path: Path) -> None:
    """An instruct model's generation_config lists more stops than its tokenizer's EOS."""
    shutil.copytree(finished / "final", tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [5, 344]}))
    assert puna.load(tmp_path / "m").stop_ids == [*puna.load(finished).tokenizer.stop_ids, 5, 344][:5]


def test_two_runs_in_one_process(shards: Path, tmp_path: Path) -> None:
    """The README's API twice: importing a recipe must not put a module in the place of `puna.run`."""
    code = """
import sys, puna
for name in "ab":
    puna.run("pretrain", config="debug", data=sys.argv[1], output=f"{sys.argv[2]}/{name}", steps=2)
"""
    done = subprocess.run([sys.executable, "-c", code, shards, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert puna.load(tmp_path / "b/").generate("The", max_tokens=2) is not None


def test_a_changed_shard_is_refused(shards: Path, tmp_path: Path) -> None:
    """The fingerprint names the data a run was trained on; bytes that changed under it are other data."""
    shutil.copytree(shards, tmp_path / "shards")
    path = tmp_path / "shards/train-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-00000\.bin.*changed"):
        pretrain(tmp_path / "run", tmp_path / "shards")


def test_python_api(finished: Path, tmp_path: Path) -> None:
    """load, logits, generate, save: the documented names."""
    llama = puna.load(finished, dtype="fp32")
    assert llama.logits([[1, 2, 3]]).shape == (1, 3, 600)
    text = llama.generate("The llama", max_tokens=5)
    assert text == llama.generate(["The llama", "A"], max_tokens=5)[0]
    assert llama.generate("The", max_tokens=5, temperature=1.0, seed=1) == llama.generate(
        "The", max_tokens=5, temperature=1.0, seed=1
    )
    llama.save(tmp_path / "copy", dtype="fp32")
    assert puna.load(tmp_path / "copy", dtype="fp32").generate("The llama", max_tokens=5) == text
    assert os.listdir(tmp_path) == ["copy"]
