"""Shards and the loader: nothing lost, order a pure function, the position two integers."""

import json
from pathlib import Path

import numpy as np
import pytest

from puna.data.loader import TokenLoader, permute
from puna.data.shards import Shards, ShardWriter, write_index
from puna.errors import DataError
from puna.recipes import run
from puna.tokenizer.tokenizer import Tokenizer


def write(folder: Path, documents: list[list[int]], vocab_size: int = 1000, shard_tokens: int = 1 << 28) -> Shards:
    folder.mkdir()
    writer = ShardWriter(folder, "train", vocab_size, shard_tokens)
    for number, ids in enumerate(documents):
        writer.add(ids, f"document {number}", 2 * len(ids))
    write_index(folder, [writer], "sha256:none")
    return Shards(folder, "train")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_shards_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    """The largest id fits, documents keep their borders and names, reads cross shard files."""
    documents = [[vocab_size - 1, 1, 2], [3], [4, 5, 6, 7], [8, 9]]
    shards = write(tmp_path / "s", documents, vocab_size, shard_tokens=4)
    assert json.loads((tmp_path / "s/index.json").read_text())["dtype"] == dtype
    assert len(list((tmp_path / "s").glob("*.bin"))) == 3
    assert shards.read(0, 10).tolist() == [i for d in documents for i in d]
    assert shards.read(2, 5).tolist() == [2, 3, 4, 5, 6]
    assert [shards.document(i)[1].tolist() for i in range(4)] == documents
    assert shards.document(3)[0] == {"name": "document 3", "bytes": 4}
    assert (shards.tokens, shards.documents, shards.bytes) == (10, 4, 20)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """uint16 would wrap it into another word."""
    with pytest.raises(DataError, match="outside"):
        write(tmp_path / "s", [[1, 70000]], 60000)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    """A shard cut short by a copy must not train as if it were the whole."""
    write(tmp_path / "s", [list(range(100))])
    path = tmp_path / "s/train-00000.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"train-00000\.bin.*98 ids"):
        Shards(tmp_path / "s", "train")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000])
def test_permute_is_a_permutation(count: int) -> None:
    """An index drawn twice is text seen twice and other text never."""
    assert sorted(permute(i, count, 7) for i in range(count)) == list(range(count))


def test_permute_mixes() -> None:
    """Neighbours go apart and another key gives another order."""
    order = np.array([permute(i, 4096, 3) for i in range(4096)])
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 0.05
    assert (order != [permute(i, 4096, 4) for i in range(4096)]).mean() > 0.99


def test_an_epoch_sees_every_window_once(tmp_path: Path) -> None:
    """Windows tile the text; labels are the next token; epochs differ."""
    shards = write(tmp_path / "s", [list(range(1000))])
    loader = TokenLoader(shards, seq_len=10, batch_size=1, seed=0)
    epochs: list[list[int]] = [[], []]
    while loader.epoch < 2:
        epoch = loader.epoch
        batch = next(loader)
        assert (batch.labels == batch.tokens + 1).all()
        assert batch.n == 10
        epochs[epoch].append(int(batch.tokens[0, 0]))
    for starts in epochs:
        assert np.array_equal(np.diff(sorted(starts)), np.full(len(starts) - 1, 10))
        assert len(starts) >= 98
    assert epochs[0] != epochs[1]


def test_position_is_restored_exactly(tmp_path: Path) -> None:
    """A resumed run that repeats or skips data is not a resume; also across an epoch's end."""
    shards = write(tmp_path / "s", [list(range(500))])

    def loader() -> TokenLoader:
        return TokenLoader(shards, seq_len=16, batch_size=4, seed=5)

    straight = loader()
    expected = [next(straight).tokens for _ in range(30)]
    for stop in (1, 7, 8, 29):
        first = loader()
        for _ in range(stop):
            next(first)
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all((next(second).tokens == tokens).all() for tokens in expected[stop:])


def test_changed_data_is_refused(tmp_path: Path) -> None:
    """Going on with other data at the old position is silent nonsense."""
    one, two = write(tmp_path / "a", [list(range(500))]), write(tmp_path / "b", [list(range(499, -1, -1))])
    with pytest.raises(DataError, match="changed"):
        TokenLoader(two, 16, 1, 0).load_state_dict(TokenLoader(one, 16, 1, 0).state_dict())


def test_too_little_text_for_a_window(tmp_path: Path) -> None:
    """An endless loop or an empty epoch instead of an error."""
    with pytest.raises(DataError, match="too few"):
        TokenLoader(write(tmp_path / "s", [[1, 2, 3]]), 16, 1, 0)


def test_recipe_keeps_every_byte(shards: Path, texts: Path) -> None:
    """Shards decode to exactly the texts, BOS and EOS around each, and the splits do not overlap."""
    tokenizer = Tokenizer(shards / "tokenizer")
    found = {}
    for split in ("train", "valid"):
        part = Shards(shards, split)
        for i in range(part.documents):
            row, ids = part.document(i)
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert row["name"] not in found
            found[row["name"]] = tokenizer.decode(ids)
            assert row["bytes"] == len(found[row["name"]].encode())
        assert part.documents > 0
    assert found == {p.name: p.read_text(encoding="utf-8") for p in texts.iterdir()}


def test_an_existing_output_is_refused(shards: Path, texts: Path, tokenizer_folder: Path) -> None:
    """A second run must not mix its shards into the first one's."""
    before = sorted(shards.iterdir())
    with pytest.raises(Exception, match="exists already"):
        run("data", output=shards, tokenizer=tokenizer_folder, **{"sources.path": texts})
    assert sorted(shards.iterdir()) == before


def test_interrupted_encoding_leaves_nothing(texts: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """A folder that looks finished and is not."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("good")
    (tmp_path / "texts/b.txt").write_bytes(b"\xff\xfe bad")
    with pytest.raises(DataError, match=r"b\.txt:1"):
        run("data", output=tmp_path / "out", tokenizer=tokenizer_folder, **{"sources.path": tmp_path / "texts"})
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]


def two_sources(folder: Path, kjv: int = 60, plays: int = 30) -> Shards:
    """Documents of 20 ids below 500 from one source, then documents of ids above from another."""
    folder.mkdir()
    writer = ShardWriter(folder, "train", 1000)
    for number in range(kjv + plays):
        bible = number < kjv
        writer.add([number if bible else 500 + number] * 20, f"{'kjv' if bible else 'plays'}/{number}", 40)
    write_index(folder, [writer], "sha256:none")
    return Shards(folder, "train")


def test_mixture(tmp_path: Path) -> None:
    """A source's passes are those asked for, windows stay inside their source, and a position is still two integers."""
    shards = two_sources(tmp_path / "s")
    assert shards.sources == [("kjv", 1200), ("plays", 600)]
    mixture = {"kjv": 0.25, "plays": 2.0}
    loader = TokenLoader(shards, 10, 1, seed=3, mixture=mixture)
    rows = [next(loader).tokens[0].tolist() for _ in range(148)]
    assert loader.state_dict()["epoch"] == 1
    plays = [row for row in rows if row[0] >= 500]
    assert len(plays) == 2 * 59  # of 59 windows in 600 ids cut at an offset
    assert len(rows) - len(plays) == 30  # a quarter of 119
    assert all((min(row) >= 500) == (max(row) >= 500) for row in rows)
    assert all(plays.count(row) % 2 == 0 for row in plays)  # two whole passes, not draws with replacement
    assert loader.epochs() == {"kjv": 30 / 119, "plays": 2.0}
    next(loader)
    assert loader.epochs() == pytest.approx({"kjv": (1 + 1 / 148) * 30 / 119, "plays": 2 + 2 / 148}, abs=1e-3)
    again = TokenLoader(shards, 10, 1, seed=3, mixture=mixture)
    again.load_state_dict({**loader.state_dict(), "epoch": 0, "index": 40})
    assert [next(again).tokens[0].tolist() for _ in range(108)] == rows[40:]
    with pytest.raises(DataError, match="did you mean `plays`"):
        TokenLoader(shards, 10, 1, seed=3, mixture={"play": 1.0})


def test_an_unmixed_loader_reads_across_sources(tmp_path: Path) -> None:
    """Without weights every id is seen once an epoch, whatever source it came from."""
    loader = TokenLoader(two_sources(tmp_path / "s"), 10, 1, seed=3)
    starts = sorted(next(loader).tokens[0, 0].item() for _ in range(179))
    assert len(starts) == 179
    assert loader.state_dict()["epoch"] == 1
    assert loader.epochs() == {"kjv": 1.0, "plays": 1.0}


def test_every_epoch_of_a_mixture_has_windows(tmp_path: Path) -> None:
    """A share below one window drew none, and a later epoch's offset could leave nothing at all: next() never ended."""
    shards = two_sources(tmp_path / "s", kjv=2, plays=1)  # 3 windows of 10 ids, and 1
    loader = TokenLoader(shards, 10, 1, seed=3, mixture={"kjv": 0.01, "plays": 0.01})
    seen = [int(next(loader).tokens[0, 0]) >= 500 for _ in range(100)]
    assert loader.state_dict() == {"epoch": 50, "index": 0, "data": shards.fingerprint}
    assert sum(seen) == 50
    assert loader.epochs() == pytest.approx({"kjv": 50 / 3, "plays": 50.0})
    with pytest.raises(DataError, match="`plays` has 20 tokens in a row, too few"):
        TokenLoader(shards, 11, 1, seed=3, mixture={"plays": 1.0})


def test_a_mixture_of_shards_without_sources(tmp_path: Path) -> None:
    """Shards of an older version: "no source `kjv`" in a folder that was made from it."""
    two_sources(tmp_path / "s")
    index = json.loads((tmp_path / "s/index.json").read_text())
    del index["splits"]["train"]["sources"]
    (tmp_path / "s/index.json").write_text(json.dumps(index))
    shards = Shards(tmp_path / "s", "train")
    with pytest.raises(DataError, match="older puna wrote them"):
        TokenLoader(shards, 10, 1, seed=3, mixture={"kjv": 0.5})
    assert TokenLoader(shards, 10, 1, seed=3).epochs() == {"text": 0.0}


def test_a_wrong_mixture_is_told_before_a_run_is_made(shards: Path, tmp_path: Path) -> None:
    """It was told after the model was built, in a run folder that then held the wrong config."""
    with pytest.raises(DataError, match="no source `kjv`"):
        run("pretrain", output=tmp_path / "run", data=shards, mixture={"kjv": 0.5})
    assert not (tmp_path / "run").exists()
