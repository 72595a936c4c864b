"""Conversations that are not files: problems made by reasoning-gym, small talk out of a package."""

from collections import Counter
from pathlib import Path

import pytest

from puna.data import conversations, dialogues
from puna.data.conversations import ChatSource, read_conversations
from puna.data.problems import problems
from puna.errors import DataError, UsageError
from puna.packages import Package

SETTINGS = {"max_terms": 2, "max_digits": 1}


def test_training_never_meets_a_question_of_the_evaluation() -> None:
    """One-digit sums repeat within a few hundred draws: other seeds alone leave most questions answered before."""
    pytest.importorskip("reasoning_gym")
    asked = [q for q, _ in problems("chain_sum", 12, settings=SETTINGS, unseen=True)]
    assert len(set(asked)) == 12
    taught = Counter(q for q, _ in problems("chain_sum", 2000, settings=SETTINGS))
    assert len(taught) < 2000
    assert not set(asked) & set(taught)
    assert problems("chain_sum", 5, 3) == problems("chain_sum", 5, 3) != problems("chain_sum", 5, 4)


def test_settings_are_checked() -> None:
    """A misspelt setting that is ignored trains on another task than the one that is reported."""
    pytest.importorskip("reasoning_gym")
    for task, settings, why in [
        ("chain_sun", {}, "`chain_sum`"),
        ("chain_sum", {"max_term": 2}, "`max_terms`"),
        ("chain_sum", {"seed": 2}, "no setting `seed`"),
        ("chain_sum", {"max_terms": 1}, "refuses"),
    ]:
        with pytest.raises(UsageError, match=why):
            problems(task, 3, settings=settings)
    with pytest.raises(UsageError, match="has only"):
        problems("chain_sum", 200, settings=SETTINGS, unseen=True)
    assert ChatSource(reasoning_gym=["chain_sum"]).reasoning_gym == {"chain_sum": {}}  # type: ignore[arg-type]


def source(packages: list[str], **more: int) -> ChatSource:
    """Past the names that the config knows."""
    return ChatSource.model_construct(packages=packages, **more)


def test_dialogues_end_with_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question without an answer trains nothing, and numbers in YAML are words that were said."""
    folder = tmp_path / "talk" / "data" / "english"
    folder.mkdir(parents=True)
    text = "conversations:\n- - Hi\n  - Hello\n  - And you?\n- - Alone\n- - When?\n  - 1963\n"
    (folder / "a.yml").write_text(text, encoding="utf-8")
    (folder / "coding.yml").write_text("conversations:\n- - a\n  - b\n", encoding="utf-8")
    monkeypatch.setitem(dialogues.DIALOGUES, "talk", Package("talk", "talk", "test"))
    monkeypatch.setattr(Package, "require", lambda self: tmp_path / self.module)
    found = list(read_conversations(source(["talk"])))
    assert [c.where for c in found] == ["a.yml:1", "a.yml:3"]
    assert found[0].messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert found[1].messages[1]["content"] == "1963"
    assert len(list(read_conversations(source(["talk"], limit=1)))) == 1
    (folder / "a.yml").write_text("nothing: 1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.yml"):
        list(read_conversations(source(["talk"])))
    with pytest.raises(UsageError, match="chatterbot"):
        list(read_conversations(source(["chaterbot"])))
    assert conversations.given(ChatSource()) is False
