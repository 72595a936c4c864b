"""Text to ids and back. One runtime for every family: the canonical `tokenizer.json`, run by `tokenizers`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from puna.errors import DataError, UsageError
from puna.tokenizer.checks import MAX_BYTES, engine_errors, parse
from puna.tokenizer.decoding import Spelling, Stream

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")
"""What makes a tokenizer inside a model directory; the last two where the family has them."""
_AS_WRITTEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_PAIRS = (("<|begin_of_text|>", "<|end_of_text|>"), ("<s>", "</s>"))
"""BOS and EOS of Llama 3, and of Llama 1 and 2, for a tokenizer.json without its config."""
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "eot_token", "eom_token")
_STOPS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")


class Tokenizer:
    """A loaded tokenizer. Control tokens are ids, not text: `encode` never makes one out of a string."""

    def __init__(self, source: Path | Mapping[str, bytes]):
        """From a folder, or from the files' contents by name (a GGUF carries its tokenizer inside)."""
        self.where = source if isinstance(source, Path) else "tokenizer"
        self.files = _read_files(source) if isinstance(source, Path) else dict(source)
        raw = self.files["tokenizer.json"]
        parsed = parse(raw, self.where)
        with engine_errors("tokenizer.json cannot be read", self.where):
            self._engine = tokenizers.Tokenizer.from_buffer(raw)
            self._engine.no_truncation()  # some files carry what their last user had set
            self._engine.no_padding()
        if moved := [t["content"] for t in parsed["added_tokens"] if self._engine.token_to_id(t["content"]) != t["id"]]:
            # The engine numbers added tokens itself, whatever the file says.
            raise DataError(f"tokenizer.json has gaps before the ids of {moved[:3]}", where=self.where)
        if "tokenizer_config.json" not in self.files:
            self.files["tokenizer_config.json"] = self._guessed_config()
        with engine_errors("tokenizer_config.json cannot be read", self.where):
            self._config = dict(json.loads(self.files["tokenizer_config.json"]))
            if odd := [key for key in _NAMED if not isinstance(self.named_token(key), str | None)]:
                raise ValueError(f"{odd[0]} is {self._config[odd[0]]!r}")
            if template := _template(self._config.get("chat_template")):
                self.files.setdefault("chat_template.jinja", template.encode())
        self._spelling = Spelling(self._engine, parsed.get("decoder"), self.where)
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

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether every id means the same in both."""
        return self._engine.get_vocab(with_added_tokens=True) == other._engine.get_vocab(with_added_tokens=True)

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
        named = [self.named_token(key) for key in ("eot_token", "eom_token")]  # as some GGUF files have them
        stops = [self.special_tokens[s] for s in (*named, *_STOPS) if s in self.special_tokens]
        eos = self.named_id("eos_token")
        return list(dict.fromkeys([*([] if eos is None else [eos]), *stops]))

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a prompt starts with BOS, as the tokenizer's own post-processor says."""
        with engine_errors("the post-processor of tokenizer.json fails", self.where):
            return self._engine.encode("", add_special_tokens=True).ids[:1] == [self.named_id("bos_token")]

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
        return self.decode_bytes(ids, special=special).decode("utf-8", self._spelling.errors)

    def decode_bytes(self, ids: Sequence[int], *, special: bool = False) -> bytes:
        """What `ids` stand for before it is read as UTF-8: nothing is lost."""
        stream = self.stream(special=special)
        return b"".join(stream.feed_bytes(i) for i in ids)

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

    def piece(self, id: int) -> str:
        """What one id says inside a text: with its space, U+FFFD for a part of a character."""
        return self._spelling.of(id, True).decode("utf-8", self._spelling.errors)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, byte for byte."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def with_tokens(self, tokens: Sequence[str], *, special: bool = True) -> "Tokenizer":
        """A tokenizer with more tokens, their ids at the end and no other id moved.

        Args:
            special: control tokens, which text never becomes; otherwise words that are always one id.

        Raises:
            UsageError: a token that exists, or twice the same. DataError: gaps between the ids, or a control token
                that is an ordinary word.
        """
        if known := [t for t in tokens if not t or self._engine.token_to_id(t) is not None or tokens.count(t) > 1]:
            raise UsageError(f"cannot be added: {known}", cause="it exists already", fix="other names")
        grown = self.parsed
        grown["added_tokens"] += [
            {"id": self.vocab_size + i, "content": token, "special": special, **_AS_WRITTEN}
            for i, token in enumerate(tokens)
        ]
        raw = json.dumps(grown, indent=2, ensure_ascii=False).encode()
        return Tokenizer({**self.files, "tokenizer.json": raw})

    def with_template(self, source: str) -> "Tokenizer":
        """A tokenizer with this chat template alone: an older place for it would hold another."""
        files = {**self.files, "chat_template.jinja": source.encode()}
        if "chat_template" in self._config:
            config = {key: value for key, value in self._config.items() if key != "chat_template"}
            files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return Tokenizer(files)

    def named_token(self, key: str) -> str | None:
        """The spelling of bos_token, eos_token, pad_token, unk_token, eot_token or eom_token, if there is one."""
        token = self._config.get(key)
        return token["content"] if isinstance(token, dict) else token

    def named_id(self, key: str) -> int | None:
        """The id of `named_token`, if there is one; not every tokenizer has a BOS."""
        text = self.named_token(key)
        return self._engine.token_to_id(text) if text else None

    def _guessed_config(self) -> bytes:
        pair = next((p for p in _PAIRS if set(p) <= set(self.special_tokens)), ())
        return tokenizer_config(**dict(zip(("bos_token", "eos_token"), pair, strict=False)))

    def _named(self, key: str) -> int:
        found = self.named_id(key)
        if found is None:
            raise DataError(f"{key} is {self.named_token(key)!r}, which has no id", where=self.where)
        return found


def tokenizer_config(**named: str) -> bytes:
    """tokenizer_config.json as transformers reads it: bos_token, eos_token and so on."""
    extra = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **extra}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _template(given: Any) -> str | None:
    """The template inside a tokenizer_config.json, as written before chat_template.jinja; one, or several by name."""
    if isinstance(given, list):
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}.get("default")
    return given if isinstance(given, str) and given else None


def _read_files(folder: Path) -> dict[str, bytes]:
    if not (folder / FILES[0]).is_file():
        raise DataError(
            f"no {FILES[0]}", where=folder, cause="a model whose tokenizer was left behind, or no model",
            fix="put its tokenizer.json or tokenizer.model there; puna run tokenizer makes a new one",
        )  # fmt: skip
    return {name: read_file(folder / name) for name in FILES if (folder / name).is_file()}


def read_file(path: Path) -> bytes:
    """A tokenizer's file, unless it is beyond all measure.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"has {path.stat().st_size / 1e6:,.0f} MB", where=path, cause="not a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
