"""Tools: what Llama 3.1 and later are told of them, what is trained of a call, and how a call is read back."""

import ast
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_model import BASE, build

from puna.cli import chat
from puna.data.conversations import ChatSource, read_conversations, to_messages, to_tools
from puna.data.encode import encode_conversations
from puna.errors import DataError, UsageError
from puna.infer import llama
from puna.infer.request import Completion, Result
from puna.log import log
from puna.model.config import ModelConfig
from puna.tokenizer.chat.format import ChatFormat, bundled
from puna.tokenizer.chat.messages import plain_messages, plain_tools
from puna.tokenizer.chat.tools import read_calls
from puna.tokenizer.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Now & here, <°C>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
DAY = "01 Mar 2025"


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASK = {"role": "user", "content": " How warm is it in Cusco? "}
CALL = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", city="Cusco")]}
RESULT = {"role": "tool", "content": "12"}
ANSWER = {"role": "assistant", "content": "12 degrees."}
DIALOG = [{"role": "system", "content": "Be brief."}, ASK, CALL, RESULT, ANSWER]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer(tokenizer_folder)


def turn(role: str, text: str, end: str = "<|eot_id|>") -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}{end}"


SYSTEM = f"Cutting Knowledge Date: December 2023\nToday Date: {DAY}\n\n"
SPECIFICATION = json.dumps(WEATHER, indent=4, ensure_ascii=False) + "\n\n"
HOW = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
IN_USER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
)
IN_USER += f"best answers the given prompt.\n\n{HOW}Do not use variables.\n\n{SPECIFICATION}"
IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)
IN_SYSTEM += f"{HOW}Do not use variables.\n\n{SPECIFICATION}"
WRITTEN = '{"name": "get_weather", "parameters": {"city": "Cusco"}}'


def rest(end: str, called: str = WRITTEN) -> str:
    answers = turn("assistant", called, end) + turn("ipython", '"12"') + turn("assistant", "12 degrees.")
    return answers + turn("assistant", "", "")


ASKED = turn("user", "How warm is it in Cusco?")
EXPECTED: list[tuple[str, dict[str, Any], list | None, str]] = [
    ("llama3.1", {}, [WEATHER],
     turn("system", f"Environment: ipython\n{SYSTEM}Be brief.") + turn("user", IN_USER + "How warm is it in Cusco?")
     + rest("<|eot_id|>")),
    ("llama3.1", {"tools_in_user_message": False}, [WEATHER],
     turn("system", f"Environment: ipython\n{SYSTEM}{IN_SYSTEM}Be brief.") + ASKED + rest("<|eot_id|>")),
    ("llama3.3", {"builtin_tools": ["brave_search", "code_interpreter"]}, None,
     turn("system", f"Environment: ipython\nTools: brave_search\n\n{SYSTEM}Be brief.") + ASKED + rest("<|eom_id|>")),
    ("llama3.1", {"builtin_tools": ["get_weather"]}, None,
     turn("system", f"Environment: ipython\nTools: get_weather\n\n{SYSTEM}Be brief.") + ASKED
     + rest("<|eom_id|>", '<|python_tag|>get_weather.call(city="Cusco")')),
    ("llama3.2", {}, [WEATHER],
     turn("system", f"Environment: ipython\n{SYSTEM}Be brief.") + turn("user", IN_USER + "How warm is it in Cusco?")
     + rest("<|eot_id|>")),
    ("llama3.1", {}, [], turn("system", f"{SYSTEM}Be brief.") + ASKED + rest("<|eot_id|>")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "variables", "tools", "expected"), EXPECTED)
def test_prompts_equal_what_is_written_by_hand(
    name: str, variables: dict, tools: list | None, expected: str, tokenizer: Tokenizer
) -> None:
    """A model that is told of its tools in other words than it was trained on does not call them."""
    chat = ChatFormat(tokenizer, name, date_string=DAY, **variables)
    assert chat.render(DIALOG, True, tools) == "<|begin_of_text|>" + expected
    assert tokenizer.decode(chat.prompt(DIALOG, tools), special=True) == "<|begin_of_text|>" + expected


@pytest.mark.parametrize("name", ["llama2", "llama3.1", "llama3.2", "llama3.2-pythonic"])
def test_bundled_templates_render_as_transformers_renders_them(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The template is saved beside the weights: vLLM and transformers must make the same prompt of it."""
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    theirs.chat_template = bundled(name)
    for variables in ({"date_string": DAY}, {"tools_in_user_message": False, "date_string": DAY}):
        ours = ChatFormat(tokenizer, name, **variables)
        for messages, tools in [
            (DIALOG, [WEATHER]),
            (DIALOG[1:3], [WEATHER]),
            (DIALOG[:2], None),
            ([ASK, ANSWER], None),
        ]:
            if name == "llama2" and tools:
                continue
            said, plain = {"tools": tools, "tokenize": False, **variables}, plain_messages(messages)
            text = theirs.apply_chat_template(plain, add_generation_prompt=True, **said)
            assert ours.render(messages, True, tools) == text
            assert ours.prompt(messages, tools) == theirs(text, add_special_tokens=False).input_ids


def test_a_day_in_the_prompt_can_be_fixed(tokenizer: Tokenizer) -> None:
    """Llama 3.2's template asks for today: data encoded tomorrow would have other ids, and a run could not go on."""
    fixed = ChatFormat(tokenizer, "llama3.2", date_string="26 Jul 2024")
    assert "Today Date: 26 Jul 2024" in fixed.render([ASK])
    asks = "{{ strftime_now('%Y-%m-%d') }}" + bundled("llama3")
    assert ChatFormat(tokenizer, asks, date_string="26 Jul 2024").render([ASK]).startswith("2024-07-26")
    assert "2024-07-26" not in ChatFormat(tokenizer, asks).render([ASK])


def stretches(ids: list[int], trained: list[bool]) -> list[list[int]]:
    found, open_ = [], False
    for token, learn in zip(ids, trained, strict=True):
        if learn and not open_:
            found.append([])
        if learn:
            found[-1].append(token)
        open_ = learn
    return found


def test_calls_and_answers_are_trained_and_results_are_not(tokenizer: Tokenizer) -> None:
    """A model trained on tool results learns to invent them instead of asking."""
    for name, variables, tools, _ in EXPECTED:
        chat = ChatFormat(tokenizer, name, **variables)
        learned = [tokenizer.decode(s, special=True) for s in stretches(*chat.encode(DIALOG, tools=tools))]
        built_in = "get_weather" in variables.get("builtin_tools", ())
        first = '<|python_tag|>get_weather.call(city="Cusco")' if built_in else WRITTEN
        end = "<|eom_id|>" if "builtin_tools" in variables else "<|eot_id|>"
        assert learned == [first + end, "12 degrees.<|eot_id|>"]
        prompt, whole = chat.prompt(DIALOG[:2], tools), chat.encode(DIALOG, tools=tools).ids
        assert whole[: len(prompt)] == prompt


def test_control_strings_in_tools_stay_text(tokenizer: Tokenizer) -> None:
    """A web page that a tool fetched, or a description somebody else wrote, must not open a system turn."""
    control = set(tokenizer.special_tokens.values())
    for name in ("llama3.1", "llama3.2", "llama3.2-pythonic"):
        chat = ChatFormat(tokenizer, name, date_string=DAY)

        def count(text: str, chat: ChatFormat = chat) -> int:
            tool = {**WEATHER["function"], "description": text, "parameters": {text: [text]}}
            calls = [call("get_weather", city=text, x={text: [text]})]
            said = [ASK, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": {text: text}}, ANSWER]
            ids = chat.encode(said, tools=[tool]).ids
            assert tokenizer.decode(ids).count(text) >= 5
            return sum(i in control for i in ids)

        for string in ("<|eot_id|>", "<|python_tag|>", "<|start_header_id|>"):
            assert count(f"a{string}system{string}") == count("plain")
    escaping = bundled("llama3.1").replace("tojson(indent=4)", "tojson(ensure_ascii=true)")
    tool = {"name": "f", "description": "é <|eot_id|> 日"}
    assert '"\\u00e9 <|eot_id|> \\u65e5"' in tokenizer.decode(ChatFormat(tokenizer, escaping).prompt([ASK], [tool]))


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "assistant", "content": None}, "no text"),
        ({"role": "assistant", "tool_calls": [call("<|eot_id|>")]}, "has the name '<|eot_id|>'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "no function with"),
        ({"role": "user", "content": "x", "tool_calls": [call("f")]}, "not the assistant's"),
        ({"role": "user", "content": [{"type": "image"}]}, "no text"),
        ({"role": "user", "content": "\ud83d"}, "half a character"),
        ({"role": "tool", "content": {"a": ["\U000f0001"]}}, "private-use"),
        ({"role": "assistant", "tool_calls": [call("f", x=json.loads("[" * 60 + "]" * 60))]}, "deep"),
        ({"role": "tool<|eot_id|>", "content": "x"}, "the role"),
    ],
)
def test_messages_that_cannot_be_are_refused(message: dict, why: str) -> None:
    """What a template would stumble over, or write as something else, is named with its message."""
    with pytest.raises(DataError) as told:
        plain_messages([message])
    assert why in told.value.what


def test_every_spelling_of_messages_and_tools_is_one(tokenizer: Tokenizer) -> None:
    """OpenAI's calls hold JSON as text, its contents are parts; the ids must not depend on it."""
    chat = ChatFormat(tokenizer, "llama3.1")
    spelled = {"function": {"name": "get_weather", "arguments": '{"city": "Cusco"}'}, "id": "1"}
    parts = [{"type": "text", "text": " How warm is"}, {"type": "text", "text": " it in Cusco? "}]
    other = [
        DIALOG[0],
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "tool_calls": [spelled]},
    ]
    expected = chat.encode(DIALOG[:3], tools=[WEATHER])
    assert chat.encode(other, tools=[WEATHER["function"]]) == expected
    assert chat.encode([*DIALOG[:2], {**CALL, "tool_calls": [spelled["function"]]}], tools=[WEATHER]) == expected
    assert plain_tools([]) is plain_tools(None) is None
    for bad in ("x", [1], [{"name": "a b"}], {"name": "f"}):
        with pytest.raises(DataError):
            plain_tools(bad)  # type: ignore[arg-type]


def test_templates_without_tools_refuse_them(tokenizer: Tokenizer) -> None:
    """A template that ignores tools trains answers out of nowhere, whether or not a text has the tool's name."""
    for messages, tools in [(DIALOG, None), (DIALOG[:2], [WEATHER])]:
        with pytest.raises(DataError, match=r"leaves out the (call of|tool) get_weather"):
            ChatFormat(tokenizer, "llama3").encode(messages, tools=tools)
    said = {"role": "assistant", "content": "I use get_time now.", "tool_calls": [call("get_time", zone=3)]}
    about = [{"role": "user", "content": "what is get_weather, assistant?"}, ANSWER]
    for messages, tools in [([ASK, said], None), (about, [WEATHER]), (about, [{"name": "assistant"}])]:
        with pytest.raises(DataError, match="leaves out the"):
            ChatFormat(tokenizer, "llama3").encode(messages, tools=tools)
    two = {"role": "assistant", "tool_calls": [call("f", a="x"), call("g", b="y")]}
    with pytest.raises(DataError, match="one tool at a time"):
        ChatFormat(tokenizer, "llama3.1").encode([ASK, two])
    with pytest.raises(DataError, match="called with one text"):
        ChatFormat(tokenizer, "llama3.1", builtin_tools=["f"]).encode([ASK, {**two, "tool_calls": [call("f", a=1)]}])


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
hard = st.sampled_from(
    ["<|eot_id|>", "<|python_tag|>", '")', "', b='", '", b="', "</function>", "\\", "\\n", "\n", "é日🦙", "}]"]
)
text = st.lists(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=8) | hard, max_size=4).map("".join)
leaf = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | text
)
values = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
written = st.builds(lambda name, args: call(name, **args), names, st.dictionaries(names, values, max_size=4))
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_back(tokenizer: Tokenizer, name: str, calls: list[dict], **variables: Any) -> Any:
    chat = ChatFormat(tokenizer, name, date_string=DAY, **variables)
    [learned] = stretches(*chat.encode([ASK, {"role": "assistant", "tool_calls": calls}]))
    return chat.parse(learned)


@quick
@given(calls=st.lists(written, min_size=1, max_size=3))
def test_calls_come_back_as_they_were_written(tokenizer: Tokenizer, calls: list[dict]) -> None:
    """An argument that changes on its way through ids books another flight."""
    one = {"role": "assistant", "content": "", "tool_calls": calls[:1]}
    for name in ("llama3.1", "llama3.2"):
        assert read_back(tokenizer, name, calls[:1]) == one
    assert read_back(tokenizer, "llama3.1", calls[:1], builtin_tools=["other"]) == one
    assert read_back(tokenizer, "llama3.2-pythonic", calls) == {**one, "tool_calls": calls}
    functions = "\n".join(
        f"<function={c['function']['name']}>{json.dumps(c['function']['arguments'])}</function>" for c in calls
    )
    assert read_calls(functions) == calls
    objects = "; ".join(
        json.dumps({"name": c["function"]["name"], "parameters": c["function"]["arguments"]}) for c in calls
    )
    assert read_calls(objects) == read_calls(objects, tagged=True) == calls


@quick
@given(name=names, key=names, value=text)
def test_built_in_calls_come_back(tokenizer: Tokenizer, name: str, key: str, value: str) -> None:
    """Meta writes a built-in tool's text without escapes: quotes in a search must not end it."""
    calls = [call(name, **{key: value})]
    assert read_back(tokenizer, "llama3.1", calls, builtin_tools=[name])["tool_calls"] == calls


@quick
@given(
    calls=st.lists(st.tuples(names, st.dictionaries(names, values.filter(lambda v: v == v), max_size=3)), max_size=3)
)
def test_pythonic_calls_mean_what_python_means(calls: list) -> None:
    """Python's own literals are the oracle: quotes, escapes, nesting and numbers as `repr` writes them."""
    source = "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"
    try:
        parsed = [
            (c.func.id, {k.arg: ast.literal_eval(k.value) for k in c.keywords})
            for c in ast.parse(source).body[0].value.elts
        ]  # type: ignore
    except SyntaxError:  # a keyword as a name, which Llama may use and Python may not
        parsed = calls
    assert read_calls(source) == [call(n, **a) for n, a in parsed]


CODE = "code_interpreter"
READINGS = [
    ("<function=f>{\"a\": 1}</function>", False, [call("f", a=1)]),
    ("<function=f{\"a\": 1}</function>", False, [call("f", a=1)]),
    ('{"type": "function", "name": "f", "parameters": {}}', False, [call("f")]),
    ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": null}"}}', False, [call("f", a=None)]),
    ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1.5}}]', False, [call("f"), call("g", x=1.5)]),
    (" [a.f(x=-1, y=[True, {'k': None}],), g()] ", False, [call("a.f", x=-1, y=[True, {"k": None}]), call("g")]),
    ("[f(a='it\\'s \\u00e9 \\d')]", False, [call("f", a="it's é \\d")]),
    ('brave_search.call(query="say \\"hi" then "go")', True, [call("brave_search", query='say \\"hi" then "go')]),
    ("print('x')\n", True, [call(CODE, code="print('x')")]),
    ("[f(a=1)]", True, [call("f", a=1)]),
    ("print(1)", False, []), ("", True, []), ("[]", False, []), ("{}", False, []), ("[1, 2]", False, []),
    ('{"name": "Ana", "age": 3}', False, []), ('{"name": "Ana", "parameters": {}, "age": 3}', False, []),
    ('{"name": "f", "parameters": {"a": NaN}}', False, []), ('{"name": "f", "parameters": [1]}', False, []),
    ('{"name": "f", "parameters": {}} and so on', False, []), ('Try {"name": "f", "parameters": {}}', False, []),
    ("[f(1)]", False, []), ("[f(a=g())]", False, []), ("[f(a=x)]", False, []), ("[f(a=1, a=2)]", False, []),
    ("[f(a=1) + g()]", False, []), ("[f(a=1)] then", False, []), ("[f(a=(1).__class__)]", False, []),
    ("[f(a=1e999)]", False, []), ("<function=f>{\"a\": 1}", False, []), ("[" * 100000, False, []),
    ('{"name": "f", "parameters": ' + '{"a": ' * 90000, False, []), ("[f(a=" + "-" * 100000 + "1)]", False, []),
    ("[f(a=" + "9" * 5000 + ")]", False, []), ('{"name": "f", "parameters": {"a": "\\ud800"}}', False, []),
]  # fmt: skip


@pytest.mark.parametrize(("said", "tagged", "expected"), READINGS, ids=lambda v: str(v)[:40])
def test_what_is_a_call_and_what_is_not(said: str, tagged: bool, expected: list) -> None:
    """An answer about JSON must not run a tool; a call in any of Llama's spellings must."""
    assert read_calls(said, tagged) == expected


FRAGMENTS = [
    "[f(", "a=", "'", '"', "\\", "\\u12", "{", "}", "]", ")", ",", '{"name": "f", "parameters": ', "<function=f>",
    "</function>", ".call(", "1e9", "None", "é", "\n", ":", "\ud800", "-", "9" * 30,
]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12),
    ids=st.lists(st.integers(0, 599), max_size=12),
)
def test_no_output_of_a_model_raises(tokenizer: Tokenizer, parts: list[str], ids: list[int]) -> None:
    """A server that dies of what a model says dies of its users."""
    chat, said = ChatFormat(tokenizer, "llama3.1"), "".join(parts)
    tag = tokenizer.special_tokens["<|python_tag|>"]
    words = tokenizer.encode(said.encode("utf-8", "replace").decode())
    for reply in (said, ids, [*ids, tag, *words], [*words, tag, *ids, tag], words):
        message = chat.parse(reply)
        if "tool_calls" in message:
            plain_messages([{**message, "content": ""}])
        assert isinstance(message["content"], str)
        assert message.get("tool_calls") != []


def test_where_a_reply_ends(tokenizer: Tokenizer) -> None:
    """Words after the stop are nobody's."""
    chat, special = ChatFormat(tokenizer, "llama3.1"), tokenizer.special_tokens
    words, tag = tokenizer.encode("Snow."), special["<|python_tag|>"]
    code = tokenizer.encode("print(1)")
    assert chat.parse([*words, special["<|eot_id|>"], *words]) == {"role": "assistant", "content": "Snow."}
    assert chat.parse([*words, tag, *code, special["<|eom_id|>"]]) == {
        "role": "assistant", "content": "Snow.", "tool_calls": [call(CODE, code="print(1)")],
    }  # fmt: skip
    assert chat.parse([*words, tag]) == {"role": "assistant", "content": "Snow."}


def test_only_what_was_offered_is_called(tokenizer: Tokenizer) -> None:
    """Who asked for JSON with a name gets it; a server must not run a function that nobody offered."""
    chat, end = ChatFormat(tokenizer, "llama3.1"), tokenizer.special_tokens["<|eot_id|>"]
    for text in ('{"name": "Ann", "arguments": {}}', "[print(a=1)]"):
        for tools in (None, [WEATHER]):
            said = [*tokenizer.encode(text), end, *tokenizer.encode("x")]
            assert chat.answer(said, tools) == {"role": "assistant", "content": text}
    assert chat.answer([*tokenizer.encode(WRITTEN), end], [WEATHER]) == {**CALL, "content": ""}
    tagged = [tokenizer.special_tokens["<|python_tag|>"], *tokenizer.encode("print(1)")]
    assert chat.answer(tagged) == {"role": "assistant", "content": "print(1)"}
    ran = {"role": "assistant", "content": "", "tool_calls": [call(CODE, code="print(1)")]}
    assert ChatFormat(tokenizer, "llama3.1", builtin_tools=["brave_search"]).answer(tagged) == ran


def test_llama_is_told_of_built_in_tools(tokenizer: Tokenizer) -> None:
    """A tool that no caller can switch on is never called, and one that nobody switched on must not be."""
    tagged = [tokenizer.special_tokens["<|python_tag|>"], *tokenizer.encode('brave_search.call(query="snow")')]
    prompts: list[list[int]] = []

    class Speaks(llama.Llama):
        def complete(self, prompts_: Any, *options: Any, **sampling: Any) -> list[Result]:
            prompts.extend(prompts_)
            return [result(tagged)]

    told = tokenizer.with_template(bundled("llama3.1"))
    for variables, calls in (({}, 0), ({"builtin_tools": ["brave_search"]}, 1)):
        model = Speaks(None, told, Path("x"), [], variables)  # type: ignore[arg-type]
        assert len(model.respond([ASK]).get("tool_calls", ())) == calls
        assert ("Tools: brave_search" in tokenizer.decode(prompts[-1])) == bool(calls)


def test_an_answer_goes_up_to_a_stop_string(tokenizer: Tokenizer) -> None:
    """The letters before a stop string that begins inside an id were dropped: `inspecti` became nothing."""
    model = build(ModelConfig(**{**BASE, "vocab_size": 600, "max_seq_len": 512})).eval()
    asked = llama.Llama(model, tokenizer.with_template(bundled("llama3.1")), Path("x"), [])
    ids = asked.continue_ids([asked.template.prompt([ASK])], 30)[0]
    word = next(w for w in map(tokenizer.piece, ids) if w.isascii() and w.isalpha() and len(w) > 2)
    wanted = tokenizer.decode(ids).partition(word[1:])[0]
    assert wanted.endswith(word[0])
    assert asked.chat([ASK], 30, stop=[word[1:]]) == wanted
    assert asked.respond([ASK], 30, stop=[word[1:]])["content"] == wanted


def test_history_holds_code_as_it_was_generated(tokenizer: Tokenizer) -> None:
    """Meta's code interpreter is sent code alone: history in another form is not what the model wrote."""
    special = tokenizer.special_tokens
    said = [special["<|python_tag|>"], *tokenizer.encode('x = "a"\nprint(x)'), special["<|eom_id|>"]]
    for tools in (["brave_search"], ["code_interpreter"], []):
        chat = ChatFormat(tokenizer, "llama3.1", builtin_tools=tools)
        assert stretches(*chat.encode([ASK, chat.parse(said)])) == [said]


def test_arguments_that_python_cannot_name_are_refused(tokenizer: Tokenizer) -> None:
    """f(my key=1) is trained and no reader takes it for a call."""
    chat = ChatFormat(tokenizer, "llama3.2-pythonic")
    for name in ("my key", "1", "", "a-b", "é", "a=1, b"):
        with pytest.raises(DataError, match="Python cannot write"):
            chat.encode([ASK, {"role": "assistant", "tool_calls": [call("f", **{name: 1})]}])


def test_rows_with_tools_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """ShareGPT's function_call and OpenAI's tool_calls are the same conversation."""
    sharegpt = {"conversations": [
        {"from": "human", "value": ASK["content"]},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Cusco"}}'},
        {"from": "observation", "value": "12"}, {"from": "gpt", "value": "12 degrees."},
    ], "tools": json.dumps([WEATHER["function"]])}  # fmt: skip
    openai = {"messages": DIALOG[1:], "tools": [WEATHER]}
    for name, row in (("a", sharegpt), ("b", openai)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    first, second = read_conversations(ChatSource(path=tmp_path))
    assert first[1:] == second[1:]
    chat = ChatFormat(tokenizer, "llama3.1", date_string=DAY)
    rows = encode_conversations([first, second], chat, 4096, "all")
    assert rows[0] == rows[1] == chat.encode(DIALOG[1:], tools=[WEATHER])
    for row in ({"tools": "{"}, {"tools": "3"}, {"tools": [{"description": "x"}]}):
        with pytest.raises(DataError, match="x:1"):
            to_tools(row, "x:1")
    with pytest.raises(DataError, match="x:1"):
        to_messages({"conversations": [{"from": "function_call", "value": "no JSON"}]}, "x:1")


def test_rows_keep_what_messages_may_have(tmp_path: Path) -> None:
    """A result that is an object was refused; which call it answers, and who speaks, was lost."""
    said = [
        {"role": "user", "name": "Ann", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [{**call("f", a=None), "id": "7"}], "refusal": None},
        {"role": "tool", "name": "f", "tool_call_id": "7", "content": {"t": 12}},
        {"role": "assistant", "content": "12", "train": False},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": said}), encoding="utf-8")
    [(_, messages, *_)] = read_conversations(ChatSource(path=tmp_path / "rows.jsonl"))
    assert messages == [said[0], {"role": "assistant", "content": "", "tool_calls": said[1]["tool_calls"]}, *said[2:]]
    for turn in ({"role": "user", "content": {"t": 12}}, {"from": "gpt"}, {"value": "x"}, {"role": 1, "content": "x"}):
        with pytest.raises(DataError) as told:
            to_messages({"messages": [turn]}, "x:1")
        assert told.value.where == "x:1"


def test_parquet_rows_have_their_own_arguments_alone(tmp_path: Path) -> None:
    """Arrow gives every object the fields of all rows: a call of f(city) was trained as f(city, zone=null)."""
    rows = [
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call(name, **{argument: "x"})]}],
         "tools": [{"name": name, "parameters": {"properties": {argument: {"type": "string"}}}}]}
        for name, argument in (("f", "city"), ("g", "zone"))
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ours, theirs = (list(read_conversations(ChatSource(path=tmp_path / f"rows.{s}"))) for s in ("parquet", "jsonl"))
    assert [row[1:] for row in ours] == [row[1:] for row in theirs]


def result(ids: list[int]) -> Result:
    return Result((Completion(tuple(ids), None, "stop"),))


class Scripted:
    """A model that says what it was given, one answer after another."""

    def __init__(self, tokenizer: Tokenizer, said: list[list[int]]):
        self.tokenizer, self.said, self.asked, self.context = tokenizer, said, 0, 9999
        self.template = ChatFormat(tokenizer, "llama3.1")

    def complete(self, prompts: list, on_token: Any, **options: Any) -> list[Result]:
        self.asked += 1
        if len(prompts[0]) > self.context:
            raise UsageError("the prompt is too long", fix="a shorter one")
        for token in self.said[self.asked - 1]:
            on_token(token)
        return [result(self.said[self.asked - 1])]


def typed_to(model: Scripted, text: str, monkeypatch: pytest.MonkeyPatch, tools: Path | None = None) -> None:
    monkeypatch.setattr(llama, "load", lambda *args, **kwargs: model)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.chat("x", tools=tools)


def test_chat_survives_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    """A mistyped /save ended the program, and with it the conversation that was to be kept."""
    model = Scripted(tokenizer, [tokenizer.encode("Snow.")])
    typed_to(model, f"Hello\n/save {tmp_path}/missing/c.json\n/save {tmp_path}/c.json\n", monkeypatch)
    assert [m["content"] for m in json.loads((tmp_path / "c.json").read_text())] == ["Hello", "Snow."]


def test_chat_ends_where_its_input_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """A call at the end of the input was answered with nothing, and the model asked again, for ever."""
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]), encoding="utf-8")
    model = Scripted(tokenizer, [tokenizer.encode(WRITTEN)] * 2)
    typed_to(model, "How warm?\n", monkeypatch, tmp_path / "tools.json")
    assert model.asked == 1


def test_a_refused_turn_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """A result that cannot be shown to the model left its call behind, and every later turn failed too."""
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]), encoding="utf-8")
    model = Scripted(tokenizer, [tokenizer.encode(s) for s in ("Snow.", WRITTEN, "Grass.")])
    typed = f"Hello\nHow warm?\n\U000f0000\nAnd now?\n/save {tmp_path}/c.json\n"
    typed_to(model, typed, monkeypatch, tmp_path / "tools.json")
    said = [m["content"] for m in json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))]
    assert said == ["Hello", "Snow.", "And now?", "Grass."]


def test_a_conversation_outlives_its_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A message that the context has no room for ended the program, and all that was said was lost."""
    model = Scripted(tokenizer, [tokenizer.encode(s) for s in ("Snow.", "", "Grass.")])
    model.context = len(model.template.prompt([{"role": "user", "content": "Hello"}])) + 40
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("INFO", log.name):
        typed_to(model, f"Hello\n{'How warm? ' * 30}\n/save {tmp_path}/c.json\n/system\nAnd now?\n", monkeypatch)
    assert [m["content"] for m in json.loads((tmp_path / "c.json").read_text())] == ["Hello", "Snow."]
    assert "too long" in caplog.text
    assert "/save FILE" in caplog.text
    assert capsys.readouterr().out == "Snow.\nGrass.\n"


def test_chat_shows_calls_and_asks_for_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer
) -> None:
    """A call that is printed as an answer leaves the model waiting for a result nobody gives."""
    said = [[*tokenizer.encode(WRITTEN), tokenizer.special_tokens["<|eot_id|>"]], tokenizer.encode("12 degrees.")]
    asked = []

    class Model:
        template = ChatFormat(tokenizer, "llama3.1", date_string=DAY)

        def complete(self, prompts: list, on_token: Any, **options: Any) -> list[Result]:
            asked.append(prompts[0])
            for token in said[len(asked) - 1]:
                on_token(token)
            return [result(said[len(asked) - 1])]

    Model.tokenizer = tokenizer  # type: ignore[attr-defined]
    monkeypatch.setattr(llama, "load", lambda *args, **kwargs: Model())
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"How warm is it in Cusco?\n12\n/save {tmp_path}/c.json\n/quit\n"))
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]), encoding="utf-8")
    chat.chat("x", tools=tmp_path / "tools.json")
    saved = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    asking = {"role": "user", "content": "How warm is it in Cusco?"}
    assert saved == [asking, {**CALL, "content": ""}, RESULT, ANSWER]
    assert asked[1] == Model.template.prompt(saved[:3], [WEATHER])
    assert capsys.readouterr().out == f"{WRITTEN}\n12 degrees.\n"
    (tmp_path / "tools.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="tools cannot be read"):
        chat.chat("x", tools=tmp_path / "tools.json")
