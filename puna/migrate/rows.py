"""Which rows a torchtune config learns from: its dataset builders as sources of puna's."""

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from puna.errors import UsageError
from puna.migrate.asked import Asked
from puna.migrate.page import Page

_SEQ_LEN = 2048  # where torchtune had no limit: what nearly all chat rows fit in
_LOADERS = ("json", "csv", "parquet", "text")
_SLICE = re.compile(r"(\w+)(?:\[:(\d+)(%?)\])?")


@dataclass(frozen=True)
class _Builder:
    """What a dataset builder of torchtune's does where its config does not say."""

    format: str
    hub: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    train_on_input: bool = False
    subset: str = ""


_BUILDERS = {
    "alpaca_dataset": _Builder("alpaca", "tatsu-lab/alpaca", train_on_input=True),
    "alpaca_cleaned_dataset": _Builder("alpaca", "yahma/alpaca-cleaned", train_on_input=True),
    "instruct_dataset": _Builder("columns", columns={"input": "input", "output": "output"}),
    "samsum_dataset": _Builder("columns", "Samsung/samsum", {"input": "dialogue", "output": "summary"}),
    "grammar_dataset": _Builder("columns", "liweili/c4_200m", {"input": "input", "output": "output"}),
    "slimorca_dataset": _Builder("sharegpt", "Open-Orca/SlimOrca-Dedup"),
    "chat_dataset": _Builder("auto"),
    "text_completion_dataset": _Builder("text", columns={"text": "text"}),
    "wikitext_dataset": _Builder(
        "text", "EleutherAI/wikitext_document_level", {"text": "page"}, subset="wikitext-103-v1"
    ),
    "cnn_dailymail_articles_dataset": _Builder("text", "ccdv/cnn_dailymail", {"text": "article"}, subset="3.0.0"),
}  # fmt: skip
_AROUND = {
    "GrammarErrorCorrectionTemplate": ("Correct this to standard English: ", "\n---\nCorrected: "),
    "SummarizeTemplate": ("Summarize this dialogue:\n", "\n---\nSummary:\n"),
    "QuestionAnswerTemplate": ("Question: ", "\n\nAnswer: "),
}
_STRATEGIES = {"train_on_assistant": "all", "train_on_last": "last"}
_STYLES = {"sharegpt": "conversations", "openai": "messages"}


def rows(asked: Asked, page: Page) -> None:
    """The data, how it is cut and packed, and what of it is trained."""
    given = asked.take("dataset")
    listed: list[Any] = given if isinstance(given, list) else [given]
    if not listed or not all(isinstance(part, dict) for part in listed):
        raise UsageError("no dataset in this config", where=asked.where, fix="add `dataset._component_`")
    parts = [Asked(part, asked.where) for part in listed]
    around = _around(asked, page)
    named = _names(parts) if len(parts) > 1 else [""]
    packed, trained = [], []
    for part, name in zip(parts, named, strict=True):
        prefix = f"data.sources.{name}" if name else "data"
        builder = _source(part, page, prefix, f"dataset.{name}" if name else "dataset")
        if around and not _put_around(page, f"{prefix}.columns", around):
            page.lost["tokenizer.prompt_template"] = "text around messages that are no columns: put it into the rows"
        packed.append(part.flag("packed"))
        trained.append(_train_on(part, builder))
        for key, value in part.left():
            page.lost[f"dataset.{key}"] = f"{value}: not understood"
    _trained(page, trained, texts=[_format(page, name) == "text" for name in named])
    _length(asked, page, parts)
    page.put("packed", all(packed), "dataset.packed")
    _validation(asked, page)


def _around(asked: Asked, page: Page) -> tuple[str, str] | None:
    """The text that a prompt template puts around the user's words, if it does nothing else."""
    wanted = asked.take("tokenizer.prompt_template", "")  # null takes away the one that Llama 2's has by default
    name = str(wanted).rpartition(".")[2]
    if wanted == "" or name == "Llama2ChatTemplate" or (wanted is None and "llama2" not in asked.name("tokenizer")):
        return None
    roles = wanted if isinstance(wanted, dict) else {"user": _AROUND.get(name, ())}
    beside = [text for role, texts in roles.items() if role != "user" for text in texts or ()]
    user = roles.get("user") or ()
    if any(beside) or len(user) != 2:
        page.lost["tokenizer.prompt_template"] = (
            f"{str(wanted)[:60]}: turns are written by `template` alone; text around a column goes into data.columns"
        )
        return None
    return str(user[0]), str(user[1])


def _put_around(page: Page, key: str, around: tuple[str, str]) -> bool:
    columns, source = page.lines.get(key, ({}, ""))
    if "prompt" not in columns:
        return False
    before, after = (text.replace("{", "{{").replace("}", "}}") for text in around)
    prompt = columns["prompt"] if "{" in columns["prompt"] else f"{{{columns['prompt']}}}"
    page.put(key, {**columns, "prompt": before + prompt + after}, f"{source}, prompt_template")
    return True


def _source(part: Asked, page: Page, prefix: str, section: str) -> _Builder:
    """One dataset's lines under `prefix`, and its builder."""
    name = part.name()
    if name not in _BUILDERS:
        raise UsageError(
            f"`{part.component()}` is not a dataset that puna knows", where=part.where,
            cause="puna never imports what a config names", fix=f"data.path=FILE; of torchtune: {', '.join(_BUILDERS)}",
        )  # fmt: skip
    builder = _BUILDERS[name]
    _place(part, page, builder, prefix, section)
    shape, columns = _shape(part, builder, page, section)
    page.put(f"{prefix}.format", shape, name)
    if columns:
        page.put(f"{prefix}.columns", columns, "column_map" if part.has("column_map") else name)
    if builder.format == "alpaca":
        page.lost[f"{section}: frame"] = (
            f"{name} puts `Below is an instruction ... ### Response:` around every prompt; puna's turns are the "
            "template's alone, as the model is spoken to afterwards"
        )
    if shape == "text" and not part.flag("add_eos", True):
        page.lost[f"{section}.add_eos"] = "False: a text always ends with EOS, or the model never learns to stop"
    _leftovers(part, page, section)
    return builder


def _place(part: Asked, page: Page, builder: _Builder, prefix: str, section: str) -> None:
    """Files, or a data set of the hub."""
    source, files = part.take("source", builder.hub), part.take("data_files")
    if isinstance(files, dict):
        files = files.get(part.values.get("split", "train")) or list(files.values())
    listed = files if isinstance(files, list) else [files] if files else []
    if len(listed) > 1:
        page.lost[f"{section}.data_files"] = (
            f"{', '.join(map(str, listed[1:]))}: data.path is a file, a folder or a pattern"
        )
    if source in _LOADERS or PurePath(str(source)).is_absolute() or str(source).startswith((".", "~")):
        place = listed[0] if listed else source
        if source == "text":
            raise UsageError(
                f"`{section}` reads plain text", where=part.where, cause="sft reads rows, of which each has an end",
                fix='a file of lines {"text": "..."}, and source: json; or pretrain: puna run data sources.path=FILE',
            )  # fmt: skip
        if place in _LOADERS:
            raise UsageError(f"`{section}.data_files` is missing", where=part.where, fix="the file of rows")
        page.put(f"{prefix}.path", place, f"{section}.data_files" if listed else f"{section}.source")
        part.take("split")
        return
    if not source:
        raise UsageError(f"`{section}.source` is missing", where=part.where, fix="org/name of the hub, or json")
    page.put(f"{prefix}.hub", source, f"{section}.source" if "source" in part.values else f"what {part.name()} reads")
    page.before[f"Where {source} is not in the Hugging Face cache:"] = f"hf download {source} --repo-type dataset"
    if listed:
        page.put(f"{prefix}.file", listed[0], f"{section}.data_files")
    subset = part.take("name") or part.take("subset") or builder.subset
    if subset and not listed:
        page.put(f"{prefix}.file", f"{subset}/*", f"the subset {subset}")
    _split(part, page, prefix, section)


def _split(part: Asked, page: Page, prefix: str, section: str) -> None:
    """`train`, or `train[:1000]`, of which a share cannot be said."""
    split = str(part.take("split", "train"))
    found = _SLICE.fullmatch(split)
    page.put(f"{prefix}.split", found[1] if found else split.partition("[")[0], f"{section}.split")
    if found and found[2] and not found[3]:
        page.put(f"{prefix}.limit", int(found[2]), f"{section}.split")
    elif found is None or found[3]:
        page.lost[f"{section}.split"] = f"{split}: data.limit takes the first so many rows"


def _shape(part: Asked, builder: _Builder, page: Page, section: str) -> tuple[str, dict[str, str]]:
    """The shape of the rows, and what their columns are called where that is not as usual."""
    given = part.take("column_map")
    columns = {**builder.columns, **(given if isinstance(given, dict) else {})}
    if part.name() == "chat_dataset":
        style = str(part.take("conversation_style", ""))
        if style not in _STYLES:
            raise UsageError(f"conversation_style is {style!r}", where=part.where, fix=f"one of {', '.join(_STYLES)}")
        columns = {_STYLES[style]: part.take("conversation_column", _STYLES[style])}
        return style, {} if columns == {_STYLES[style]: _STYLES[style]} else {"messages": columns[_STYLES[style]]}
    if builder.format == "text":
        return "text", {"text": part.take("column", columns["text"])}
    if builder.format == "sharegpt":
        turns = columns.get("conversations", "conversations")
        return "sharegpt", {} if turns == "conversations" else {"messages": turns}
    if builder.format == "alpaca" and not any(key != value for key, value in columns.items()):
        return "alpaca", {}
    if builder.format == "alpaca":
        asked, about = columns.get("instruction", "instruction"), columns.get("input", "input")
        page.lost[f"{section}.column_map"] = "rows without an input end their prompt with an empty line"
        return "columns", {"prompt": f"{{{asked}}}\n\n{{{about}}}", "completion": columns.get("output", "output")}
    return "columns", {"prompt": columns["input"], "completion": columns["output"]}


def _leftovers(part: Asked, page: Page, section: str) -> None:
    if prompt := part.take("new_system_prompt"):
        page.lost[f"{section}.new_system_prompt"] = f"{str(prompt)[:60]!r}: put a system message into the rows"
    if part.take("filter_fn"):
        page.lost[f"{section}.filter_fn"] = "a function of your own: data.select has filters, or filter the file"
    for key in ("split_across_pack", "trust_remote_code", "streaming"):
        if part.take(key):
            page.same.append(f"{section}.{key} as data is always read")


def _train_on(part: Asked, builder: _Builder) -> str | list[str]:
    """With train_on_input every role of the rows is trained: system and tools too, where there are any."""
    strategy = str(part.take("masking_strategy", ""))
    everything = part.flag("train_on_input", builder.train_on_input)
    if strategy in _STRATEGIES:
        return _STRATEGIES[strategy]
    if not everything and strategy != "train_on_all":
        return "all"
    return ["assistant", "user"] if builder.format in ("alpaca", "columns") else ["assistant", "user", "system", "tool"]


def _trained(page: Page, trained: list[str | list[str]], texts: list[bool]) -> None:
    if all(texts):
        return
    alike = all(value == trained[0] for value in trained)
    if not alike:
        page.lost["dataset.train_on_input"] = "it differs between data sets; train_on is one for all"
    page.put("train_on", trained[0] if alike else "all", "train_on_input")


def _validation(asked: Asked, page: Page) -> None:
    """What is held out: nothing, as in torchtune's releases, or what its newest recipes call dataset_val."""
    every, given = asked.count("run_val_every_n_steps"), asked.take("dataset_val")
    asked.take("batch_size_val")
    if not isinstance(given, dict) or not every:
        page.put("valid_fraction", 0.0, "torchtune holds nothing out")
        return
    page.put("train.evaluate_every", every, "run_val_every_n_steps")
    if share := re.fullmatch(r"\w+\[(\d+)%:\]", str(given.get("split"))):
        page.put("valid_fraction", (100 - int(share[1])) / 100, "dataset_val.split")
        page.lost.pop("dataset.split", None)
        return
    page.put("valid_fraction", 0.0, "dataset_val has rows of its own")
    part = Asked(given, asked.where)
    builder = _source(part, page, "valid", "dataset_val")
    part.flag("packed")
    _train_on(part, builder)
    for key, value in part.left():
        page.lost[f"dataset_val.{key}"] = f"{value}: not understood"


def _length(asked: Asked, page: Page, parts: list[Asked]) -> None:
    limits = [
        limit for limit in [asked.take("tokenizer.max_seq_len"), *(p.take("max_seq_len") for p in parts)] if limit
    ]
    page.put("seq_len", min(limits, default=_SEQ_LEN), "max_seq_len" if limits else "torchtune had no limit")


def _format(page: Page, name: str) -> str:
    return page.given()[f"data.sources.{name}.format" if name else "data.format"]


def _names(parts: list[Asked]) -> list[str]:
    """A name for each part of a mixture: the end of its source's."""
    names: list[str] = []
    for part in parts:
        source = str(part.values.get("source") or part.name().removesuffix("_dataset"))
        stem = re.sub(r"\W+", "_", PurePath(source).stem) or "rows"
        names.append(stem if stem not in names else f"{stem}_{len(names)}")
    return names
