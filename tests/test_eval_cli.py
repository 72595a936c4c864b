"""`puna eval` on sets of questions, as a user types it; lm-eval's view of a model."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import puna_forked
from test_model import BASE, build

from puna.data.shards import ShardWriter, write_index
from puna.errors import UsageError
from puna.eval.harness import as_lm, sampling_of
from puna.eval.pairs import Encoder
from puna.infer.llama import Llama
from puna.model.config import ModelConfig
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llama(tokenizer_folder: Path) -> Llama:
    tokenizer = Tokenizer(tokenizer_folder)
    model = build(ModelConfig(**{**BASE, "vocab_size": tokenizer.vocab_size, "max_seq_len": 256}), torch.float32).eval()
    return Llama(model, tokenizer, tokenizer_folder, [tokenizer.eos_id])


@pytest.fixture(scope="module")
def models(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one, and questions for both."""
    folder = tmp_path_factory.mktemp("models")
    llama.save(folder / "a", "fp32")
    torch.manual_seed(7)
    other = build(llama.model.config, torch.float32).eval()
    Llama(other, llama.tokenizer, llama.path, llama.stop_ids).save(folder / "b", "fp32")
    rows = [{"goal": f"llama {i}", "sol1": "grass " * (i + 1), "sol2": f"{i} stars", "label": i % 2} for i in range(9)]
    (folder / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scores_gains_answers_and_contamination(models: Path, shards: Path) -> None:
    """One command, all of it: each score with its interval, n, definition and data; the answers it was made of."""
    common = ["eval", "a", "--tasks", "piqa", "--data", ".", "--dtype", "fp32"]
    more = ["--shots", "2", "--limit", "8", "--against", "b", "--shards", shards, "--output", "answers", "--json"]
    asked, again, plain, words, other = puna_forked(
        [[*common, *more], [*common, "--against", "a", "--json"], common, [*common, "--against", "b"],
         [*common[:1], "b", *common[2:], "--json"]], models,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    [row] = json.loads(asked.stdout)
    assert (row["task"], row["n"], row["shots"], row["data"][:7]) == ("piqa", 8, 2, "sha256:")
    assert set(row["metrics"]) == {"acc", "acc_norm", "acc_bytes", "bits_per_byte"}
    assert all(each["low"] <= each["value"] <= each["high"] for each in row["metrics"].values())
    assert all(each["definition"] for each in row["metrics"].values())
    made = {"model": "a", "dtype": "float32", "seed": 1234, "cut": 0}
    assert {name: row[name] for name in made} == made
    answers = [json.loads(line) for line in (models / "answers/piqa.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert sum(answer["acc"] for answer in answers) / 8 == row["metrics"]["acc"]["value"]
    for answer in answers:
        assert answer["context"].count("Answer:") == 3
        likeliest = answer["choices"][answer["logprobs"].index(max(answer["logprobs"]))]
        assert answer["answer"] == likeliest
        assert answer["acc"] == (likeliest == answer["right"])
    assert row["contamination"]["subsets"]["clean"]["n"] == 8  # nothing of this is in the shards
    assert json.loads(again.stdout)[0]["gain"]["value"] == 0
    [alone] = json.loads(other.stdout)
    told = f"{alone['metrics']['acc']['value']:.4f}"
    assert [line.split()[3] for line in words.stdout.splitlines() if "the other model " in line] == [told]
    assert words.stdout.count(" of b") == 1
    assert row["against"]["model"] == "b"
    assert row["against"]["metrics"].keys() == row["metrics"].keys()
    assert "the right answer has the highest log-likelihood" in plain.stdout


def test_mistakes_are_told(models: Path) -> None:
    """A name with a slip, code that nobody allowed, data that is not there: what to type, before a model is loaded."""
    piqa = ("--tasks", "piqa", "--data", ".")
    cases = {
        ("--tasks", "pika"): (2, "no task `pika`; did you mean `piqa`?"),
        ("--tasks", "humaneval", "--data", "."): (2, "--run-code"),
        ("--tasks", "arc_easy", "--data", "."): (3, "a file arc_easy_test.jsonl"),
        ("--tasks", "gsm8k"): (3, "--data FOLDER"),
        ("--tasks", "piqa", "--data", "nowhere"): (3, "no such folder"),
        ("--tasks", "piqa", "--data", ".", "--samples", "4"): (2, "--temperature"),
        ("--tasks", "none.jsonl"): (3, "none.jsonl"),
        ("--tasks", "arc_agi,arc_easi"): (2, "no task `arc_easi`; did you mean `arc_easy`?"),
        (*piqa, "--shards", "nowhere"): (3, "no token shards here"),
        (*piqa, "--output", "piqa_validation.jsonl"): (2, "piqa_validation.jsonl"),
        ("--tasks", "arc_agi", "--output", "x"): (2, "--output does nothing for arc_agi"),
        ("--tasks", "arc_agi", "--shards", "x"): (2, "--shards does nothing for arc_agi"),
        (*piqa, "--samples", "4", "--temperature", "1"): (2, "--samples does nothing for piqa"),
    }
    for done, (code, part) in zip(
        puna_forked([["eval", "none", *w] for w in cases], models), cases.values(), strict=True
    ):
        assert (done.returncode, part in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


def test_planted_questions_are_found(llama: Llama, models: Path) -> None:
    """Words of the template, or of other questions' examples, that stand for what was trained on."""
    folder = models / "planted"
    folder.mkdir()
    goals = [
        "Llamas walk over the high plain at dawn",
        "How does a fox hide from the rain in winter",
        "Far below the condors somebody is mending a roof",
        "To keep toads away, water the garden before noon",
    ]
    rows = [{"goal": goal, "sol1": f"rest {i}", "sol2": f"graze {i}", "label": 1} for i, goal in enumerate(goals)]
    (folder / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = ShardWriter(folder, "train", llama.tokenizer.vocab_size)
    for number, text in enumerate([f"{goals[1]} graze 1", f"Question: {'Question: Answer: ' * 9}\nAnswer: rest"]):
        writer.add(llama.tokenizer.encode(text), f"{number}.txt", 1)
    write_index(folder, [writer], llama.tokenizer.fingerprint)
    asked = ["eval", "a", "--tasks", "piqa", "--data", folder, "--shots", "2", "--shards", folder, "--dtype", "fp32"]
    [done] = puna_forked([[*asked, "--ngram", "12", "--json"]], models)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)[0]["contamination"]
    assert (found["touched"], found["subsets"]["dirty"]["n"], found["subsets"]["clean"]["n"]) == (0.25, 1, 3)
    assert found["tokens"] == 0.25  # all of the one question


def test_both_models_read_the_text(models: Path) -> None:
    """A second model that is loaded, and then left out of what was asked."""
    (models / "text.txt").write_text("The llama grazes in the puna.")
    asked = ["eval", "a", "--against", "b", "--text", "text.txt", "--dtype", "fp32", "--json"]
    [done] = puna_forked([asked], models)
    assert [row["model"] for row in json.loads(done.stdout)] == ["a", "b"]


def test_no_room_is_told_before_the_first_exam(models: Path) -> None:
    """Ids of an answer that leave one token of the question, found out after hours of other tasks."""
    (models / "gsm8k_test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    [done] = puna_forked([["eval", "a", "--tasks", "piqa,gsm8k", "--data", ".", "--dtype", "fp32"]], models)
    assert (done.returncode, done.stdout) == (2, "")
    assert "answers of 256 tokens leave no room" in done.stderr


def test_tasks_are_listed(tmp_path: Path) -> None:
    """A task that the table does not show is not found."""
    [done] = puna_forked([["ls", "tasks", "--json"]], tmp_path)
    names = [row["name"] for row in json.loads(done.stdout)]
    assert {"mmlu", "arc_easy", "gsm8k", "humaneval", "lambada"} <= set(names)


def test_settings_of_lm_eval() -> None:
    """A setting that is dropped changes the answers and nobody knows why."""
    found = sampling_of({"until": ["\n", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9})
    assert (found.temperature, found.stop, found.max_tokens) == (0.0, ("\n",), 9)
    assert sampling_of({"temperature": 0.7, "top_p": 0.9}).temperature == 0.7
    with pytest.raises(UsageError, match="num_beams"):
        sampling_of({"num_beams": 4})


def test_repeats_and_begun_answers(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats of a request that are copies; an answer the task has begun, closed and asked for anew."""
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", SimpleNamespace(LM=object))
    lm = as_lm(llama, max_gen_toks=5)
    request = SimpleNamespace(args=("The llama", {"until": [], "temperature": 1.0, "do_sample": True}))
    assert len({*lm.generate_until([request] * 8)}) == 8
    with pytest.raises(UsageError, match="an answer that the task begins"):
        lm.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=False)


def test_lm_eval_runs_on_it(llama: Llama) -> None:
    """What lm-eval calls: (log-likelihood, greedy) pairs, sums over windows, texts in the order of the requests."""
    if not find_spec("lm_eval"):
        pytest.skip("lm-eval is not installed: its view of a model is not tested")
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    lm = as_lm(llama, max_gen_toks=5)
    assert isinstance(lm, LM)

    def asked(kind: Any, *arguments: Any) -> Any:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    pair = Encoder(llama.tokenizer, 256).pairs([("The llama", " grazes")])[0]
    logp = llama.logits([[*pair.context, *pair.continuation][:-1]])[0, len(pair.context) - 1 :].log_softmax(-1)
    total = logp.gather(1, torch.tensor(pair.continuation)[:, None]).sum().item()
    assert lm.loglikelihood([asked("loglikelihood", "The llama", " grazes")])[0][0] == pytest.approx(total, abs=1e-4)
    assert lm.loglikelihood_rolling([asked("loglikelihood_rolling", "The llama grazes.")])[0] < 0
    prompts = [("The llama", {"until": ["Z"]}), ("stars", {"until": []}), ("The puna", {"until": ["Z"]})]
    written = lm.generate_until([asked("generate_until", *each) for each in prompts])
    alone = [lm.generate_until([asked("generate_until", *each)])[0] for each in prompts]
    assert written == alone
    sampled = ("The llama", {"until": [], "temperature": 1.0, "do_sample": True})
    assert len({*lm.generate_until([asked("generate_until", *sampled)] * 8)}) > 1  # repeats are no copies
