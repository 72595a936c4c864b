"""Conversations to ids and a mask of what is trained. One encoder for every template.

Message text stays text: control strings in it are swapped for private-use characters before the template runs and put
back after the rendered text was cut at its own control tokens, so nothing typed can become a control id. Templates
run in jinja's immutable sandbox, with the settings and globals that transformers gives them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib import resources
from typing import Any, Literal, NamedTuple

from puna.config import nearest
from puna.errors import DataError, UsageError
from puna.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}; `"train": False` takes an assistant's message out of training."""
Train = Literal["all", "last"]
_PRIVATE = 0xF0000  # the first supplementary private-use plane: no text has these, no tokenizer a token for them
_MAX_GROWTH, _MAX_EXTRA = 4, 65536


class Encoded(NamedTuple):
    """Ids, and for each whether the model is trained to predict it."""

    ids: list[int]
    trained: list[bool]


class ChatFormat:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        """`template`: jinja text, or llama3 or chatml; by default the one that came with the tokenizer.

        Raises:
            DataError: there is none, or it is not a template.
        """
        self.tokenizer = tokenizer
        if template is None:
            raw = tokenizer.files.get("chat_template.jinja")
            if raw is None:
                raise DataError(
                    "no chat template", where=tokenizer.where, cause="it was never taught to take turns",
                    fix="tune it with template=llama3 or template=chatml (puna run sft), or puna generate",
                )  # fmt: skip
            template = raw.decode("utf-8")
        self.source = template if "{" in template else bundled(template)

    def encode(self, messages: Sequence[Message], train: Train = "all") -> Encoded:
        """The whole conversation; trained are the assistant's words and the token that ends its turn.

        Every trained stretch is encoded apart from what precedes it, as generation meets it. `train`: every
        assistant message, or the last alone; a message with `"train": False` is never trained.

        Raises:
            DataError: a bad message, or a template that rewrites earlier turns when later ones come.
        """
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        wanted = set(turns if train == "all" else turns[-1:])
        encoded = Encoded([], [])
        for text, answer in self._stretches(messages, add_generation_prompt=False):
            ids = self._ids(text)
            encoded.ids.extend(ids)
            encoded.trained.extend([answer in wanted and bool(messages[answer].get("train", True))] * len(ids))
        return encoded

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids to generate the assistant's next message from; history is cut where training cut it."""
        return [i for text, _ in self._stretches(messages, add_generation_prompt=True) for i in self._ids(text)]

    def around_user(self) -> tuple[list[int], list[int]]:
        """The ids before and after the words of a first user message, up to where the assistant begins."""
        mark = "\ue000"  # a private-use character that no template writes
        before, _, after = self.render([{"role": "user", "content": mark}], True).partition(mark)
        return self._ids(before), self._ids(after)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The template's text, control strings of messages as private-use characters (see `reveal`).

        Raises:
            DataError: the template fails, refuses the messages, or grows beyond all measure.
        """
        hidden = [_map_text(dict(m), self._hide) for m in messages]
        tokens = ("bos_token", "eos_token", "pad_token", "unk_token")
        named = {name: self.tokenizer.named_token(name) or "" for name in tokens}
        try:
            text = self._template.render(messages=hidden, add_generation_prompt=add_generation_prompt, **named)
        except Exception as error:
            raise DataError(f"the chat template failed: {error}", where=self.tokenizer.where) from None
        if len(text) > _MAX_GROWTH * sum(len(str(m)) for m in hidden) + _MAX_EXTRA:
            raise DataError("the chat template writes far more than it was given", where=self.tokenizer.where)
        return text

    def reveal(self, text: str) -> str:
        """Rendered text with the message's own control strings back in their places."""
        return text.translate({ord(mark): string for string, mark in self._marks.items()})

    def _stretches(self, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[tuple[str, int]]:
        """The rendered conversation in pieces: (text, the assistant message it is, or -1)."""
        self._check(messages)
        done = ""
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            prompt, full = self.render(messages[:i], True), self.render(messages[: i + 1])
            if not (prompt.startswith(done) and full.startswith(prompt)):
                why = "the template rewrites earlier turns, so what is trained would not be what is served"
                raise DataError(why, where=self.tokenizer.where)
            answer, after = self._cut_after_turn(full[len(prompt) :])
            yield from ((prompt[len(done) :], -1), (answer, i), (after, -1))
            done = full
        rest = self.render(messages, add_generation_prompt)
        if not rest.startswith(done):
            raise DataError("the template rewrites earlier turns", where=self.tokenizer.where)
        yield rest[len(done) :], -1

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._control.split(text):
            if part in self.tokenizer.special_tokens:
                ids.append(self.tokenizer.special_tokens[part])
            elif part:
                ids += self.tokenizer.encode(self.reveal(part))
        return ids

    def _cut_after_turn(self, text: str) -> tuple[str, str]:
        """An assistant's rendered message up to and with its first control token, and what follows it."""
        end = self._control.search(text)
        if end is None:
            why = "the template does not end the assistant's turn, so a model would never learn to stop"
            raise DataError(why, where=self.tokenizer.where)
        if self.tokenizer.special_tokens[end.group()] not in self.tokenizer.stop_ids:
            why = f"the template ends the assistant's turn with {end.group()}, at which generation does not stop"
            raise DataError(why, where=self.tokenizer.where, fix="eos_token in tokenizer_config.json")
        return text[: end.end()], text[end.end() :]

    def _check(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise DataError(f"message {number} has no text in `role` and `content`")
            if not re.fullmatch(r"[A-Za-z0-9_ -]{1,64}", message["role"]):
                raise DataError(f"message {number} has the role {message['role'][:80]!r}")
            if any(_PRIVATE <= ord(c) <= 0xFFFFD for c in message["content"]):
                raise DataError(f"message {number} holds private-use characters of plane 15")

    def _hide(self, text: str) -> str:
        return self._control.sub(lambda found: self._marks[found.group()], text)

    @cached_property
    def _marks(self) -> dict[str, str]:
        return {token: chr(_PRIVATE + i) for i, token in enumerate(self.tokenizer.special_tokens)}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.exceptions import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid: {error}", where=self.tokenizer.where) from None


BUNDLED = ("llama3", "chatml")


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a chat template came with the tokenizer."""
    return "chat_template.jinja" in tokenizer.files


def bundled(name: str) -> str:
    """A template that ships with puna."""
    if name not in BUNDLED:
        raise UsageError(f"no template `{name}`" + nearest(name, BUNDLED), fix=", ".join(BUNDLED))
    return (resources.files("puna") / "tokenizer" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _map_text(value: Any, change: Any) -> Any:
    """Every string inside a message, tool calls and all, through `change`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(inner, change) for inner in value]
    return value
