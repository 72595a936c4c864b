"""Conversations to ids and a mask of what is trained, and ids back to messages. One encoder for every template.

Message text stays text: control strings in it are swapped for private-use characters before the template runs and put
back after the rendered text was cut at its own control tokens, so nothing typed can become a control id.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from importlib import resources
from typing import Any, Literal, NamedTuple

from puna.config import nearest
from puna.errors import DataError, UsageError
from puna.files import as_path
from puna.log import log
from puna.tokenizer.chat.continuation import Continuation
from puna.tokenizer.chat.faithful import Marked, check_complete, check_names, follows
from puna.tokenizer.chat.messages import PRIVATE, Message, Tool, map_text, plain_messages, plain_tools
from puna.tokenizer.chat.sandbox import ChatTemplate, compiled
from puna.tokenizer.chat.tools import CODE, read_calls
from puna.tokenizer.tokenizer import Tokenizer

Role = Literal["assistant", "user", "system", "tool"]
Train = Literal["all", "last"] | tuple[Role, ...]
"""Every message of the assistant, the last one, or every message of these roles."""
_ROLE = {"ipython": "tool"}
_PYTHON_TAG = "<|python_tag|>"
_MOST_CONTROL_TOKENS = 60_000  # each has a private-use character; the last ones of the plane are marks
_CONTROL = re.compile(r"<\|[a-z_]{1,40}\|>")
_TAG = re.compile(r"<\|[^|\s{}]{1,40}\|>|\[/?[A-Z_]{2,20}\]|<</?[A-Z]{2,20}>>")


class Encoded(NamedTuple):
    """Ids, and for each whether the model is trained to predict it."""

    ids: list[int]
    trained: list[bool]


class ChatFormat:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, **variables: Any):
        """`template`: jinja text, or one of BUNDLED; by default the one that came with the tokenizer.

        Args:
            variables: what the template may ask for besides messages and tools: `builtin_tools`,
                `tools_in_user_message` and `date_string` of Llama 3.1 and later ("26 Jul 2024": whatever template asks
                for today's date gets this one).

        Raises:
            DataError: there is none, it is not a template, or the tokenizer has no control tokens to mark turns with.
        """
        if not 0 < (count := len(tokenizer.special_tokens)) <= _MOST_CONTROL_TOKENS:
            raise DataError(f"the tokenizer has {count:,} control tokens", where=tokenizer.where)
        self.tokenizer, self.variables = tokenizer, {**_fixed_clock(variables.get("date_string")), **variables}
        if template is None:
            raw = tokenizer.files.get("chat_template.jinja")
            if raw is None:
                raise DataError(
                    "no chat template", where=tokenizer.where, cause="it was never taught to take turns",
                    fix=f"puna generate, or puna run sft with {_choice(fitting(tokenizer))}",
                )  # fmt: skip
            template = raw.decode("utf-8", "replace")
        self.source = template if "{" in template else bundled(template)
        self._shapes: dict[str, str] = {}
        self._told: set[str] = set()

    def encode(self, messages: Sequence[Message], train: Train = "all", tools: Sequence[Tool] | None = None) -> Encoded:
        """The whole conversation; trained are the assistant's words and calls and the token that ends its turn.

        Every trained stretch is encoded apart from what precedes it, as generation meets it. `train`: every
        assistant message, the last alone, or those of some roles, others' with what marks their turns; a message with
        `"train": False` is never trained.

        Raises:
            DataError: a bad message, a template that drops one or rewrites earlier turns when later ones come, or one
            that writes a message into another of which only one is to be trained.
        """
        roles = ("assistant",) if isinstance(train, str) else train
        wanted = [i for i, m in enumerate(messages) if _ROLE.get(str(m.get("role")), m.get("role")) in roles]
        wanted = {i for i in (wanted[-1:] if train == "last" else wanted) if messages[i].get("train", True)}
        encoded, others = Encoded([], []), None if isinstance(train, str) else wanted
        for ids, number in self._encoded(self._stretches(messages, tools, False, others)):
            encoded.ids.extend(ids)
            encoded.trained.extend([number in wanted] * len(ids))
        return encoded

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """The ids to generate the assistant's next message from; history is cut where training cut it."""
        return [i for ids, _ in self._encoded(self._stretches(messages, tools, True)) for i in ids]

    def answer(self, reply: Sequence[int], tools: Sequence[Tool] | None = None, tail: str = "") -> dict[str, Any]:
        """`parse`, where only what was offered can be called: JSON that was asked for is no call of a tool."""
        built_in = self.variables.get("builtin_tools")
        offered = {tool["function"]["name"] for tool in plain_tools(tools) or ()}
        offered |= set() if built_in is None else {CODE, *built_in}
        message = self.parse(reply, tail)
        if all(call["function"]["name"] in offered for call in message.get("tool_calls", ())):
            return message
        return _message(self.tokenizer.decode(self._said(reply)) + tail, [])

    def parse(self, reply: Sequence[int] | str, tail: str = "") -> dict[str, Any]:
        """A generated reply as a message: `content`, and `tool_calls` where it calls tools. Never an error.

        Ids count up to the first stop id, and `tail` is text after them. In a text no control token is looked for: it
        has none.
        """
        if isinstance(reply, str):
            return _message(reply + tail, read_calls(reply + tail))
        tag = self.tokenizer.special_tokens.get(_PYTHON_TAG)
        ids = self._said(reply)
        if tag not in ids:
            text = self.tokenizer.decode(ids) + tail
            return _message(text, read_calls(text))
        before, after = (self.tokenizer.decode(part) for part in (ids[: ids.index(tag)], ids[ids.index(tag) + 1 :]))
        return _message(before, read_calls(after + tail, tagged=True), beside=before)

    def around_user(self) -> tuple[list[int], list[int]]:
        """The ids before and after the words of a first user message, up to where the assistant begins."""
        mark = "\ue000"  # a private-use character that no template writes
        before, _, after = self.render([{"role": "user", "content": mark}], True).partition(mark)
        if self._joins.has_prefix:  # the space belongs to the word that follows
            before = before.rstrip(" ")
        start, end = (ids for ids, _ in self._encoded([(before, -1), (after, -1)]))
        return start, end

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] | None = None
    ) -> str:
        """The template's text, control strings of messages as private-use characters (see `reveal`).

        Raises:
            DataError: a bad message; the template fails, refuses the messages, or grows beyond all measure.
        """
        return self._render(plain_messages(messages), plain_tools(tools), add_generation_prompt)

    def reveal(self, text: str) -> str:
        """Rendered text with the message's own control strings back in their places."""
        return text.translate(self._strings)

    def _render(self, messages: Sequence[Message], tools: Any, add_generation_prompt: bool) -> str:
        tokens = ("bos_token", "eos_token", "pad_token", "unk_token")
        named = {name: self.tokenizer.named_token(name) or "" for name in tokens}
        given = map_text({**self.variables, "messages": messages, "tools": tools}, self._hide)
        try:
            return self._template.render(**{**named, **given, "add_generation_prompt": add_generation_prompt})
        except DataError as error:
            raise DataError(error.what, where=self.tokenizer.where) from None

    def _stretches(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        wanted: set[int] | None = None,
    ) -> Iterator[tuple[str, int]]:
        """The rendered conversation in pieces: (text, the assistant message it is, or -1).

        With `wanted` other messages have pieces and numbers too.
        """
        plain, offered, done, told = plain_messages(messages), plain_tools(tools), "", 0

        def between(text: str, end: int) -> Iterator[tuple[str, int]]:
            if wanted is None:
                return iter([(text[len(done) :], -1)])
            return self._by_message(plain, offered, range(told, end), done, text, wanted)

        self._refuse_tags(plain)
        for i in (i for i, m in enumerate(plain) if m["role"] == "assistant"):
            prompt, full = self._render(plain[:i], offered, True), self._render(plain[: i + 1], offered, False)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                why = "the template rewrites earlier turns, so what is trained would not be what is served"
                raise DataError(why, where=self.tokenizer.where)
            answer, after = self._cut_after_turn(full[len(prompt) :])
            yield from (*between(prompt, i), (answer, i), (after, -1))
            done, told = full, i + 1
        rest = self._render(plain, offered, add_generation_prompt)
        if not rest.startswith(done):
            raise DataError("the template rewrites earlier turns", where=self.tokenizer.where)
        self._check_faithful(plain, offered, rest, add_generation_prompt)
        yield from between(rest, len(plain))

    def _by_message(
        self, plain: list[dict[str, Any]], offered: Any, numbers: range, done: str, text: str, wanted: set[int]
    ) -> Iterator[tuple[str, int]]:
        """The part of `text` after `done`, message by message; what no message explains, such as the next turn's
        beginning, is at -1."""
        within = numbers[:0]  # messages that the template writes only when the next one comes
        for number in numbers:
            within = range(within.start if within else number, number + 1)
            try:
                upto = self._render(plain[: number + 1], offered, False)
            except DataError:  # a template may refuse what no one has answered yet
                continue
            if not (upto.startswith(done) and text.startswith(upto)) or len({i in wanted for i in within}) > 1:
                within = range(within.start, numbers.stop)
                break
            if upto != done:
                yield upto[len(done) :], number
                done, within = upto, numbers[:0]
        if wanted.intersection(within):
            roles = " and ".join(sorted({str(plain[i]["role"]) for i in within}))
            why = f"the template does not write {roles} apart, so neither can be trained alone"
            raise DataError(why, where=self.tokenizer.where, fix="train_on=all, or both roles or none of them")
        yield text[len(done) :], -1

    def _encoded(self, stretches: Iterable[tuple[str, int]]) -> Iterator[tuple[list[int], int]]:
        """Each stretch as ids. What a text follows decides on SentencePiece's leading space, not where it was cut."""
        encode = self._joins.encode_start
        for text, answer in stretches:
            ids: list[int] = []
            for part in filter(None, self._control.split(text)):
                if part in self.tokenizer.special_tokens:
                    ids.append(self.tokenizer.special_tokens[part])
                    encode = self._joins.encode_after_control
                else:
                    ids += encode(self.reveal(part))
                    encode = self._joins.encode_after_text
            yield ids, answer

    def _cut_after_turn(self, text: str) -> tuple[str, str]:
        """An assistant's rendered message up to and with the token generation stops at, and what follows it."""
        ends = list(self._control.finditer(text))
        if not ends:
            why = "the template does not end the assistant's turn, so a model would never learn to stop"
            fix = f"{_choice(fitting(self.tokenizer))}; or add_tokens first"
            raise DataError(why, where=self.tokenizer.where, cause=lacking(self.source, self.tokenizer), fix=fix)
        stops = self.tokenizer.stop_ids
        end = next((e for e in ends if self.tokenizer.special_tokens[e.group()] in stops), None)
        if end is None:
            why = f"the template ends the assistant's turn with {ends[-1].group()}, at which generation does not stop"
            raise DataError(why, where=self.tokenizer.where, fix="eos_token in tokenizer_config.json")
        return text[: end.end()], text[end.end() :]

    def _said(self, reply: Sequence[int]) -> Sequence[int]:
        """The ids up to the first stop id."""
        return reply[: next((i for i, token in enumerate(reply) if token in self.tokenizer.stop_ids), len(reply))]

    def _check_faithful(self, messages: list[dict[str, Any]], tools: Any, text: str, add_prompt: bool) -> None:
        """Every text, call and tool stands in the prompt, and no text makes control tokens; see `faithful`."""
        marked = Marked(map_text(messages, self._hide), map_text(tools, self._hide))
        key = marked.key(add_prompt)
        if key not in self._shapes:
            if len(self._shapes) >= 1024:
                self._shapes.clear()
            with_tools = [name for name in fitting(self.tokenizer) if name in _WITH_TOOLS]
            fix = _choice(with_tools) if with_tools else "another model: none of puna's templates with tools fits it"
            check_names(marked, lambda called, offered: self._render(called, offered, add_prompt), fix)
            shape = self._render(marked.messages, marked.tools, add_prompt)
            for told in check_complete(marked, shape):
                self.tell(told)
            self._shapes[key] = shape
        if self._control.findall(text) != self._control.findall(self._shapes[key]):
            why = "the template makes control tokens of what is said: whoever writes a message could write any turn"
            raise DataError(why, where=self.tokenizer.where, fix="another template (template=)")
        if not follows(marked, self._shapes[key], text):
            self.tell("the chat template writes other things for other words: look at it (puna inspect)")

    def tell(self, what: str) -> None:
        """Warn of something once, whatever the number in it."""
        if (about := re.sub(r"\d+ ", "", what, count=1)) not in self._told:
            self._told.add(about)
            log.warning("%s", what)

    def _refuse_tags(self, messages: list[dict[str, Any]]) -> None:
        """Llama 2's [INST] and <<SYS>> are no control tokens: who types one speaks as the system. Meta refuses too."""
        for number, message in enumerate(messages):
            if found := next((tag for tag in self._tags if tag in str(message)), None):
                raise DataError(
                    f"message {number} holds {found}, which this template takes for the end or start of a turn",
                    fix="take it out: to this model it is no text",
                )  # fmt: skip

    def _hide(self, text: str) -> str:
        return self._control.sub(lambda found: self._marks[found.group()], text)

    @cached_property
    def _tags(self) -> list[str]:
        """What marks turns in the template without being a control token."""
        return sorted(set(_TAG.findall(self.source)) - set(self.tokenizer.special_tokens))

    @cached_property
    def _marks(self) -> dict[str, str]:
        return {token: chr(PRIVATE + i) for i, token in enumerate(self.tokenizer.special_tokens)}

    @cached_property
    def _strings(self) -> dict[int, str]:
        return {ord(mark): string for string, mark in self._marks.items()}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @cached_property
    def _joins(self) -> Continuation:
        return Continuation(self.tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        try:
            return compiled(self.source)
        except DataError as error:
            raise DataError(error.what, where=self.tokenizer.where, cause=error.cause) from None


BUNDLED = ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.2-pythonic", "llama3.3", "chatml")
_SAME = {"llama3.3": "llama3.1"}
_WITH_TOOLS = ("llama3.1", "llama3.2", "llama3.2-pythonic", "llama3.3")


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a chat template came with the tokenizer."""
    return "chat_template.jinja" in tokenizer.files


def bundled(name: str) -> str:
    """A template that ships with puna."""
    if name not in BUNDLED:
        raise UsageError(f"no template `{name}`" + nearest(name, BUNDLED), fix=f"{', '.join(BUNDLED)}; or a file")
    file = f"{_SAME.get(name, name)}.jinja"
    return (resources.files("puna") / "tokenizer" / "chat" / "templates" / file).read_text(encoding="utf-8")


def fitting(tokenizer: Tokenizer) -> list[str]:
    """The bundled templates whose control tokens `tokenizer` has. Llama 2's needs none but BOS and EOS."""
    return [name for name in BUNDLED if not _missing(bundled(name), tokenizer)]


def read_template(given: str) -> str:
    """What `--template` names: a bundled template, or a file with one.

    Raises:
        UsageError: neither.
    """
    if given not in BUNDLED and (path := as_path(given)).is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    return bundled(given)


def lacking(source: str, tokenizer: Tokenizer) -> str:
    """Told of a template whose control tokens `tokenizer` does not have: it would read them as text."""
    missing = _missing(source, tokenizer)
    return f"to this tokenizer {' and '.join(missing[:3])} are text, not control tokens" if missing else ""


def _missing(source: str, tokenizer: Tokenizer) -> list[str]:
    """The control tokens that a template writes and `tokenizer` does not have."""
    return sorted(set(_CONTROL.findall(source)) - set(tokenizer.special_tokens))


def _choice(names: Sequence[str]) -> str:
    """`template=llama2, chatml`, as a recipe takes it."""
    return f"template={', '.join(names)} (of chat and doctor: --template)"


def _fixed_clock(date: Any) -> dict[str, Any]:
    """A `strftime_now` that tells one day, where `date` is one as Llama writes it."""
    try:
        day = datetime.strptime(date, "%d %b %Y")
    except (TypeError, ValueError):
        return {}
    return {"strftime_now": lambda pattern: day.strftime(pattern)}


def _message(text: str, calls: list[dict[str, Any]], beside: str = "") -> dict[str, Any]:
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": beside, "tool_calls": calls}
