"""Every task with data of its own: a row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from puna.eval import shapes
from puna.eval.question import Question

Kind = Literal["choice", "cloze", "numbers", "code"]
"""Which answer is likelier; is this one likely; the number a written answer ends with; code that passes tests."""


@dataclass(frozen=True)
class Task:
    """How the rows of an evaluation set are asked and what is read from the answers."""

    summary: str
    kind: Kind
    shape: Callable[[Mapping[str, Any]], Question]
    stem: str
    """Its files' names begin so, whatever their case."""
    package: str = ""
    """Its folder in the package of evaluation sets."""
    first_shots: bool = False
    """Examples are the first ones of the question's subject, not drawn."""
    header: Callable[[str], str] | None = None
    """Subject -> text before the examples."""
    stop: tuple[str, ...] = field(default=(), repr=False)
    max_tokens: int = 0


_GSM8K = ("Question:", "</s>", "<|im_end|>")
_CODE = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TASKS = {
    "arc_easy": Task("science questions for schools", "choice", shapes.arc, "arc_easy", "ai2_arc/ARC-Easy"),
    "arc_easy:mc": Task("the same, by letter", "choice", shapes.lettered_arc, "arc_easy", "ai2_arc/ARC-Easy"),
    "arc_challenge": Task("the hard ones", "choice", shapes.arc, "arc_challenge", "ai2_arc/ARC-Challenge"),
    "arc_challenge:mc": Task(
        "the hard ones, by letter", "choice", shapes.lettered_arc, "arc_challenge", "ai2_arc/ARC-Challenge"
    ),
    "boolq": Task("yes or no about a passage", "choice", shapes.boolq, "boolq", "boolq/none"),
    "commonsense_qa": Task(
        "everyday knowledge, by letter", "choice", shapes.commonsense_qa, "commonsense_qa", "tau/commonsense_qa/none"
    ),
    "gsm8k": Task(
        "school maths in words, written out", "numbers", shapes.gsm8k, "gsm8k", stop=_GSM8K, max_tokens=256
    ),
    "hellaswag": Task("how a story goes on", "choice", shapes.hellaswag, "hellaswag", "hellaswag/none"),
    "humaneval": Task(
        "Python functions that must pass tests", "code", shapes.humaneval, "humaneval", stop=_CODE, max_tokens=1024
    ),
    "lambada": Task("the last word of a passage", "cloze", shapes.lambada, "lambada"),
    "mmlu": Task(
        "57 subjects, by letter", "choice", shapes.mmlu, "mmlu", "hails/mmlu_no_train",
        first_shots=True, header=shapes.mmlu_header,
    ),
    "openbookqa": Task("facts of science", "choice", shapes.openbookqa, "openbookqa", "openbookqa/main"),
    "openbookqa:mc": Task("the same, by letter", "choice", shapes.lettered_openbookqa, "openbookqa", "openbookqa/main"),
    "piqa": Task("how things are done", "choice", shapes.piqa, "piqa", "piqa/plain_text"),
    "sciq": Task("science, with the passage that knows", "choice", shapes.sciq, "sciq", "sciq/none"),
    "winogrande": Task("whom a sentence means", "choice", shapes.winogrande, "winogrande", "winogrande/winogrande_xl"),
}  # fmt: skip
