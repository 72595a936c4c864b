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
    return choice(row["id"], f"Question: {row['question']}\nAnswer:", texts, gold)


def lettered_arc(row: Row) -> Question:
    return _lettered(row["id"], f"Question: {row['question']}\n", *_choices(row))


def openbookqa(row: Row) -> Question:
    texts, gold = _choices(row)
    return choice(row["id"], row["question_stem"], texts, gold)


def lettered_openbookqa(row: Row) -> Question:
    return _lettered(row["id"], f"Question: {row['question_stem']}\n", *_choices(row))


def commonsense_qa(row: Row) -> Question:
    texts, gold = _choices(row)
    return _exam(row["id"], f"Question: {row['question'].strip()}", texts, gold)


def mmlu(row: Row) -> Question:
    return _exam("", row["question"].strip(), row["choices"], int(row["answer"]), group=row["subject"])


def mmlu_header(subject: str) -> str:
    """What stands before the examples of a subject."""
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_without_brackets(ending) for ending in row["endings"]]
    return choice(row["ind"], _without_brackets(context), endings, int(row["label"]))


def piqa(row: Row) -> Question:
    return choice("", f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def winogrande(row: Row) -> Question:
    """The end of the sentence after each way to fill the blank (Trinh and Le 2018)."""
    before, _, after = row["sentence"].partition("_")
    filled = (before + row["option1"], before + row["option2"])
    return Question("", filled, (f" {after.strip()}",) * 2, int(row["answer"]) - 1)


def boolq(row: Row) -> Question:
    right = row["answer"] if "answer" in row else row["label"]
    return choice("", f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(right))


def sciq(row: Row) -> Question:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return choice("", f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def lambada(row: Row) -> Question:
    """The last word of a passage: as `text`, or already split."""
    if "text" in row:
        context, _, word = row["text"].rpartition(" ")
    else:
        context, word = row["context"], row["continuation"].strip()
    return choice("", context, [word], 0)


def gsm8k(row: Row) -> Question:
    return choice("", f"Question: {row['question']}\nAnswer:", [row["answer"]], 0, row=row)


def humaneval(row: Row) -> Question:
    return Question(row["task_id"], (row["prompt"],), (row["canonical_solution"],), row=row)


def _choices(row: Row) -> tuple[Sequence[str], int]:
    return row["choices"]["text"], list(row["choices"]["label"]).index(row["answerKey"].strip())


def _lettered(id: Any, question: str, texts: Sequence[str], gold: int) -> Question:
    lines = "".join(f" {letter}. {text}\n" for letter, text in zip(LETTERS, texts, strict=False))
    return choice(id, f"{question}{lines}Answer:", LETTERS[: len(texts)], gold)


def _exam(id: Any, question: str, texts: Sequence[str], gold: int, **more: Any) -> Question:
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, texts, strict=False))
    return choice(id, f"{question}\n{lines}Answer:", LETTERS[: len(texts)], gold, **more)


def _without_brackets(text: str) -> str:
    """WikiHow's part of HellaSwag has [title] and [step] marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
