"""A row of an evaluation set -> a Question. The words are those of lm-eval 0.4's tasks of the same name; `lettered` is
the form of OLMES (Gu et al. 2024) with all choices in the question."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from puna.eval.question import Question, choice

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def arc(row: Row) -> Question:
    texts, gold = _choices(row)
    raw = _raw(row["question"], texts[gold])
    return choice(row["id"], f"Question: {row['question']}\nAnswer:", texts, gold, raw=raw)


def lettered_arc(row: Row) -> Question:
    return _lettered(row["id"], row["question"], *_choices(row))


def openbookqa(row: Row) -> Question:
    texts, gold = _choices(row)
    return choice(row["id"], row["question_stem"], texts, gold, raw=_raw(row["question_stem"], texts[gold]))


def lettered_openbookqa(row: Row) -> Question:
    return _lettered(row["id"], row["question_stem"], *_choices(row))


def commonsense_qa(row: Row) -> Question:
    texts, gold = _choices(row)
    question = row["question"].strip()
    return _exam(row["id"], f"Question: {question}", texts, gold, raw=_raw(question, texts[gold]))


def mmlu(row: Row) -> Question:
    question, texts, gold = row["question"].strip(), row["choices"], int(row["answer"])
    return _exam("", question, texts, gold, raw=_raw(question, texts[gold]), group=row["subject"])


def mmlu_header(subject: str) -> str:
    """What stands before the examples of a subject."""
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def hellaswag(row: Row) -> Question:
    story, gold = f"{row['ctx_a']} {row['ctx_b'].capitalize()}", int(row["label"])
    context = _without_brackets(f"{row['activity_label']}: {story}")
    endings = [_without_brackets(ending) for ending in row["endings"]]
    return choice(row["ind"], context, endings, gold, raw=_raw(_without_brackets(story), endings[gold]))


def piqa(row: Row) -> Question:
    texts, gold = [row["sol1"], row["sol2"]], int(row["label"])
    return choice("", f"Question: {row['goal']}\nAnswer:", texts, gold, raw=_raw(row["goal"], texts[gold]))


def winogrande(row: Row) -> Question:
    """The end of the sentence after each way to fill the blank (Trinh and Le 2018)."""
    before, _, after = row["sentence"].partition("_")
    filled, gold = (before + row["option1"], before + row["option2"]), int(row["answer"]) - 1
    return Question("", filled, (f" {after.strip()}",) * 2, gold, raw=_raw(filled[gold], after.strip()))


def boolq(row: Row) -> Question:
    right = row["answer"] if "answer" in row else row["label"]
    context, raw = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", _raw(row["passage"], row["question"])
    return choice("", context, ["no", "yes"], int(right), raw=raw)


def sciq(row: Row) -> Question:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return choice("", context, choices, 3, raw=_raw(row["question"], row["correct_answer"]))


def lambada(row: Row) -> Question:
    """The last word of a passage: as `text`, or already split."""
    if "text" in row:
        context, _, word = row["text"].rpartition(" ")
    else:
        context, word = row["context"], row["continuation"].strip()
    return choice("", context, [word], 0, raw=_raw(context, word))


def gsm8k(row: Row) -> Question:
    return choice("", f"Question: {row['question']}\nAnswer:", [row["answer"]], 0,
                  raw=_raw(row["question"], row["answer"]), row=row)  # fmt: skip


def humaneval(row: Row) -> Question:
    prompt, solution = row["prompt"], row["canonical_solution"]
    return Question(row["task_id"], (prompt,), (solution,), raw=prompt + solution, row=row)


def _raw(question: str, answer: str) -> str:
    return f"{question} {answer}"


def _choices(row: Row) -> tuple[Sequence[str], int]:
    return row["choices"]["text"], list(row["choices"]["label"]).index(row["answerKey"].strip())


def _lettered(id: Any, question: str, texts: Sequence[str], gold: int) -> Question:
    lines = "".join(f" {letter}. {text}\n" for letter, text in zip(LETTERS, texts, strict=False))
    context = f"Question: {question}\n{lines}Answer:"
    return choice(id, context, LETTERS[: len(texts)], gold, raw=_raw(question, texts[gold]))


def _exam(id: Any, question: str, texts: Sequence[str], gold: int, **more: Any) -> Question:
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, texts, strict=False))
    return choice(id, f"{question}\n{lines}Answer:", LETTERS[: len(texts)], gold, **more)


def _without_brackets(text: str) -> str:
    """WikiHow's part of HellaSwag has [title] and [step] marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
