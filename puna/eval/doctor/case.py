"""What the doctor examines: a model with its tokenizer, and some of the rows it is to learn from."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.names import to_hf_config
from puna.data.conversations import SUFFIXES as CHAT_SUFFIXES
from puna.data.conversations import ChatSource, Conversation, read_conversations
from puna.data.documents import SourceConfig, read_documents
from puna.data.loader import Batch, TokenLoader
from puna.data.packing import PackedLoader
from puna.data.shards import INDEX, Shards, ShardWriter, read_index, write_index
from puna.errors import DataError, UsageError
from puna.infer.llama import Llama, load
from puna.log import log
from puna.lora import lora_parameters, merge_lora
from puna.model.config import count_parameters
from puna.model.transformer import Transformer
from puna.quant.quantize import unpack_layers
from puna.tokenizer.chat.format import ChatFormat, Encoded, fitting, has_template, read_template
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.fit import train_step
from puna.train.objectives import next_token
from puna.train.optim import OptimizerConfig, build_optimizer

SMALL = 20_000_000
"""Parameters up to which everything is computed in fp64, where a difference of 1e-9 is a mistake and not rounding."""
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.08}
"""Largest difference, as a share of the largest value. fp32: sums in another order move the gradients of a trained
135M model by 3e-4. bf16 rounds at 2^-8 in every layer."""
_TEXT = 4000  # characters of a text that are looked at

Gradients = dict[str, Tensor]


@dataclass
class Case:
    """`source` is the model as it was loaded, adapters and all; `model` computes the same without adapters."""

    source: Llama
    model: Transformer
    dtype: str
    scratch: Path
    texts: list[str]
    rows: list[Encoded]
    chat: ChatFormat | None = None
    conversations: tuple[Conversation, ...] = ()
    shards: Shards | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def llama(self) -> Llama:
        """The model without adapters, with the chat template in force."""
        tokenizer = self.tokenizer
        if self.chat is not None:
            tokenizer = tokenizer.with_template(self.chat.source)
        return replace(self.source, model=self.model, tokenizer=tokenizer)

    @property
    def small(self) -> bool:
        return count_parameters(self.model.config) <= SMALL

    @cached_property
    def windows(self) -> list[Encoded]:
        """Of each row a few ids around where its training begins; a large model, with its slow steps, gets fewer."""
        length = min(96 if self.small else 32, self.model.config.max_seq_len // 2)
        found = []
        for ids, trained in self.rows if self.small else self.rows[:5]:
            start = max(0, min(trained.index(True, 1) - length // 2, len(ids) - length))
            found.append(Encoded(ids[start : start + length], trained[start : start + length]))
        return found

    @cached_property
    def long(self) -> Tensor:
        """(1, T) ids, longer than a block of any kernel where the context allows it."""
        every = cycle(i for row in self.rows for i in row.ids)
        return torch.tensor(
            [list(islice(every, min(273 if self.small else 161, self.model.config.max_seq_len)))], device=self.device
        )

    def packed(self, seq_len: int | None = None) -> PackedLoader:
        """The windows packed: by default two and more to a row."""
        longest = max(len(row.ids) for row in self.windows)
        return PackedLoader(self.windows, seq_len or 2 * longest, 1, self.tokenizer.eos_id, seed=0)

    def batches(self) -> Any:
        """What training would read: packed conversations, or windows of token shards."""
        if self.chat is not None:
            return self.packed(max(len(row.ids) for row in self.windows))
        return TokenLoader(self._written(), min(48, self.model.config.max_seq_len), 1, seed=0)

    def _written(self) -> Shards:
        """The user's shards, or shards of the user's texts."""
        if self.shards is None:
            folder = self.scratch / "shards"
            folder.mkdir()
            writer = ShardWriter(folder, "train", self.tokenizer.vocab_size)
            for number, row in enumerate(self.rows):
                writer.add(row.ids, f"text {number}", 0)
            write_index(folder, [writer], self.tokenizer.fingerprint)
            self.shards = Shards(folder, "train")
        return self.shards

    def twin(self) -> Transformer:
        """A copy of the model to be changed."""
        return copy.deepcopy(self.model)

    def disk_values(self) -> dict[str, Any]:
        """The architecture under the names of a config.json."""
        return to_hf_config(
            self.model.config, torch.float32, self.tokenizer.named_id("bos_token"), self.tokenizer.eos_id
        )

    def gradients(self, micro: list[Batch], clip: float = 0.0) -> tuple[dict[str, Any], Gradients]:
        """(what the step reports, the gradients its optimizer would get); no weight changes."""
        kept: Gradients = {}

        def look(loss: float, norm: float) -> bool:
            kept.update({n: p.grad for n, p in self.model.named_parameters() if p.grad is not None})
            return False

        optimizer = build_optimizer(self.model, OptimizerConfig())
        moved = [batch.to(self.device) for batch in micro]
        return train_step(self.model, optimizer, moved, next_token, 1e-3, clip, look), kept

    @cached_property
    def packed_gradients(self) -> tuple[dict[str, Any], Gradients]:
        loader = self.packed()
        return self.gradients([loader.batch(loader.packs)])


def open_case(
    model: str | Path, data: Path, scratch: Path, *, template: str | None = None, rows: int = 8, dtype: str = "auto",
    device: str = "auto",
) -> Case:  # fmt: skip
    """Load a model and the first rows of its data: conversations, text, or a folder of token shards.

    Raises:
        CheckpointError, DataError, UsageError: what cannot be loaded or read.
    """
    source = load(model, dtype="fp64" if dtype == "fp64" else "fp32", device=device)
    if dtype == "auto":
        small = count_parameters(source.model.config) <= SMALL
        dtype = "fp64" if small and next(source.model.parameters()).device.type != "mps" else "fp32"
        source = load(model, dtype=dtype, device=device) if dtype == "fp64" else source
    source.model.compute_dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    plain = source.model
    if lora_parameters(plain):
        unpack_layers(plain, next(plain.parameters()).dtype)  # a base of QLoRA, so that all is seen in this dtype
        plain = copy.deepcopy(source.model)
        merge_lora(plain)
    case = Case(source, plain, dtype, scratch, [], [])
    _read(case, data, template, rows)
    case.rows = [row for row in case.rows if any(row.trained[1:])]
    if len(case.rows) < 2:
        raise DataError("fewer than two rows with something to train", where=data, fix="more rows, or a larger --rows")
    return case


def _read(case: Case, data: Path, template: str | None, rows: int) -> None:
    if (data / INDEX).exists():
        if read_index(data)["tokenizer"] != case.tokenizer.fingerprint:
            raise DataError("these shards were encoded by another tokenizer", where=data, fix="puna run data")
        case.shards = Shards(data, "train")
        for number in range(min(rows, case.shards.documents)):
            ids = case.shards.document(number)[1][: _TEXT // 4].tolist()
            case.rows.append(_all_trained(ids))
            case.texts.append(case.tokenizer.decode(ids))
    elif _conversational(data):
        if template is None and not has_template(case.tokenizer):
            fix = "--template " + ", ".join(fitting(case.tokenizer))
            raise UsageError("conversations, and a model without a chat template", fix=fix)
        case.chat = ChatFormat(case.tokenizer, read_template(template) if template else None)
        case.conversations = tuple(read_conversations(ChatSource(path=data, limit=rows)))
        case.rows = [case.chat.encode(c.messages, tools=c.tools) for c in case.conversations]
        case.texts = [str(m["content"])[:_TEXT] for c in case.conversations for m in c.messages]
    else:
        texts = (d.text for d in read_documents(SourceConfig(path=data)))
        case.texts = [piece for text in islice(texts, rows) for piece in _pieces(text, rows)][:rows]
        bos, eos = case.tokenizer.bos_id, case.tokenizer.eos_id
        case.rows = [_all_trained([bos, *case.tokenizer.encode(text), eos]) for text in case.texts]
    log.info("%d rows of %s", len(case.rows), "conversations" if case.chat else "text")


def _conversational(data: Path) -> bool:
    """Whether the first row of the file is a conversation."""
    if not data.name.endswith(CHAT_SUFFIXES):
        return False
    try:
        return bool(list(read_conversations(ChatSource(path=data, limit=1))))
    except DataError as error:
        if "found: " in str(error) and "text" in str(error):  # another column than a conversation's: plain text
            return False
        raise


def _pieces(text: str, count: int) -> Iterator[str]:
    """A few stretches of a long text, cut at line ends."""
    size = min(_TEXT, max(200, len(text) // count))
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        if text[start:end].strip():
            yield text[start : min(end, start + 2 * _TEXT)]
        start = end


def _all_trained(ids: list[int]) -> Encoded:
    return Encoded(ids, [False] + [True] * (len(ids) - 1))
