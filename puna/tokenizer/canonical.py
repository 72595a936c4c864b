"""What the formats that become tokenizer.json, and come out of it, read and write in it alike."""

from collections.abc import Mapping
from typing import Any

from tokenizers import processors


def merges_in(parsed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, in order: older files have each as one string."""
    return [(a, b) for a, b in (m.split(" ", 1) if isinstance(m, str) else m for m in parsed["model"]["merges"])]


def texts_in(parsed: Mapping[str, Any]) -> list[str] | None:
    """The tokens by id, added ones among them; None if an id has no token."""
    ids: dict[str, int] = {token["content"]: token["id"] for token in parsed["added_tokens"]} | parsed["model"]["vocab"]
    texts = sorted(ids, key=ids.__getitem__)
    return texts if [ids[text] for text in texts] == list(range(len(texts))) else None


def bos_first(bos: str, id: int) -> processors.TemplateProcessing:
    """The post-processor that puts BOS before a text; as pieces, for a name may hold spaces."""
    pair = [bos, "$A", f"{bos}:1", "$B:1"]
    return processors.TemplateProcessing(single=pair[:2], pair=pair, special_tokens=[(bos, id)])


def state(step: Any) -> bytes:
    """A step of the engine in its own canonical form, to be compared."""
    return step.__getstate__() if step is not None else b""
