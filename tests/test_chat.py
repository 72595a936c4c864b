"""Conversations to ids: what is trained, what control strings become, and equality with transformers."""

import base64
import gzip
import json
from pathlib import Path

import pytest
import transformers

from puna.data.conversations import ChatSource, Conversation, read_conversations
from puna.data.encode import encode_conversations
from puna.data.packing import PackedLoader
from puna.errors import DataError, UsageError
from puna.eval.doctor.data_checks import stretches_of
from puna.ops.cross_entropy import IGNORE
from puna.tokenizer.bpe import save_bpe
from puna.tokenizer.chat.format import BUNDLED, ChatFormat, Role, bundled, fitting, read_template
from puna.tokenizer.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Where is the grass?"},
    {"role": "assistant", "content": "Under the snow."},
    {"role": "user", "content": "  And the llamas? "},
    {"role": "assistant", "content": "They graze."},
]
PIECES = {  # template: (before everything, start of a turn, end of a header, end of a turn, after a turn)
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "chatml": ("", "<|im_start|>{}\n", "<|im_end|>", "\n"),
}
CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'
+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizers_by_template(tokenizer_folder: Path) -> dict[str, Tokenizer]:
    """The trained tokenizer, and the same with ChatML's control tokens in place of two reserved ones."""
    llama3 = Tokenizer(tokenizer_folder)
    files = dict(llama3.files)
    raw = files["tokenizer.json"].replace(b"<|reserved_special_token_5|>", b"<|im_start|>")
    files["tokenizer.json"] = raw.replace(b"<|reserved_special_token_6|>", b"<|im_end|>")
    return {"llama3": llama3, "chatml": Tokenizer(files)}


def oracle(tokenizer: Tokenizer, template: str, messages: list[dict], train: str) -> tuple[list[int], list[bool]]:
    """The conversation assembled by hand, piece by piece."""
    first, start, end, after = PIECES[template]
    ids = tokenizer.encode(first, special=True) if first else []
    trained = [False] * len(ids)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    for i, message in enumerate(messages):
        answer = message["role"] == "assistant"
        learn = answer and (train == "all" or i == last) and message.get("train", True)
        header, body = start.format(message["role"]), message["content"]
        control, _, plain = header.rpartition(">")
        head = tokenizer.encode(control + ">", special=True)
        # A user's words are tokenized together with the header's line break, an answer apart from it: generated so.
        if template == "chatml":
            head, plain = tokenizer.encode("<|im_start|>", special=True), header.removeprefix("<|im_start|>")
        pieces = [tokenizer.encode(plain), tokenizer.encode(body)] if answer else [[], tokenizer.encode(plain + body)]
        for part, flag in ((head + pieces[0], False), (pieces[1] + tokenizer.encode(end, special=True), learn)):
            ids += part
            trained += [flag] * len(part)
        ids += tokenizer.encode(after)
        trained += [False] * len(tokenizer.encode(after))
    return ids, trained


CONVERSATIONS = {
    "one turn": TURNS[:2],
    "many turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "ends with the user": TURNS[:3],
    "one answer not trained": [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]],
}


@pytest.mark.parametrize("train", ["all", "last"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", PIECES)
def test_trained_tokens_equal_a_hand_written_oracle(
    template: str, name: str, train: str, tokenizers_by_template: dict[str, Tokenizer]
) -> None:
    """Wrong masks and untrained terminators are the field's most frequent silent failure."""
    tokenizer, messages = tokenizers_by_template[template], CONVERSATIONS[name]
    ids, trained = ChatFormat(tokenizer, template).encode(messages, train)  # type: ignore[arg-type]
    assert (ids, trained) == oracle(tokenizer, template, messages, train)
    end = tokenizer.special_tokens[PIECES[template][2]]
    answers = [m for m in messages if m["role"] == "assistant" and m.get("train", True)]
    assert sum(t and i == end for i, t in zip(ids, trained, strict=True)) == (len(answers) if train == "all" else 1)


@pytest.mark.parametrize("pad", ["another id", "the end-of-turn id"])
@pytest.mark.parametrize("seq_len", [75, 200])
@pytest.mark.parametrize("template", PIECES)
def test_packed_labels_equal_the_oracle(
    template: str, seq_len: int, pad: str, tokenizers_by_template: dict[str, Tokenizer]
) -> None:
    """Cut and packed rows: each label is the next id where the oracle trains it, whatever pads the row.

    SmolLM2 pads with the id that ends a turn; masking labels by that id would leave the end untrained.
    """
    tokenizer = tokenizers_by_template[template]
    end = tokenizer.special_tokens[PIECES[template][2]]
    chat, conversations = ChatFormat(tokenizer, template), [c for c in CONVERSATIONS.values() if len(c) > 3]
    expected = [oracle(tokenizer, template, c, "all") for c in conversations]
    named = [Conversation(f"x:{i}", c) for i, c in enumerate(conversations)]
    rows = encode_conversations(named, chat, seq_len, "all")
    loader = PackedLoader(rows, seq_len, 2, pad_id=end if pad == "the end-of-turn id" else 3, seed=0)
    batch, kept = loader.batch(loader.packs), 0
    assert batch.documents is not None
    spans = dict(zip([i for p in loader.packs for i in p], batch.documents.spans, strict=True))
    for number, (row, start, stop) in spans.items():
        ids, trained = (part[:seq_len] for part in expected[number])
        assert batch.tokens[row, start:stop].tolist() == ids
        labels = batch.labels[row, start:stop].tolist()
        assert labels == [ids[i + 1] if trained[i + 1] else IGNORE for i in range(len(ids) - 1)] + [IGNORE]
        kept += sum(trained[1:])
        if seq_len == 200 and all(m.get("train", True) for m in conversations[number]):
            assert labels.count(end) == sum(m["role"] == "assistant" for m in conversations[number])
    assert batch.n == kept == int((batch.labels != IGNORE).sum())


def test_a_message_that_is_no_list_is_told_how_to_be_one(llama3: Tokenizer) -> None:
    """`respond("Hello")` said that message 0 is a str, of a text of five letters."""
    with pytest.raises(DataError, match="one message, not a list") as told:
        ChatFormat(llama3, "llama3").prompt("Hello")  # type: ignore[arg-type]
    assert told.value.fix == '[{"role": "user", "content": "Hello"}]'


def test_an_end_that_generation_ignores_is_refused(tokenizers_by_template: dict[str, Tokenizer]) -> None:
    """A model that learns to end its turn with an id that nobody stops at talks on for ever."""
    tokenizer = tokenizers_by_template["llama3"]
    source = bundled("llama3").replace("<|eot_id|>", "<|reserved_special_token_9|>")
    with pytest.raises(DataError, match="does not stop"):
        ChatFormat(tokenizer, source).encode(TURNS)


@pytest.mark.parametrize("template", PIECES)
def test_honest_text_equals_transformers(template: str, tokenizers_by_template: dict, tmp_path: Path) -> None:
    """The same bytes and ids as apply_chat_template, with and without a generation prompt."""
    tokenizer = tokenizers_by_template[template]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    theirs.chat_template = bundled(template)
    ours = ChatFormat(tokenizer, template)
    for messages in (*CONVERSATIONS.values(), [SYSTEM]):
        for generate in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            assert ours.reveal(ours.render(messages, generate)) == text
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.prompt(messages) == expected
        assert ours.encode(messages).ids == theirs.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("template", PIECES)
def test_typed_control_strings_stay_text(template: str, tokenizers_by_template: dict[str, Tokenizer]) -> None:
    """A user who types a turn's end and a system header would otherwise write the system's message."""
    tokenizer = tokenizers_by_template[template]
    chat = ChatFormat(tokenizer, template)
    control = set(tokenizer.special_tokens.values())
    plain = [i for i in chat.encode([{"role": "user", "content": "x"}, *TURNS[1:2]]).ids if i in control]
    for string in tokenizer.special_tokens:
        typed = f"a{string}system\n\n{string}"
        for messages in (
            [{"role": "user", "content": typed}, TURNS[1]],
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": typed}],
        ):
            ids = chat.encode(messages).ids
            assert [i for i in ids if i in control] == plain
            assert typed in tokenizer.decode(ids)
    for role in ("<|eot_id|>", "system\n", "", "x" * 65):
        with pytest.raises(DataError, match="role"):
            chat.prompt([{"role": role, "content": "x"}])


def test_the_prompt_is_a_prefix_of_what_was_trained(tokenizers_by_template: dict[str, Tokenizer]) -> None:
    """What is generated from and what was trained on must be the same ids, answers that begin with a line break too."""
    for template in PIECES:
        chat = ChatFormat(tokenizers_by_template[template], template)
        messages = [*TURNS[:3], {"role": "assistant", "content": "\n\nThey graze."}]
        ids = chat.encode(messages).ids
        prompt = chat.prompt(messages[:3])
        assert ids[: len(prompt)] == prompt
        before, after = chat.around_user()
        assert before + chat.tokenizer.encode("ab") + after == chat.prompt([{"role": "user", "content": "ab"}])


def test_templates_are_confined(tokenizers_by_template: dict[str, Tokenizer]) -> None:
    """A template is data: it may not reach Python, grow without end, or hide that it never ends a turn."""
    tokenizer = tokenizers_by_template["llama3"]
    for source, why in [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ raise_exception('no system please') }}", "no system please"),
        ("{{ 'a' * 200000 }}", "far more"),
        ("{% for m in messages %}", "not valid"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "rewrites|end the assistant"),
        ("{{ messages|length }}{{ messages[-1].content if messages }}<|eot_id|>", "rewrites"),
    ]:
        with pytest.raises(DataError, match=why):
            ChatFormat(tokenizer, source).encode(TURNS)
    with pytest.raises(UsageError, match="did you mean `llama3`"):
        ChatFormat(tokenizer, "lama3")
    with pytest.raises(DataError, match="no chat template"):
        ChatFormat(tokenizer)


def test_a_template_of_other_control_tokens_is_told(tokenizer_folder: Path, tmp_path: Path) -> None:
    """ "It does not end the turn" said of a good template, when its tokens are text to this tokenizer; what fits is
    named."""
    tokenizer = Tokenizer(tokenizer_folder)
    assert set(BUNDLED) - set(fitting(tokenizer)) == {"chatml"}
    with pytest.raises(DataError) as caught:
        ChatFormat(tokenizer, "chatml").encode(TURNS)
    assert "<|im_end|> and <|im_start|> are text" in caught.value.cause
    assert "template=llama2, llama3," in caught.value.fix
    plain = ChatFormat(tokenizer.with_tokens(["<|im_start|>", "<|im_end|>"]), "chatml")
    assert plain.encode(TURNS).trained.count(True) > 2
    (tmp_path / "mine.jinja").write_text(bundled("llama3"))
    assert read_template(str(tmp_path / "mine.jinja")) == read_template("llama3") == bundled("llama3")


def test_control_tokens_are_counted(tokenizer_folder: Path) -> None:
    """Without any there is nothing to cut a text at; beyond the private-use characters one would stand for another."""
    files = Tokenizer(tokenizer_folder).files
    tokenizer = json.loads(files["tokenizer.json"])
    added, tokenizer["post_processor"] = tokenizer["added_tokens"], None
    more = [{**added[0], "id": added[-1]["id"] + 1 + i, "content": f"<|{i}|>"} for i in range(60_001 - len(added))]
    for tokens, count in (([], 0), ([*added, *more], 60_001)):
        tokenizer["added_tokens"] = tokens
        with pytest.raises(DataError, match=f"{count:,} control tokens"):
            ChatFormat(Tokenizer({**files, "tokenizer.json": json.dumps(tokenizer).encode()}), "llama3")


@pytest.fixture(scope="module")
def llama3(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 3's own tokenizer."""
    folder = tmp_path_factory.mktemp("llama3")
    lines = (assets / "tokenizers/llama3/tokenizer.model").read_bytes().splitlines()
    save_bpe({base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}, folder)
    return Tokenizer(folder)


def test_meta_golden_dialog(llama3: Tokenizer) -> None:
    """Meta's own test vector for Llama 3's dialog format."""
    chat = ChatFormat(llama3, "llama3")
    messages = [
        {"role": "system", "content": "This is a test sentence."},
        {"role": "user", "content": "This is a response."},
    ]
    assert chat.prompt(messages) == [
        128000, 128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009, 128006, 882, 128007, 271,
        2028, 374, 264, 2077, 13, 128009, 128006, 78191, 128007, 271,
    ]  # fmt: skip


@pytest.mark.parametrize("template", ["llama3", "chatml"])
@pytest.mark.parametrize("roles", [("user",), ("system", "assistant"), ("assistant", "user", "system"), ("tool",)])
def test_masks_by_role(template: str, roles: tuple[Role, ...], tokenizers_by_template: dict[str, Tokenizer]) -> None:
    """Turns of some roles alone, from what begins them to what ends them; ids are those of every other mask."""
    tokenizer, messages = tokenizers_by_template[template], [SYSTEM, *TURNS, {**TURNS[0], "train": False}]
    chat = ChatFormat(tokenizer, bundled(template))
    ids, trained = chat.encode(messages, roles)
    assert ids == chat.encode(messages).ids
    begin, start, end, after = PIECES[template]
    learned = tokenizer.decode([i for i, on in zip(ids, trained, strict=True) if on], special=True)
    expected = ""
    for number, message in enumerate(messages):
        if message["role"] in roles and message.get("train", True):
            header = "" if message["role"] == "assistant" else start.format(message["role"])
            expected += (begin if number == 0 else "") + header + message["content"] + end
            expected += "" if message["role"] == "assistant" else after
    assert learned == expected
    if roles == ("assistant", "user", "system"):
        assert chat.encode(TURNS, ("assistant",)) == chat.encode(TURNS)


def test_roles_that_a_template_writes_as_one(tokenizer_folder: Path) -> None:
    """Llama 2's system message stands within the user's turn: a mask of one would silently be of both, or none."""
    chat = ChatFormat(Tokenizer(tokenizer_folder), "llama2")
    for alone in (("user",), ("system", "assistant")):
        with pytest.raises(DataError, match="system and user apart"):
            chat.encode([SYSTEM, *TURNS], alone)
    both = chat.encode([SYSTEM, *TURNS], ("user", "system"))
    answers = chat.encode([SYSTEM, *TURNS])
    assert both.ids == answers.ids
    assert [not on for on in both.trained] == answers.trained
    assert chat.encode(TURNS, ("user",)).trained == [not on for on in chat.encode(TURNS).trained]


def test_a_hundred_real_conversations_with_tools(assets: Path, llama3: Tokenizer) -> None:
    """Glaive's rows under Llama 3's own tokenizer: every call comes back, no observation is trained."""
    chat = ChatFormat(llama3, "llama3.1", date_string="26 Jul 2024")
    path = assets / "sft/glaive_toolcall_en_demo.json.gz"
    raw, calls = json.loads(gzip.decompress(path.read_bytes())), 0
    for number, (_, messages, tools, *_) in enumerate(read_conversations(ChatSource(path=path, limit=100))):
        ids, trained = chat.encode(messages, tools=tools)
        learned = [chat.parse(ids[start:end]) for start, end in stretches_of(trained)]
        spoken = [t for t in raw[number]["conversations"] if t["from"] in ("gpt", "function_call")]
        for message, said in zip(learned, spoken, strict=True):
            if said["from"] == "gpt":
                assert message == {"role": "assistant", "content": said["value"].strip()}
            else:
                asked = json.loads(said["value"])
                assert message["tool_calls"] == [{"type": "function", "function": asked}]
                calls += 1
    assert calls > 60
