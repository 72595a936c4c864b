"""What of the evaluation lies in the shards: planted runs are found, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from puna.data.shards import ShardWriter, write_index
from puna.eval import contamination
from puna.eval.contamination import contaminated, subsets

BOS, EOS, V = 0, 1, 50


@pytest.fixture
def documents(tmp_path: Path) -> tuple[Path, list[list[int]]]:
    """Shards of 40 documents of few words, so that chance makes runs too."""
    random = np.random.default_rng(0)
    texts = [[BOS, *random.integers(2, V, 200).tolist(), EOS] for _ in range(40)]
    writer = ShardWriter(tmp_path, "train", V, shard_tokens=1500)
    for number, text in enumerate(texts):
        writer.add(text, f"{number}.txt", 1)
    write_index(tmp_path, [writer], "tokenizer")
    return tmp_path, texts


def plainly(example: Sequence[int], texts: Sequence[Sequence[int]], n: int) -> float:
    """The definition, by tuples."""
    known = {tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)}
    marks = [False] * len(example)
    for i in range(len(example) - n + 1):
        if tuple(example[i : i + n]) in known:
            marks[i : i + n] = [True] * n
    return sum(marks) / len(example) if example else 0.0


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize("n", [2, 8, 13])
def test_exact(documents: tuple[Path, list[list[int]]], n: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run at the border of two pieces, of two shards, or whose hash is another's, is missed or invented."""
    monkeypatch.setattr(contamination, "_PIECE", piece)
    folder, texts = documents
    random = np.random.default_rng(1)
    examples = [random.integers(2, V, 30).tolist() for _ in range(20)]
    examples += [texts[i][5 * i + 1 : 5 * i + 21] for i in range(20)]  # whole examples that were read
    examples += [[*examples[i], *texts[i][40:53], *examples[i + 1]] for i in range(6)]  # 13 tokens in clean text
    examples += [[*texts[3][-8:-1], *texts[4][1:8]], [], [5, 6]]  # the end of a document and the next one's beginning
    found = contaminated(examples, folder, n)
    assert found == [plainly(example, texts, n) for example in examples]
    if n >= 8:
        assert found[20:40] == [1.0] * 20
        assert found[:20] == [0.0] * 20
        assert found[-3] == 0.0


def test_colliding_hashes_are_compared(
    documents: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash that says "the same" of two runs must not decide."""
    monkeypatch.setattr(contamination, "_hashes", lambda runs: (runs.sum(1) % 3).astype(np.uint64) << np.uint64(62))
    folder, texts = documents
    examples = [texts[2][3:23], list(range(2, 22)), texts[9][50:60]]
    assert contaminated(examples, folder, 8) == [plainly(example, texts, 8) for example in examples]


def test_subsets_overlap() -> None:
    """Llama 2's four: below and from 20 %, below and from 80 %."""
    found = subsets([0.0, 0.2, 0.5, 0.8, 1.0])
    assert found == {"clean": [0], "not clean": [1, 2, 3, 4], "not dirty": [0, 1, 2], "dirty": [3, 4]}
