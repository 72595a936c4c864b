"""Scores: what counts as right, intervals, and perplexity against a token-by-token sum."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import BASE, build

from puna.eval import tasks
from puna.eval.perplexity import text_bits_per_byte
from puna.eval.tasks import Score, TaskConfig, answerer, compare, evaluate_task, gain, majority, matches
from puna.infer.llama import Llama
from puna.model.config import ModelConfig
from puna.model.resize import resize_embeddings
from puna.tokenizer.tokenizer import Tokenizer

RIGHT = [("The sum is 7.", "7"), ("1 + 2 = 3", "3"), ("It is -4", "-4"), ("1,234", "1234"), ("It is 'Nus'!", "nus")]
WRONG = [("7 and 8", "7"), ("", "7"), ("-4", "4"), ("nusx", "nus"), ("17", "7"), ("seven", "7")]


@pytest.mark.parametrize(("reply", "right"), RIGHT)
def test_lenient_finds_the_answer(reply: str, right: str) -> None:
    """Format alone must not count: the base model answers in sentences."""
    assert matches(reply, right)


@pytest.mark.parametrize(("reply", "right"), WRONG)
def test_lenient_is_not_blind(reply: str, right: str) -> None:
    """A scorer that finds the answer anywhere rewards a model that lists everything."""
    assert not matches(reply, right)


def test_wilson_intervals() -> None:
    """Published values; a normal interval would be empty at 0 of 10."""
    assert Score("x", "0" * 10).interval == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert Score("x", "01" * 5).interval == pytest.approx((0.2366, 0.5, 0.7634), abs=1e-4)
    assert Score("x", "1" * 10).interval == pytest.approx((0.7225, 1, 1.0), abs=1e-4)


def test_gains_are_paired() -> None:
    """On the same problems the doubt is in those where the two differ; taken as independent it hides real gains."""
    before, after = Score("x", "1" * 40 + "0" * 60), Score("x", "1" * 38 + "0" * 2 + "1" * 12 + "0" * 48)
    won, lost, n = 12.5, 2.5, 102  # Agresti and Min 2005, equation for the adjusted Wald interval
    half = 1.959964 * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    assert gain(before, after) == pytest.approx(((won - lost) / n - half, 0.10, (won - lost) / n + half))
    low, value, high = gain(before, before)
    assert low < 0 == value < high


def test_the_gain_is_over_the_better_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that learned to say the most frequent answer has learned nothing."""
    ones = [(f"{i}?", "1" if i % 5 < 3 else "2") for i in range(1000)]
    monkeypatch.setattr(tasks, "problems", lambda task, size, seed=0, settings=None, unseen=False: ones[:size])
    config = TaskConfig(tasks={"count": {}}, limit=20)
    always_one = "11100" * 4
    row = compare({"count": "0" * 20}, {"count": always_one}, config)[0]
    assert (row["before"][1], row["majority"], row["after"][1]) == (0, 0.6, 0.6)
    assert row["gain"][1] == 0
    assert row["gain"][0] < 0 < row["gain"][2]
    better = compare({"count": "1" * 16 + "0" * 4}, {"count": "1" * 20}, config)[0]
    assert better["gain"][1] == pytest.approx(0.2)
    assert compare({"count": "0" * 20}, {"count": "1" * 20}, config)[0]["gain"][2] <= 1


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task like reasoning-gym's; what is kept for evaluation is asked from one million on."""

    def problems(task: str, size: int, seed: int = 0, settings: Any = None, unseen: bool = False) -> list:
        first = seed + unseen * 1_000_000
        return [(f"{first + i}+{i}", str(first + i + i % 3)) for i in range(size)]

    monkeypatch.setattr(tasks, "problems", problems)


def test_every_question_gets_its_own_answer(sums: None) -> None:
    """A reply that lands on its neighbour's question scores at chance."""
    seen: list[list[dict[str, Any]]] = []

    def answer(conversations: list[list[dict[str, Any]]]) -> list[str]:
        seen.extend(conversations)
        return [
            str(int(c[-1]["content"].split("+")[0]) + int(c[-1]["content"].split("+")[1]) % 3) for c in conversations
        ]

    config = TaskConfig(tasks={"sums": {}}, limit=30, shots=2, lenient=False)
    score = evaluate_task("sums", config, answer)
    assert (score.right, score.n) == (30, 30)
    assert {len(c) for c in seen} == {5}
    asked = {c[-1]["content"] for c in seen}
    assert not asked & {m["content"] for c in seen for m in c[:-1]}  # a shot that is the question gives it away
    assert evaluate_task("sums", config, lambda cs: [" no "] * len(cs)).right == 0
    assert majority("sums", 30).n == 30


def test_text_perplexity_equals_the_sum(tokenizer_folder: Path) -> None:
    """Bits per byte compare across tokenizers only if every byte and every token is counted once."""
    tokenizer = Tokenizer(tokenizer_folder)
    model = build(ModelConfig(**{**BASE, "vocab_size": tokenizer.vocab_size, "max_seq_len": 16}), torch.float64).eval()
    text = "The llamas graze: 12 of 345. 🦙"
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    nats = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[start : start + 17]])
        nats -= model(window[:, :-1]).log_softmax(-1).gather(2, window[:, 1:, None]).sum().item()
    bits, perplexity, scored = text_bits_per_byte(model, tokenizer, text)
    assert scored == len(ids) - 1
    assert bits == pytest.approx(nats / math.log(2) / len(text.encode()))
    assert perplexity == pytest.approx(math.exp(nats / scored))


def test_answers_are_those_of_generate(tokenizer_folder: Path) -> None:
    """The engine answers 5 questions 2 at a time: in order, ended by stop ids, as if each had been asked alone."""
    tokenizer = Tokenizer(tokenizer_folder)
    model = build(ModelConfig(**{**BASE, "vocab_size": tokenizer.vocab_size, "max_seq_len": 256}), torch.float64).eval()
    tokenizer = tokenizer.with_tokens(["<|im_start|>", "<|im_end|>"]).with_template("chatml")
    model = resize_embeddings(model, tokenizer.vocab_size, 600)
    llama = Llama(model, tokenizer, tokenizer_folder, tokenizer.stop_ids)
    asked = [[{"role": "user", "content": "llama " * number}] for number in (3, 1, 4, 1, 5)]
    told: list[int] = []
    found = answerer(llama, 6, 2, told.append)(asked)
    prompts = [llama.template.prompt(conversation) for conversation in asked]
    assert found == [tokenizer.decode(row) for row in llama.continue_ids(prompts, 6)]
    assert told == [1, 2, 3, 4, 5]
