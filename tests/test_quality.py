"""What `data.select` drops: duplicates against exact Jaccard, Gopher's rules by hand, lengths, the best by score."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import puna

from puna.data.conversation import Conversation
from puna.data.conversations import ChatSource, read_conversations
from puna.data.leaks import near_both
from puna.data.quality.config import SelectConfig
from puna.data.quality.near_duplicates import NearDuplicates, grams, jaccard, rows_of_a_band, signature, word_ids
from puna.data.quality.rules import pieces, repeated_lines, repeated_share, repetition, words
from puna.data.quality.select import Selection, select, sides
from puna.errors import DataError, UsageError
from puna.tokenizer.chat.format import Encoded


def chats(*pairs: tuple[str, str]) -> list[Conversation]:
    return [
        Conversation(f"f:{i}", [{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for i, (q, a) in enumerate(pairs, 1)
    ]


def kept(selection: Selection) -> list[str]:
    return [c.where for c in selection]


def sets(texts: list[str]) -> list[np.ndarray]:
    return [grams(word_ids(pieces(text))) for text in texts]


def reworded(text: str, draw: random.Random, share: float) -> str:
    """`text` with about `share` of its words replaced."""
    return " ".join(f"w{draw.random()}" if draw.random() < share else word for word in text.split())


@pytest.fixture(scope="module")
def prompts(assets: Path) -> list[str]:
    """The prompts of Alpaca's 999 rows, each once."""
    source = ChatSource(path=assets / "sft/alpaca_en_demo.json.gz")
    return list(dict.fromkeys(sides(c)[0] for c in read_conversations(source)))


def test_signatures_estimate_the_exact_similarity(prompts: list[str]) -> None:
    """Hash functions that are not independent agree too often or too seldom; the error is that of 128 coin tosses."""
    draw, errors = random.Random(0), []
    for text in (t for t in prompts if len(t.split()) > 15):
        for share in (0.05, 0.1, 0.2):
            a, b = sets([text, reworded(text, draw, share)])
            if 0 < (true := jaccard(a, b)) < 1:
                errors.append(float(((signature(a) == signature(b)).mean() - true) / (true * (1 - true) / 128) ** 0.5))
    assert len(errors) > 300
    assert abs(np.mean(errors)) < 4 / len(errors) ** 0.5
    assert 0.9 < np.std(errors) < 1.1


def test_jaccard_by_hand() -> None:
    """The oracle itself: {abc, bcd, cde} and {abc, bcd, cdx} share two of four; and signs are words."""
    assert jaccard(*sets(["a b c d e", "a, B; c d x"])) == 0.5
    assert jaccard(*sets(["What is 2 + 3?", "What is 2 - 3?"])) < 0.5
    assert jaccard(*sets(["puna", "puna!"])) == 1
    assert len(grams(word_ids([]))) == 0


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_a_pair_at_the_threshold_shares_a_band(threshold: float) -> None:
    """Bands that are too long never bring similar texts together: recall falls and nothing tells."""
    rows = rows_of_a_band(threshold)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_bands_find_what_comparing_all_pairs_finds(threshold: float, prompts: list[str]) -> None:
    """Every text whose signature reaches the threshold of an earlier kept one, and no other."""
    draw = random.Random(1)
    texts = [reworded(t, draw, s) for t in prompts[:150] for s in (0, 0.02, 0.08)]
    draw.shuffle(texts)
    fast, found = NearDuplicates(threshold), []
    slow: list[np.ndarray] = []
    expected = []
    for own in map(signature, sets(texts)):
        alike = [float((own == other).mean()) for other in slow]
        best = max(alike, default=0.0)
        expected.append((alike.index(best), best) if best >= threshold else None)
        found.append(fast.find(own))
        if expected[-1] is None:
            fast.add(own)
            slow.append(own)
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    assert sum(e is not None for e in expected) > 100
    assert wrong <= 0.01 * len(texts)


def test_planted_near_duplicates_are_found(prompts: list[str]) -> None:
    """The claim of the rule: of prompts reworded to 0.8 and more nearly all go, of others nearly none."""
    draw, planted = random.Random(2), {}
    rows = chats(*((p, "a") for p in prompts))
    for number, text in enumerate(t for t in prompts if len(t.split()) >= 20):
        other = reworded(text, draw, draw.choice([0.01, 0.03, 0.1]))
        where = f"planted:{number}"
        planted[where] = jaccard(*sets([text, other]))
        rows.append(Conversation(where, [{"role": "user", "content": other}, {"role": "assistant", "content": "a"}]))
    dropped = {c.where for c in rows} - set(kept(select(rows, SelectConfig(near_duplicates=0.8))))
    alike = {where for where, true in planted.items() if true >= 0.8}
    apart = {where for where, true in planted.items() if true < 0.8}
    assert len(alike) > 50
    assert len(apart) > 20
    sure = {where for where in alike if planted[where] >= 0.87}  # two deviations above the threshold
    assert len(dropped & sure) / len(sure) >= 0.97
    recall, precision = len(dropped & alike) / len(alike), len(dropped & alike) / len(dropped & set(planted))
    print(f"recall {recall:.3f} of {len(alike)}, precision {precision:.3f}")
    assert recall >= 0.93
    assert precision >= 0.9
    own = [set(hashes.tolist()) for hashes in sets(prompts)]
    alike_before = sum(any(len(a & b) >= 0.7 * len(a | b) for b in own[:i]) for i, a in enumerate(own))
    assert len(dropped - set(planted)) <= alike_before  # of Alpaca's own


def test_the_first_stays_whatever_follows() -> None:
    """A row that another rule dropped must not take a good later one with it."""
    rows = chats(("What is a llama?", ""), ("What is a  LLAMA?", "An animal."), ("what is a llama?", "A beast."))
    selection = select(rows, SelectConfig(empty_answers=True, duplicates=True))
    assert kept(selection) == ["f:2"]
    assert selection.report == {
        "read": 3, "kept": 1, "dropped": {"empty_answers": 1, "duplicates": 1},
        "examples": {"empty_answers": [{"where": "f:1", "why": "the assistant says nothing"}],
                     "duplicates": [{"where": "f:3", "why": "like f:2"}]},
    }  # fmt: skip
    assert kept(select(rows, SelectConfig(duplicates=True, compare="conversation"))) == ["f:1", "f:2", "f:3"]
    assert kept(select(chats(("2 + 3", "5"), ("2 - 3", "-1")), SelectConfig(duplicates=True))) == ["f:1", "f:2"]


def test_nothing_is_dropped_by_default_and_rows_come_one_by_one() -> None:
    """A default that drops is training on something else than was given; reading all first is memory."""
    rows, taken = chats(("", ""), ("", ""), ("a", "b " * 99)), []

    def told() -> Iterator[Conversation]:
        for row in rows:
            taken.append(row.where)
            yield row

    everything = iter(select(told(), SelectConfig()))
    assert next(everything).where == "f:1"
    assert taken == ["f:1"]
    assert [c.where for c in everything] == ["f:2", "f:3"]


def test_lengths_are_words_of_each_side() -> None:
    """Counted in characters a limit means another thing in every language."""
    rows = chats(("one", "one two"), ("one two three", "one"), ("你好吗", "很好"))
    assert kept(select(rows, SelectConfig(min_prompt_words=2))) == ["f:2", "f:3"]
    assert kept(select(rows, SelectConfig(max_prompt_words=1))) == ["f:1"]
    assert kept(select(rows, SelectConfig(min_answer_words=2))) == ["f:1", "f:3"]
    assert kept(select(rows, SelectConfig(max_answer_words=1))) == ["f:2"]
    assert words("Don't stop! 你好") == ["don", "t", "stop", "你", "好"]


def test_repetition_by_hand() -> None:
    """Gopher's shares, counted by hand."""
    assert repeated_lines(["ab", "ab", "cdef"]) == 2 / 8
    assert repeated_lines([]) == 0
    a_b = list("abcdefabcde")
    assert repeated_share(a_b, 5) == 5 / 11  # the second abcde
    assert repeated_share(a_b, 6) == 0
    assert repeated_share(list("aaaaaa"), 5) == 5 / 6  # two fives that overlap: the second one
    varied = " ".join(f"word{i}" for i in range(100))
    assert repetition(varied, 1) == ""
    assert repetition("no no no no", 1) == ""  # a short answer repeats itself by right
    assert "repeated lines" in repetition(f"{varied}\n" + f"{varied[:200]}\n" * 3, 1)
    assert "is `of the`" in repetition(" ".join(f"of the x{i}" for i in range(40)), 1)
    assert repetition(" ".join(f"of the x{i}" for i in range(40)), 9) == ""
    assert "sequences of 5" in repetition(f"{varied} {varied[:160]}", 1)
    loop = chats(("Why?", "I do not know. " * 40), ("Why?", varied))
    assert kept(select(loop, SelectConfig(repetition=2))) == ["f:2"]


@pytest.mark.parametrize(
    ("name", "factor", "least", "most"),
    [
        ("alpaca_en_demo.json.gz", 1, 0.01, 0.03), ("alpaca_en_demo.json.gz", 2, 0, 0.002),
        ("gsm8k_train.jsonl.gz", 1, 0.13, 0.17), ("gsm8k_train.jsonl.gz", 2, 0, 0.015),
    ],
)  # fmt: skip
def test_what_gophers_limits_cost(name: str, factor: float, least: float, most: float, assets: Path) -> None:
    """Made for web pages, they drop good solutions and lists: the config says how many."""
    conversations = read_conversations(ChatSource(path=assets / "sft" / name, limit=1500))
    selection = select(conversations, SelectConfig(repetition=factor))
    count = len(kept(selection))
    assert least <= 1 - count / selection.report["read"] <= most


def test_scorers_keep_the_best() -> None:
    """Scores of what other rules dropped must not count, and equals must not depend on chance."""
    rows = chats(("a", "1"), ("b", "5"), ("c", ""), ("d", "3"), ("e", "3"))
    by_number = {"reward": lambda c: float(c.messages[1]["content"])}
    selection = select(rows, SelectConfig(empty_answers=True), by_number, {"reward": 0.5})
    assert kept(selection) == ["f:2", "f:4"]
    assert selection.report["dropped"] == {"empty_answers": 1, "reward": 2}
    assert selection.report["examples"]["reward"] == [{"where": "f:1", "why": "1"}, {"where": "f:5", "why": "3"}]
    both = {"reward": by_number["reward"], "short": lambda c: -float(c.messages[1]["content"])}
    assert kept(select(rows, SelectConfig(empty_answers=True), both, {"reward": 0.75, "short": 0.75})) == ["f:4", "f:5"]
    with pytest.raises(DataError, match="reward gives nan"):
        kept(select(rows, SelectConfig(), {"reward": lambda c: float("nan")}, {"reward": 0.5}))
    with pytest.raises(UsageError, match="do not match"):
        select(rows, SelectConfig(), by_number, {})


def test_calls_are_answers_and_texts_are_both() -> None:
    """An answer that is a call has no words; a raw text has no sides."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    called = Conversation("f:1", [{"role": "user", "content": "x"},
                                  {"role": "assistant", "content": "", "tool_calls": [call]}])  # fmt: skip
    text = Conversation("f:2", [], text="once upon a time")
    assert kept(select([called, text], SelectConfig(empty_answers=True))) == ["f:1", "f:2"]
    assert kept(select([called, text], SelectConfig(min_answer_words=1))) == ["f:2"]


def test_it_is_a_section_of_the_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rules in the config have to reach what is trained, and say what they did."""
    caplog.set_level("INFO", "puna")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i // 2}", "completion": "x"}) + "\n" for i in range(10)))
    report: dict[str, object] = {}
    source = ChatSource(path=file, limit=8, select=SelectConfig(duplicates=True))
    assert len(list(read_conversations(source, report))) == 4
    assert (report["read"], report["kept"]) == (8, 4)
    assert "4 of 8 conversations kept; dropped: 4 duplicates" in caplog.text


def test_questions_that_training_answers_are_counted() -> None:
    """The template's own words, alike in every row, must not make all rows alike; nor hide those that are."""
    start, end = list(range(100)), list(range(200, 220))
    draw = random.Random(0)

    def row(question: list[int]) -> Encoded:
        ids = [*start, *question, *end, 1, 2]
        return Encoded(ids, [False] * (len(ids) - 2) + [True] * 2)

    questions = [[draw.randrange(1000, 9000) for _ in range(30)] for _ in range(40)]
    valid = [row(question) for question in questions[:20]]
    assert near_both([row(question) for question in questions[20:]], valid) == 0
    changed = [[*question[:-1], 7] for question in questions[5:8]]
    assert near_both([row(question) for question in [*questions[20:], *changed]], valid) == 3
    texts = [Encoded([0, *question], [False] + [True] * 30) for question in questions]
    assert near_both(texts[5:30], texts[:20]) == 15
    # One held-out row, as of twenty in all: it took its whole prompt for the template's.
    assert near_both([row(question) for question in questions[:3]], valid[:1]) == 1
    assert near_both([row(question) for question in questions[1:3]], valid[:1]) == 0
    short = [row([n, n + 1, n + 2, n + 3]) for n in (1000, 2000, 3000)]
    assert near_both([*short[1:], *texts], short[:1]) == 0
    assert near_both([row([])], [row([]), row([])]) == 0
    assert near_both(valid, []) == 0


def test_the_verb_shows_and_writes(tmp_path: Path) -> None:
    """What is dropped has to be seen before it is trained without it, in a terminal of 80 columns."""
    file, kept_file = tmp_path / "rows.jsonl", tmp_path / "kept.jsonl"
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows = [{"messages": [{"role": "user", "content": "Hi\x1b[31m"}, {"role": "assistant", "content": "Ho"}]}] * 2
    rows += [{"messages": [{"role": "user", "content": "Call"}, {"role": "assistant", "tool_calls": [call]}],
              "tools": [{"name": "f"}]}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    done = puna("data", "select", file, "data.select.duplicates=true", "--output", kept_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "2 of 3 conversations kept\n\nduplicates: 1 dropped (33.3%)\n  rows.jsonl:2  like rows.jsonl:1\n"
    )
    before, after = (list(read_conversations(ChatSource(path=path))) for path in (file, kept_file))
    assert [c[1:] for c in after] == [before[0][1:], before[2][1:]]
    config = tmp_path / "mine.yaml"
    config.write_text(f"recipe: sft\ndata: {{path: {file}, select: {{duplicates: true}}}}\n")
    report = json.loads(puna("data", "select", config, "data.select.min_answer_words=1", "--json").stdout)
    assert report["dropped"] == {"min_answer_words": 1, "duplicates": 1}
