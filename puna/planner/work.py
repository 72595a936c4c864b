"""What a step of training will do, in numbers, from a config: only headers, and a few conversations, are read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from puna.checkpoint.registry import load_tokenizer, open_model
from puna.checkpoint.stored import expected_shapes
from puna.data.conversations import read_conversations
from puna.data.shards import INDEX, read_index
from puna.device import choose_device, choose_dtype
from puna.errors import PunaError, UsageError
from puna.lora import LoraConfig, adapted_layers, whole_parameters
from puna.model.config import ModelConfig
from puna.model.init import build_model
from puna.model.presets import PRESETS, resolve_model
from puna.ops.blocked_attention import BLOCK, KEEP
from puna.quant.schemes import BASES
from puna.tokenizer.chat.format import ChatFormat

PLANNED = ("pretrain", "sft")
_SAMPLE = 64  # conversations that are encoded, to know how long they are
_PACKED_ROWS = 16  # rows that are packed, to know what a row takes: whole blocks of 256 scales
_PADDED = 1.1  # of texts that share a product (ops/attention.py): a quarter at most


class Texts(NamedTuple):
    """What is known of the texts in a row."""

    keys: float
    """Keys that a query meets, on average over tokens, in whole blocks."""
    kept: float
    """Of them those whose attention weights are kept for the backward."""
    trained: float
    """Share of the positions that are trained."""


@dataclass(frozen=True)
class Known:
    """What does not change with the settings of a config, read once."""

    shape: ModelConfig
    lengths: tuple[int, ...]
    """Of sampled conversations, in ids; empty where every row is one text."""
    trained: float
    device: torch.device
    dtype: torch.dtype
    ranks: int
    notes: tuple[str, ...] = ()
    """What had to be assumed."""


class Weight(NamedTuple):
    """One tensor of the model."""

    shape: tuple[int, ...]
    held: float
    """Bytes of it, as it lies in memory."""
    trained: bool
    rank: int
    """Of its adapter; 0 without one."""

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def adapter(self) -> int:
        """Numbers of its adapter."""
        return self.rank * sum(self.shape)


@dataclass(frozen=True)
class Work:
    """A step of a rank. `asked` is the config as plain values: what a recipe does not know is absent there."""

    known: Known
    asked: Mapping[str, Any]
    weights: Mapping[str, Weight] = field(repr=False)
    texts: Texts

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return max(1, self.asked["batch_size"] // self.known.ranks)

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch."""
        return self.rows * self.asked["seq_len"]

    @property
    def train(self) -> Mapping[str, Any]:
        return self.asked["train"]

    @property
    def optimizer(self) -> Mapping[str, Any]:
        return self.asked["train"]["optimizer"]

    @property
    def lora(self) -> Mapping[str, Any] | None:
        return self.asked.get("lora")

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return self.known.dtype.itemsize


def know(config: Any, ranks: int) -> Known:
    """Read what a plan of `config` on `ranks` processes goes by.

    Raises:
        UsageError: a recipe that is not planned. CheckpointError: no such model.
    """
    if config.recipe not in PLANNED:
        raise UsageError(f"`{config.recipe}` is not planned", cause="it trains nothing", fix=" or ".join(PLANNED))
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, tell=False)
    if config.recipe == "pretrain":
        return Known(_pretrained_shape(config), (), 1.0, device, dtype, ranks, _without_shards(config))
    if config.model in PRESETS:
        notes = (f"{config.model} is planned as a preset: no weights of it were looked for",)
        return Known(PRESETS[config.model], (), 1.0, device, dtype, ranks, notes)
    shape = open_model(config.model).config
    lengths, trained, notes = _conversations(config)
    return Known(shape, lengths, trained, device, dtype, ranks, notes)


def work_of(config: Any, known: Known) -> Work:
    """The numbers of one config; cheap, so that changes of it can be tried."""
    asked = config.model_dump()
    full = asked.get("lora") is None
    item, quantize = known.dtype.itemsize, asked.get("quantize")
    ranks, whole = _adapted(known.shape, config.lora) if not full else ({}, set[str]())
    weights = {}
    for name, shape in expected_shapes(known.shape).items():
        trained = full or name in whole
        held = 4.0 if trained else float(item)
        if quantize and not trained and name.startswith("layers.") and len(shape) == 2:
            held = _packed_bytes(quantize, shape[1])
        weights[name] = Weight(shape, held * math.prod(shape), trained, ranks.get(name, 0))
    return Work(known, asked, weights, _texts(known, asked["seq_len"]))


def _pretrained_shape(config: Any) -> ModelConfig:
    found = (config.data / INDEX).exists()
    vocabulary = read_index(config.data)["vocab_size"] if found else PRESETS[config.model.preset].vocab_size
    return resolve_model(config.model, vocabulary)


def _without_shards(config: Any) -> tuple[str, ...]:
    if (config.data / INDEX).exists():
        return ()
    return (f"no shards in {config.data} yet: the vocabulary is taken to be {config.model.preset}'s",)


def _conversations(config: Any) -> tuple[tuple[int, ...], float, tuple[str, ...]]:
    """Lengths of the first conversations, the share of their ids that is trained, and what went wrong."""
    try:
        tokenizer = load_tokenizer(config.model)
        chat = ChatFormat(tokenizer, config.template, date_string=config.date_string, **config.variables)
        rows = []
        for conversation in islice(read_conversations(config.data), _SAMPLE):
            if conversation.text:
                rows.append((size := len(tokenizer.encode(conversation.text)), size))
            else:
                ids, trained = chat.encode(conversation.messages, config.train_on, conversation.tools)
                rows.append((len(ids), sum(trained)))
    except PunaError as error:
        return (), 1.0, (f"each row is taken to be one text, all of it trained: {error.what}",)
    total = sum(size for size, _ in rows)
    return tuple(size for size, _ in rows), sum(trained for _, trained in rows) / max(1, total), ()


def _texts(known: Known, seq_len: int) -> Texts:
    lengths = [min(size, seq_len) for size in known.lengths] or [seq_len]
    padding = _PADDED if known.lengths else 1.0
    total = sum(lengths)
    keys = sum(size * _keys(size * padding) for size in lengths) / total
    kept = sum(size * _keys(size * padding) for size in lengths if size <= KEEP) / total
    return Texts(keys, kept * padding, known.trained)


def _keys(length: float) -> float:
    """Keys that a query of a text meets, on average: up to the end of its block."""
    return length if length <= BLOCK else (length + BLOCK) / 2


def _adapted(shape: ModelConfig, lora: LoraConfig) -> tuple[dict[str, int], set[str]]:
    """(rank of each adapted weight, names of those that are trained whole), by names without weights."""
    model = build_model(shape)
    ranks = {f"{name}.weight": lora.of(name)[0] for name in adapted_layers(model, lora)}
    return ranks, set(whole_parameters(model, lora))


def _packed_bytes(quantize: str, columns: int) -> float:
    """Bytes a number of a quantized weight with so many columns."""
    kind = BASES[quantize]
    if problem := kind.problem(columns):
        raise UsageError(f"quantize: {quantize}: {problem}", fix="quantize=int8, or null")
    rows = torch.linspace(-1, 1, _PACKED_ROWS * columns).view(_PACKED_ROWS, columns)
    return kind.pack(rows).nbytes / rows.numel()
