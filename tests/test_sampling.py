"""What is drawn against formulas, and where answers end."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.errors import NumericError
from puna.infer import sampling
from puna.infer.sampling import Filters, Sampling, penalized, probabilities, sample
from puna.infer.stopping import StopStrings
from puna.tokenizer.spm import save_spm
from puna.tokenizer.tokenizer import Tokenizer

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.4, 0.0, -0.5, -1.0, -3.0])
N = 20000


def by_formula(logits: Sequence[float], s: Sampling) -> Tensor:
    """Probabilities written out id by id, in double precision."""
    p = torch.tensor(logits, dtype=torch.float64).div(s.temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept = order[: s.top_k or len(order)]
    mass, total, nucleus = 0.0, float(p[kept].sum()), []
    for i in kept:
        if mass <= s.top_p * total or s.top_p == 1:
            nucleus.append(i)
        mass += float(p[i])
    kept = [i for i in nucleus if p[i] >= s.min_p * p[order[0]]]
    return torch.zeros_like(p).index_put_((torch.tensor(kept),), p[kept] / p[kept].sum())


CASES: dict[str, dict[str, Any]] = {
    "all": {}, "cooler": {"temperature": 0.5}, "top-k": {"top_k": 3}, "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.2}, "k, p, min-p": {"top_k": 6, "top_p": 0.9, "min_p": 0.15, "temperature": 1.7},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_formula(case: str) -> None:
    """A filter that keeps one id too many, or scales what it keeps; p = 0.001 of a chi-square test."""
    row = Sampling(**{"temperature": 1.0, **CASES[case]})
    r = random.Random(0)
    filters = Filters.of([row] * N, LOGITS.device)
    chosen = sample(LOGITS.expand(N, -1), filters, [r.random() for _ in range(N)])
    counts, wanted = torch.bincount(chosen, minlength=8).double(), N * by_formula(LOGITS.tolist(), row)
    assert counts[wanted == 0].sum() == 0
    possible = wanted > 0
    statistic = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    limits = {2: 10.8, 3: 13.8, 4: 16.3, 5: 18.5, 6: 20.5, 7: 22.5, 8: 24.3}
    assert statistic < limits[int(possible.sum())]


@pytest.mark.parametrize("few", [sampling._FEW, 3])
def test_rows_keep_to_their_own_parameters(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row's top-k or temperature applied to its neighbours; a nucleus cut where the sorted part of it ends."""
    monkeypatch.setattr(sampling, "_FEW", few)
    r = random.Random(1)
    rows = [Sampling(temperature=r.choice([0, 0.5, 1.0, 2.0]), top_k=r.choice([0, 1, 4]),
                     top_p=r.choice([1.0, 0.5, 0.0]), min_p=r.choice([0.0, 0.3])) for _ in range(64)]  # fmt: skip
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    drawn = [r.random() for _ in rows]
    together = sample(logits, Filters.of(rows, logits.device), drawn)
    found = probabilities(logits, Filters.of(rows, logits.device)).double()
    for i, row in enumerate(rows):
        assert sample(logits[i : i + 1], Filters.of([row], logits.device), drawn[i : i + 1]) == together[i]
        if row.temperature:
            wanted = by_formula(logits[i].tolist(), row)
            torch.testing.assert_close(found[i] / found[i].sum(), wanted, atol=1e-6, rtol=0)
        else:
            assert together[i] == logits[i].argmax()


def test_penalties_and_biases_equal_transformers() -> None:
    """A penalty of the answer that also counts the prompt, or turns a negative logit the wrong way."""
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    prompt, answer = [3, 4, 4, 5], [5, 6, 6, 6]
    rows = [Sampling(repetition_penalty=1.4), Sampling(presence_penalty=0.5, frequency_penalty=0.25),
            Sampling(logit_bias={7: -100.0, 8: 2.5}), Sampling()]  # fmt: skip
    found = penalized(logits, [(row, prompt, answer) for row in rows])
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + answer]), logits[:1].clone())
    torch.testing.assert_close(found[:1], theirs)
    counted = logits[1].clone()
    counted[5] -= 0.5 + 0.25
    counted[6] -= 0.5 + 3 * 0.25
    torch.testing.assert_close(found[1], counted)
    assert (found[2] - logits[2]).tolist() == pytest.approx([0] * 7 + [-100, 2.5] + [0] * 11, abs=1e-5)
    assert torch.equal(found[3], logits[3])


def decode(ids: Sequence[int]) -> str:
    """A byte an id, as byte-level tokenizers have them: half a character is a replacement character."""
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two", [". "], "one"),
        ("aab", ["aab"], ""),
        ("xaaab", ["aab"], "xa"),
        ("one END", ["ENDE", "END"], "one "),
        ("no end", ["END"], "no end"),
        ("EN", ["END"], "EN"),
        ("grün ü.", ["ü."], "grün "),
    ],
)
def test_a_stop_string_is_cut_out_and_never_shown(text: str, stops: list[str], expected: str) -> None:
    """The beginning of a stop string on the reader's screen, or the character before it lost with it."""
    watched, ids, shown = StopStrings(stops, decode), [], ""
    for byte in text.encode():
        ids.append(byte)
        found = watched.feed(ids)
        assert expected.startswith(shown := decode(ids[: watched.certain]))
        if found:
            break
    assert (watched.text, watched.found) == (expected, expected != text)
    assert shown == expected or not watched.found


def test_a_stop_string_inside_an_id_cuts_the_text_there() -> None:
    """Ids are kept or dropped whole, the text is cut to the character."""
    words = ["Hello", " wor", "ld, and", " so"]
    watched = StopStrings(["d, a"], lambda ids: "".join(words[i] for i in ids))
    assert [watched.feed(list(range(n + 1))) for n in range(3)] == [False, False, True]
    assert (watched.text, watched.certain) == ("Hello worl", 2)


def llama2(assets: Path, folder: Path) -> Tokenizer:
    save_spm((assets / "tokenizers/llama2/tokenizer.model").read_bytes(), folder)
    return Tokenizer(folder)


@pytest.mark.parametrize("text", ["Hi 🦙🦙🦙. STOP now", "🦙 STOP", "STOP", "é🦙STOP", " a  b STOP", "🦙🦙. STO 🦙P"])
def test_no_id_before_a_stop_string_is_lost(text: str, assets: Path, tmp_path: Path) -> None:
    """Llama 2 writes 🦙 in four ids, whose decoded text is three marks, then one character: ids lost before the end."""
    tokenizer = llama2(assets, tmp_path)
    ids, stop = tokenizer.encode(text), " STOP" if " STOP" in text else "STOP"
    watched, told = StopStrings([stop], tokenizer.decode), 0
    for n in range(1, len(ids) + 1):
        found = watched.feed(ids[:n])
        assert told <= watched.certain, "what was told is taken back"
        told = watched.certain
        assert found or watched.text == tokenizer.decode(ids[:n])
        if found:
            break
    assert watched.text == (text.partition(stop)[0].rstrip() if stop[0] == " " else text.partition(stop)[0])
    assert watched.found == (stop in text)
    kept = ids if not watched.found else ids[: watched.certain]
    assert tokenizer.decode(kept) == watched.text


def test_only_the_end_of_an_answer_is_decoded() -> None:
    """Every id decoded again at every id: an answer of 8,000 takes minutes."""
    sizes: list[int] = []

    def watch(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    ids = list(("grün 🦙 " * 40 + "END").encode())
    watched = StopStrings(["END"], watch)
    assert [watched.feed(ids[:n]) for n in range(1, len(ids) + 1)].index(True) == len(ids) - 1
    assert watched.text == "grün 🦙 " * 40
    assert max(sizes) <= 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_told(bad: float, temperature: float) -> None:
    """An id beyond the vocabulary, drawn from NaN, which fails a step later or in the embedding of a GPU."""
    logits = LOGITS.repeat(3, 1)
    logits[1] = bad
    filters = Filters.of([Sampling(temperature=temperature)] * 3, LOGITS.device)
    with pytest.raises(NumericError, match="text 1 of 3"):
        sample(logits, filters, [0.5] * 3)
    logits[1, 1:] = LOGITS[1:]
    if bad == float("-inf"):  # forbids one id, which is allowed
        assert sample(logits, filters, [0.5] * 3)[1] > 0
