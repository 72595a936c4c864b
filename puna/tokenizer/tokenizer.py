"""Text to ids and back. One runtime for every family: the canonical `tokenizer.json`, run by `tokenizers`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from puna.errors import DataError, UsageError
from puna.tokenizer.checks import engine_errors, parse
from puna.tokenizer.decoding import Spelling, Stream

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")
"""What makes a tokenizer inside a model directory; the last two where the family has them."""
_AS_WRITTEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_STOPS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")


class Tokenizer:
    """A loaded tokenizer. Control tokens are ids, not text: `encode` never makes one out of a string."""

    def __init__(self, source: Path | Mapping[str, bytes]):
        """From a folder, or from the files' contents by name (a GGUF carries its tokenizer inside)."""
        self.where = source if isinstance(source, Path) else "tokenizer"
        self.files = _read_files(source) if isinstance(source, Path) else dict(source)
        raw = self.files["tokenizer.json"]
        decoder = parse(raw, self.where).get("decoder")
        with engine_errors("tokenizer.json or its config cannot be read", self.where):
            self._engine = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
            self._engine.no_truncation()  # some files carry what their last user had set
            self._engine.no_padding()
            self._config = dict(json.loads(self.files["tokenizer_config.json"]))
        self._spelling = Spelling(self._engine, decoder, self.where)
        self.fingerprint = "sha256:" + hashlib.sha256(raw).hexdigest()

    @property
    def parsed(self) -> dict[str, Any]:
        """tokenizer.json as JSON, for those who convert it; read anew at every call, for it is large."""
        return parse(self.files["tokenizer.json"], self.where)

    @property
    def pre_tokenizer(self) -> Any:
        """The engine's step that splits text, in its own canonical form."""
        return self._engine.pre_tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Rows the embedding needs: the largest id + 1."""
        return max(self._engine.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens by name."""
        return {t.content: i for i, t in sorted(self._engine.get_added_tokens_decoder().items()) if t.special}

    @cached_property
    def bos_id(self) -> int:
        return self._named("bos_token")

    @cached_property
    def eos_id(self) -> int:
        return self._named("eos_token")

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids after which generation ends: end of text, of turn and of message, where the family has them."""
        return list(dict.fromkeys([self.eos_id, *(self.special_tokens[s] for s in _STOPS if s in self.special_tokens)]))

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a prompt starts with BOS, as the tokenizer's own post-processor says."""
        return self._engine.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text` alone, no BOS or EOS. `special` lets control strings in the text become control ids."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` for many texts on all cores."""
        with engine_errors("this text cannot be encoded", self.where):
            # Not kept in tokenizer.json, so it is set at every call.
            self._engine.encode_special_tokens = not special
            return [e.ids for e in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; control ids are left out unless `special`. Broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, special=special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int], *, special: bool = False) -> bytes:
        """What `ids` stand for before it is read as UTF-8: nothing is lost."""
        content = self._spelling.join(ids, special)
        return content.removeprefix(b" ") if self._spelling.drops_space else content

    def stream(self, *, special: bool = False) -> Stream:
        """Decode id by id: what `feed(id)` and at last `end()` return is in all `decode` of the ids, and no piece of
        it ends inside a character."""
        return Stream(self._spelling, special)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to `before`: a leading space, or half a character, depends on what stands there."""
        start = self.decode(before).rstrip("\ufffd")
        return self.decode([*before, *ids]).removeprefix(start)

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of one id."""
        return self._engine.id_to_token(id) or ""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, byte for byte."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def with_tokens(self, tokens: Sequence[str], *, special: bool = True) -> "Tokenizer":
        """A tokenizer with more tokens, their ids at the end and no other id moved.

        Args:
            special: control tokens, which text never becomes; otherwise words that are always one id.

        Raises:
            UsageError: a token that exists, or twice the same.
        """
        if known := [t for t in tokens if not t or self._engine.token_to_id(t) is not None or tokens.count(t) > 1]:
            raise UsageError(f"cannot be added: {known}", cause="it exists already", fix="other names")
        grown = self.parsed
        grown["added_tokens"] += [
            {"id": self.vocab_size + i, "content": token, "special": special, **_AS_WRITTEN}
            for i, token in enumerate(tokens)
        ]
        raw = json.dumps(grown, indent=2, ensure_ascii=False).encode()
        larger = Tokenizer({**self.files, "tokenizer.json": raw})
        if [larger._engine.token_to_id(t) for t in tokens] != list(range(self.vocab_size, larger.vocab_size)):
            raise DataError("has gaps between its ids, so new ones have no place", where=self.where)
        return larger

    def named_token(self, key: str) -> str | None:
        """The spelling of bos_token, eos_token, pad_token or unk_token, if there is one."""
        token = self._config.get(key)
        return token["content"] if isinstance(token, dict) else token

    def _named(self, key: str) -> int:
        text = self.named_token(key)
        found = self._engine.token_to_id(text) if text else None
        if found is None:
            raise DataError(f"{key} is {text!r}, which has no id", where=self.where)
        return found


def tokenizer_config(**named: str) -> bytes:
    """tokenizer_config.json as transformers reads it: bos_token, eos_token and so on."""
    extra = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **extra}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _read_files(folder: Path) -> dict[str, bytes]:
    missing = [name for name in FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"no {missing[0]}", where=folder, cause="not a tokenizer or model folder",
            fix="puna run tokenizer sources.path=TEXTS output=FOLDER",
        )  # fmt: skip
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
