"""Text that goes on after other text. SentencePiece puts a space before every text; only a beginning should have it."""

import json
from collections.abc import Callable
from typing import Any

import tokenizers

from puna.tokenizer.tokenizer import Tokenizer


class Continuation:
    """How a tokenizer encodes a text by what stands before it: nothing, a control token, or other text."""

    def __init__(self, tokenizer: Tokenizer):
        self.encode_start: Callable[[str], list[int]] = tokenizer.encode
        self.encode_after_text: Callable[[str], list[int]] = tokenizer.encode
        whole = json.loads(tokenizer.files["tokenizer.json"])
        bare = {**whole, **{part: _without_prefix(whole.get(part)) for part in ("normalizer", "pre_tokenizer")}}
        self.has_prefix = bare != whole
        if self.has_prefix:
            engine = tokenizers.Tokenizer.from_str(json.dumps(bare))
            engine.encode_special_tokens = True  # control strings in the text are text
            self.encode_after_text = lambda text: engine.encode(text, add_special_tokens=False).ids
        # Llama 2's tokenizer begins anew after each control token, as Meta encodes each turn; newer ones do not.
        control = next(iter(tokenizer.special_tokens), "")
        anew = tokenizer.encode(control + "a", special=True)[1:] == tokenizer.encode("a")
        self.encode_after_control = self.encode_start if anew else self.encode_after_text


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer of a tokenizer.json, less the step that puts a space before the text."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    steps = {name: part[name] for name in ("normalizers", "pretokenizers") if name in part}
    kept = {name: [bare for s in inner if (bare := _without_prefix(s)) is not None] for name, inner in steps.items()}
    return {**part, **kept}
