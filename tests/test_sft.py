"""Fine-tuning end to end on a tiny model: exact resume, adapters by name, merge, chat."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import puna as command
from safetensors.torch import load_file

import puna
from puna.cli.data import pack_data
from puna.config import load_config
from puna.data import encoders, row_cache
from puna.data.packing import PackedLoader
from puna.errors import CheckpointError, UsageError
from puna.eval.parity.observe import compare_models
from puna.infer import llama
from puna.infer.rehearsal import rehearsal
from puna.infer.request import Completion, Result
from puna.log import Metrics
from puna.lora import lora_parameters
from puna.recipes import load as recipes_load
from puna.recipes import run, sft
from puna.tokenizer.chat.format import bundled
from puna.tokenizer.decoding import Stream
from puna.tokenizer.tokenizer import Tokenizer
from puna.tune.model import tuned_tokenizer
from puna.tune.rows import encode

SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 48}


@pytest.fixture(scope="module")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newborn model without a chat template."""
    words = {"model": SMALL, "seq_len": 32, "steps": 5, "samples.prompts": [], "dtype": "fp32"}
    return run("pretrain", output=tmp_path_factory.mktemp("base") / "run", data=shards, **words)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for i in range(40):
        question, answer = f"How many llamas are {i} and {i}?", f"{2 * i} llamas."
        lines.append({"instruction": question, "input": "", "output": answer})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tune(base: Path, rows: Path, output: Path, **words: Any) -> Path:
    options = {"template": "llama3", "data.path": rows, "seq_len": 96, "batch_size": 2, "steps": 9, "dtype": "fp32"}
    options |= {
        "train.save_every": 3,
        "train.evaluate_every": 3,
        "train.keep": 9,
        "train.accumulate": 2,
        "valid_fraction": 0.2,
    }
    return run("sft", model=base, output=output, **{**options, **words})


@pytest.fixture(scope="module")
def tuned(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(base, rows, tmp_path_factory.mktemp("sft") / "run")


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "qlora": {"lora": LORA, "quantize": "int8"},
    "full": {"lora": None},
}


@pytest.mark.parametrize("words", TUNINGS.values(), ids=TUNINGS)
def test_resume_is_bit_identical(words: dict[str, Any], base: Path, rows: Path, tmp_path: Path) -> None:
    """Adapters, dropout and packed rows: killed after any checkpoint, the same bits in the end."""
    straight = tune(base, rows, tmp_path / "straight", **words)
    shutil.copytree(straight, tmp_path / "resumed")
    for gone in ("final", "checkpoints/step-6", "checkpoints/step-9"):
        shutil.rmtree(tmp_path / "resumed" / gone)
    resumed = tune(base, rows, tmp_path / "resumed", **words)
    ours, theirs = (
        [
            {k: v for k, v in row.items() if k not in ("seconds", "tok_s", "memory")}
            for row in Metrics(f / "metrics.jsonl").read()
        ]
        for f in (resumed, straight)
    )
    assert ours == theirs
    name = "adapter_model.safetensors" if words["lora"] else "model.safetensors"
    ours, theirs = load_file(resumed / "final" / name), load_file(straight / "final" / name)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8.0, "dropout": 0.1}, None])
def test_a_crash_amid_accumulation_leaves_nothing(
    lora: Any, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead between two micro-batches: half a gradient, or draws made before training, must not reach the next start."""
    pytest.importorskip("reasoning_gym")
    words = {"lora": lora, "rehearse": 2, "judge.tasks": ["chain_sum"], "judge.limit": 2, "seq_len": 192}
    straight = tune(base, rows, tmp_path / "straight", **words)
    whole = sft.next_token
    for fatal in (3, 9):  # two micro-batches a step: amid step 2, before any checkpoint, and amid step 5 of the resumed
        calls = iter(range(10**6))

        def fails(model: Any, batch: Any, calls: Any = calls, fatal: int = fatal) -> Any:
            if next(calls) == fatal:
                raise RuntimeError("power cut")
            return whole(model, batch)

        monkeypatch.setattr(sft, "next_token", fails)
        with pytest.raises(RuntimeError, match="power cut"):
            tune(base, rows, tmp_path / "cut", **words)
        monkeypatch.undo()
    resumed = tune(base, rows, tmp_path / "cut", **words)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    ours, theirs = load_file(resumed / "final" / name), load_file(straight / "final" / name)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_epochs_decide_the_steps(base: Path, rows: Path, tmp_path: Path) -> None:
    """Epochs that end early leave rows unread; steps that are counted anew at a resume are another schedule."""
    words = {"model": base, "template": "llama3", "data.path": rows, "seq_len": 64, "batch_size": 3, "dtype": "fp32"}
    words |= {"epochs": 1.5, "train.accumulate": 2, "valid_fraction": 0, "packed": False}
    done = run("sft", output=tmp_path / "run", **words)
    metrics = Metrics(done / "metrics.jsonl").read()
    assert json.loads((done / "measured.json").read_text())["steps"] == 10  # 1.5 x 40 rows, 6 a step
    assert metrics[-1]["step"] == 10
    assert metrics[-1]["epochs.conversations"] == 1.5
    with pytest.raises(UsageError, match="both given"):
        run("sft", output=tmp_path / "other", **words, steps=3)
    assert not (tmp_path / "other").exists()
    again = run("sft", config=done / "resolved.yaml", output=tmp_path / "again")  # which names all steps there are
    weights = "final/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (done / weights).read_bytes()


def test_packing_ahead_tells_what_training_reads(base: Path, rows: Path, tmp_path: Path) -> None:
    """A summary that counts otherwise than the run it is for."""
    words = [f"model={base}", "template=llama3", f"data.path={rows}", "seq_len=64", "valid_fraction=0.2"]
    (tmp_path / "mine.yaml").write_text("recipe: sft\n", encoding="utf-8")
    done = command("data", "pack", tmp_path / "mine.yaml", *words, "too_long=drop", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["data"]
    assert (told["conversations"], told["cut"], told["folder"]) == (40, 0, None)
    assert told["rows"] + told["dropped"] == 40
    assert told["held_out"] + told["packs"] <= 40
    assert 0.5 < told["fill"] <= 1
    assert "rows are held out" in command("data", "pack", tmp_path / "mine.yaml", *words).stdout
    assert command("data", "pack", "quickstart/pretrain").returncode == 2
    apart = command("data", "pack", tmp_path / "mine.yaml", *words, f"valid.path={rows}", "--json")
    assert [json.loads(apart.stdout)[name]["held_out"] for name in ("data", "valid")] == [0, 0]


def test_training_finds_what_was_packed_ahead(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed with another tokenizer than training's, hours of encoding are done twice; `data show` had it, too."""
    monkeypatch.setattr(row_cache, "SMALL", 1)
    monkeypatch.setattr(encoders, "CHUNK", 8)
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"recipe: sft\nmodel: {base}\ntemplate: llama3\ndata: {{path: {rows}}}\ndata_cache: {tmp_path / 'cache'}\n"
        "new_tokens: ['<|plan|>']\nlora: {modules_to_save: [embed_tokens, lm_head]}\n",
        encoding="utf-8",
    )
    pack_data(str(config), [], 1, True)
    packed = json.loads(capsys.readouterr().out)["data"]["folder"]
    settings = load_config(sft.Config, config)
    assert packed == str(encode(settings, tuned_tokenizer(settings), settings.data)[1].folder)


def test_two_ranks_tune_an_adapter(base: Path, rows: Path, tmp_path: Path) -> None:
    """An adapter saved in parts, or ranks that drop the same places: dropout in the whole recipe, to its end."""
    output = tmp_path / "run"
    done = command(
        "run", "sft", "--nproc", 2, f"model={base}", f"output={output}", f"data.path={rows}", "template=llama3",
        "seq_len=96", "batch_size=2", "steps=2", "dtype=fp32", "device=cpu", "train.optimizer.lr=0.01",
        "lora.rank=3", "lora.dropout=0.5", "valid_fraction=0.2", "train.save_every=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state = json.loads((output / "checkpoints/step-2/state.json").read_text())
    assert len(set(state["generators"])) == 2
    model = puna.load(output, dtype="fp32").model
    assert all(p.count_nonzero() > 0 for p in lora_parameters(model).values())


def test_it_learns_and_the_base_is_untouched(base: Path, tuned: Path) -> None:
    """Only adapters are written, and the held-out loss falls."""
    losses = [row["valid_loss"] for row in Metrics(tuned / "metrics.jsonl").read() if "valid_loss" in row]
    assert losses[-1] < losses[0]
    assert "epochs.conversations" in Metrics(tuned / "metrics.jsonl").read()[-1]
    assert not (tuned / "final/model.safetensors").exists()
    names = load_file(tuned / "final/adapter_model.safetensors")
    assert all(n.startswith("base_model.model.model.layers.") and ".lora_" in n for n in names)
    assert json.loads((tuned / "final/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert "<svg" in (tuned / "report.html").read_text()


def test_trained_merged_saved_and_loaded_say_the_same(tuned: Path, tmp_path: Path) -> None:
    """Trained is not merged is not exported is not served: the third most frequent silent failure."""
    unmerged = puna.load(tuned, dtype="fp32")
    messages = [{"role": "user", "content": "How many llamas are 3 and 3?"}]
    done = subprocess.run(
        [sys.executable, "-m", "puna", "merge", tuned, tmp_path / "merged", "--save-dtype", "fp32"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    merged = puna.load(tmp_path / "merged", dtype="fp32")
    ids = [unmerged.template.prompt(messages)]
    assert (merged.logits(ids) - unmerged.logits(ids)).abs().max() < 1e-5
    assert merged.chat(messages, max_tokens=12) == unmerged.chat(messages, max_tokens=12)
    assert merged.stop_ids == unmerged.stop_ids
    with pytest.raises(UsageError, match="nothing to merge"):
        _merge(tmp_path / "merged", tmp_path / "again")


def _merge(source: Path, target: Path) -> None:
    from puna.cli.merge import merge

    merge([str(source)], target, "bf16")


def test_an_adapter_without_its_base_is_told(tuned: Path, tmp_path: Path) -> None:
    """The base was moved: name it, do not answer with something else."""
    shutil.copytree(tuned / "final", tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": "', '"base_model_name_or_path": "/gone'))
    with pytest.raises(CheckpointError, match="/gone"):
        puna.load(tmp_path / "adapter")


def test_chat_never_hands_escapes_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's text is untrusted: an escape sequence could retitle, recolour or type."""
    from puna.cli import chat

    class Bytes:
        errors = "replace"

        def of(self, id: int, special: bool) -> bytes:
            return bytes([id])

        def drops_space_of(self, id: int) -> bool:
            return False

    class Tokenizer:
        def stream(self) -> Stream:
            return Stream(Bytes(), False)  # type: ignore[arg-type]

    class Template:
        def prompt(self, messages: list[dict[str, str]]) -> list[int]:
            return [1]

    class Model:
        tokenizer, template = Tokenizer(), Template()

        def complete(self, prompts: Any, on_token: Any, **options: Any) -> list[Result]:
            said = "a\x1b]0;owned\x07\x1b[31mred\x9b31m é🦙\n"
            for byte in said.encode():
                on_token(byte)
            return [Result((Completion(tuple(said.encode()), None, "stop", said + "t\x1bail"),))]

    ids, tail = chat._answer(Model(), [], {})
    assert 0x1B in ids
    assert tail == "t\x1bail"
    shown = capsys.readouterr().out
    assert shown == "a]0;owned[31mred31m é🦙\ntail\n"


def test_chat_reads_commands(tuned: Path, tmp_path: Path) -> None:
    """Several lines, a system message, another try and saving, from a pipe."""
    typed = f'/system Be brief.\n"""How many\nllamas?"""\n/retry\n/save {tmp_path}/c.json\n/quit\n'
    command = [sys.executable, "-m", "puna", "chat", tuned, "--max-tokens", "3", "--dtype", "fp32"]
    done = subprocess.run(command, input=typed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    roles = [m["role"] for m in json.loads((tmp_path / "c.json").read_text())]
    assert roles == ["system", "user", "assistant"]
    assert json.loads((tmp_path / "c.json").read_text())[1]["content"] == "How many\nllamas?"


def test_data_show_marks_what_is_trained(base: Path, rows: Path, tmp_path: Path) -> None:
    """The X-ray before step one: a mask that is off by a token is seen here, not in the loss."""
    config = tmp_path / "mine.yaml"
    config.write_text(f"recipe: sft\nmodel: {base}\ntemplate: llama3\ndata: {{path: {rows}}}\n", encoding="utf-8")
    command = [sys.executable, "-m", "puna", "data", "show", config, "-n", "3"]
    done = subprocess.run([*command, "train_on=last"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "llamas are 3 and 3?<|eot_id|>" in done.stdout
    packed = subprocess.run([*command[:-2], "seq_len=300", "--json"], capture_output=True, text=True)
    row = json.loads(packed.stdout)[0]
    assert row["name"].startswith("row 0, conversations ")
    assert 150 < len(row["ids"]) <= 300
    assert sum(p == "<|eot_id|>" for p, t in zip(row["pieces"], row["trained"], strict=True) if t) > 2
    assert "\n\n[[6 llamas.<|eot_id|>]]\n" in done.stdout
    listed = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True).stdout)
    assert [p for p, t in zip(listed[0]["pieces"], listed[0]["trained"], strict=True) if t][-1] == "<|eot_id|>"
    assert subprocess.run([*command[:-1], "99"], capture_output=True).returncode == 2


def test_what_is_selected_and_held_out_is_told(
    base: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows dropped without a trace; a validation file that training has seen; a loss that flatters."""
    caplog.set_level("INFO", "puna")
    (tmp_path / "twice.jsonl").write_text(rows.read_text() * 2, encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text("".join(rows.read_text().splitlines(True)[:7]), encoding="utf-8")
    words = {"data.select.duplicates": True, "valid.path": tmp_path / "valid.jsonl", "steps": 1}
    run_folder = tune(base, tmp_path / "twice.jsonl", tmp_path / "run", **words)
    report = json.loads((run_folder / "selection.json").read_text())
    assert (report["read"], report["kept"], report["dropped"]) == (80, 40, {"duplicates": 40})
    assert "40 of 80 conversations kept; dropped: 40 duplicates" in caplog.text
    assert "40 conversations in" in caplog.text
    assert "7 of 7 held-out conversations ask nearly what training answers" in caplog.text
    page = (run_folder / "report.html").read_text()
    assert "Conversations dropped" in page
    assert "twice.jsonl:41: like" in page


def test_before_and_after_are_told(base: Path, rows: Path, tmp_path: Path) -> None:
    """Judged, watched and asked at step 0 and in the end, kept over a resume, and shown in the report."""
    pytest.importorskip("reasoning_gym")
    words = {
        "judge.tasks": {"chain_sum": {"max_terms": 2}},
        "judge.limit": 6,
        "judge.shots": 1,
        "judge.max_tokens": 4,
        "watch.path": rows,
        "watch.limit": 3,
        "rehearse": 3,
        "samples.prompts": ["How many <b>llamas</b>?"],
        "seq_len": 192,
    }
    run_folder = tune(base, rows, tmp_path / "run", **words)
    measured = json.loads((run_folder / "measured.json").read_text())
    assert len(measured["judged"]["chain_sum"]) == 6
    metrics = Metrics(run_folder / "metrics.jsonl").read()
    assert [r["step"] for r in metrics if "watched_loss" in r] == [0, 3, 6, 9]
    assert [r["step"] for r in Metrics(run_folder / "samples.jsonl").read()] == [0, 3, 6, 9]
    result = json.loads((run_folder / "result.json").read_text())
    row = result["tasks"][0]
    assert row["task"] == "chain_sum"
    assert row["gain"][1] == pytest.approx(row["after"][1] - max(row["before"][1], row["majority"]))
    page = (run_folder / "report.html").read_text()
    for told in (
        "Accuracy before and after",
        "Held-out conversations",
        "Loss before and after",
        "How many &lt;b&gt;llamas",
        f"{base}",
        "sha256:",
    ):
        assert told in page
    for gone in ("final", "checkpoints/step-9", "result.json"):
        path = run_folder / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = tune(base, rows, tmp_path / "run", **words)
    assert json.loads((again / "measured.json").read_text()) == measured
    assert json.loads((again / "result.json").read_text())["tasks"] == result["tasks"]
    assert [r["step"] for r in Metrics(again / "samples.jsonl").read()] == [0, 3, 6, 9]


def test_what_is_asked_is_what_was_trained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples and tasks asked on today's date measure another prompt than was trained; so does a second template."""
    row = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    shutil.copytree(base / "final", tmp_path / "base")
    file = tmp_path / "base/tokenizer_config.json"
    old = {**json.loads(file.read_text()), "chat_template": bundled("llama3")}
    file.write_text(json.dumps(old), encoding="utf-8")
    prompts, rows = [], []
    monkeypatch.setattr(
        llama.Llama, "continue_ids", lambda self, ids, *_, **__: prompts.extend(ids) or [[3]] * len(ids)
    )
    monkeypatch.setattr(
        sft, "PackedLoader", lambda given, **options: rows.extend(given) or PackedLoader(given, **options)
    )
    for template, variables in (("llama3.2", {}), ("llama3.1", {"builtin_tools": ["brave_search"]})):
        output = tmp_path / template
        tune(
            tmp_path / "base", tmp_path / "rows.jsonl", output, template=template, valid_fraction=0, steps=1,
            seq_len=192, variables=variables, **{"samples.prompts": ["How many?"]},
        )  # fmt: skip
        tokenizer = puna.load(output).tokenizer
        said = tokenizer.decode(prompts[-1])
        assert "26 Jul 2024" in said
        assert ("Tools: brave_search" in said) == bool(variables)
        assert rows[-1].ids[: len(prompts[-1])] == prompts[-1]
        assert "chat_template" not in json.loads((output / "final/tokenizer_config.json").read_text())
        assert tokenizer.files["chat_template.jinja"].decode() == bundled(template)
    assert load_config(sft.Config, given={"variables.tools_in_user_message": "false"}).variables == {
        "tools_in_user_message": False
    }


def test_rehearsal_is_in_the_models_own_ids() -> None:
    """A question's own end is the template's to write; a cut answer must not get an end that it did not have."""

    class Template:
        def around_user(self) -> tuple[list[int], list[int]]:
            return [1, 2], [3]

    class Model:
        template, stop_ids = Template(), [0]
        rounds = iter([[[7, 0], [8, 9]], [[70, 0], [71, 72]]])

        def continue_ids(self, prompts: list[list[int]], max_tokens: int, **sampling: Any) -> list[list[int]]:
            rows = next(self.rounds)
            assert len(rows) == len(prompts)
            return rows

    rows = rehearsal(Model(), 2, seq_len=6)  # type: ignore[arg-type]
    assert rows == [
        ([1, 2, 7, 3, 70, 0], [False, False, False, False, True, True]),
        ([1, 2, 8, 9, 3, 71], [False, False, False, False, False, True]),
    ]
    Model.rounds = iter([[[7, 0]], [[70, 0]]])
    assert rehearsal(Model(), 1, seq_len=4) == []  # type: ignore[arg-type]


def test_parity_sees_what_differs(tuned: Path, tmp_path: Path) -> None:
    """A merge of another run, or one that lost its template, has to fail the comparison that the quickstart makes."""
    llama, same = (puna.load(tuned, dtype="fp32") for _ in range(2))
    assert compare_models(llama, same, ["How many llamas?"], 8) == (0.0, 1, 1)
    with torch.no_grad():
        lora_parameters(same.model)["layers.0.mlp.up_proj.lora_B.weight"] += 0.1
    assert compare_models(llama, same, ["How many llamas?"], 8).max_difference > 1e-3
    template = bundled("llama3") + "{{ ' ' }}"
    other = replace(llama, tokenizer=Tokenizer({**llama.tokenizer.files, "chat_template.jinja": template.encode()}))
    assert compare_models(llama, other, ["How many llamas?"], 8).same == 0


def test_an_adapter_is_inspected(tuned: Path, base: Path) -> None:
    """`inspect` takes whatever chat and generate take."""
    done = subprocess.run([sys.executable, "-m", "puna", "inspect", tuned, "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["adapter of"] == str(base)


def test_one_report_of_all_acts(base: Path, tuned: Path, tmp_path: Path) -> None:
    """The quickstart's page tells of every run, each under its own heading, with ids that do not collide."""
    from puna.cli.quickstart import _write_report

    for name, run_folder in (("pretrain", base), ("chat", tuned), ("lora", tuned)):
        shutil.copytree(run_folder, tmp_path / name)
    _write_report(tmp_path, ["tokenizer", "data", "pretrain", "chat", "lora"])
    page = (tmp_path / "report.html").read_text()
    assert page.count('<h2 class="part">') == 3
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_the_best_step_is_what_is_written(base: Path, rows: Path, tmp_path: Path, lora: Any) -> None:
    """`final/` of one step beside the losses of another; checkpointing and steps in the backward on the way."""
    words: dict[str, Any] = {
        "lora": lora, "train.optimizer.lr": 1.0, "train.evaluate_every": 1, "train.keep": 1, "steps": 3,
        "train.keep_best": True, "valid_fraction": 0.3, "train.checkpoint_activations": "full", "save_dtype": "fp32",
        "train.optimizer.in_backward": True, "train.optimizer.clip": 0, "train.skip_budget": 0,
        "train.optimizer.warmup_steps": 0, "train.accumulate": 1,
    }  # fmt: skip
    tuned = tune(base, rows, tmp_path / "run", **words)
    losses = {r["step"]: r["valid_loss"] for r in Metrics(tuned / "metrics.jsonl").read() if "valid_loss" in r}
    result = json.loads((tuned / "result.json").read_text())
    kept = result["kept_step"]
    assert losses[kept] == result["valid_loss"] == min(loss for step, loss in losses.items() if step)
    assert kept < 3, "a rate of 1 does not get worse: the last step was kept"
    (final,) = (tuned / "final").glob("*.safetensors")
    ours, best = load_file(final), load_file(tuned / f"checkpoints/step-{kept}" / final.name)
    assert all(torch.equal(ours[n], best[n]) for n in best)


def test_rungs_that_do_not_fit_are_refused_before_loading(rows: Path, base: Path, tmp_path: Path) -> None:
    """Told after minutes of loading, or never."""
    for name, words in {
        "in_backward": {"train.optimizer.in_backward": True},
        "nothing is held out": {"train.patience": 2, "valid_fraction": 0},
    }.items():
        with pytest.raises(UsageError, match=name):
            tune(base, rows, tmp_path / name.replace(" ", "-"), **words)
    assert not (tmp_path / "in_backward").exists()  # nor were the rows read, which may take hours


def test_steps_that_are_typed_win_over_a_file_s_epochs(tmp_path: Path) -> None:
    """Every shipped config sets epochs: the first try of a few steps was refused."""
    (tmp_path / "mine.yaml").write_text("recipe: sft\nepochs: 2\n", encoding="utf-8")
    assert recipes_load("sft", tmp_path / "mine.yaml", {"steps": 3}).epochs is None  # type: ignore[attr-defined]
    assert recipes_load("sft", tmp_path / "mine.yaml", {"steps": 3, "epochs": 1}).epochs == 1  # type: ignore[attr-defined]


def test_epochs_that_are_typed_win_over_a_file_s_steps(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("recipe: sft\nsteps: 500\n", encoding="utf-8")
    given: Any = recipes_load("sft", tmp_path / "mine.yaml", {"epochs": 2})
    assert (given.epochs, given.steps) == (2, sft.Config.model_fields["steps"].default)


@pytest.mark.parametrize("section", ["data", "valid"])
def test_data_that_is_typed_wins_over_a_file_s(section: str, tmp_path: Path) -> None:
    """Migrated configs name a dataset of the hub: the first try on one's own rows was refused."""
    told = f"recipe: sft\n{section}:\n  hub: org/set\n  file: '*.json'\n"
    (tmp_path / "mine.yaml").write_text(told, encoding="utf-8")

    def places(word: str, value: str | None) -> tuple[str | None, ...]:
        source = getattr(recipes_load("sft", tmp_path / "mine.yaml", {f"{section}.{word}": value}), section)
        return source.path and str(source.path), source.hub, source.file

    assert places("path", "rows.jsonl") == ("rows.jsonl", None, None)
    assert places("hub", "org/other") == (None, "org/other", None)
    assert places("path", None) == (None, "org/set", "*.json")  # nothing was said in its place


@pytest.mark.parametrize("word", ["evaluate_every=0", "save_every=-1", "keep=0", "skip_budget=-1"])
def test_counts_that_cannot_be_are_refused(word: str) -> None:
    key, _, value = word.partition("=")
    with pytest.raises(UsageError, match=f"train.{key}"):
        recipes_load("sft", None, {f"train.{key}": value})
