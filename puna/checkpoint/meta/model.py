"""Meta's checkpoints: params.json, consolidated.00.pth and further shards, tokenizer.model."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.meta.layout import EMBEDDING, HEAD, cut_axis, from_meta_name, is_key_or_value, to_meta_name
from puna.checkpoint.meta.params import read_params
from puna.checkpoint.rope_layout import is_rotated, to_halves
from puna.checkpoint.stored import Stored, Weight
from puna.checkpoint.torch_file import open_torch_file
from puna.checkpoint.weight_files import read_json, storage
from puna.errors import CheckpointError
from puna.lineage import LINEAGE, read_lineage
from puna.model.config import ModelConfig
from puna.tokenizer.formats import tokenizer_from

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_ROWS_COMPARED = 64  # at a time: two different matrices differ in the first ones
_QUERIES, _KEYS, _VALUES = (f"layers.0.self_attn.{x}_proj.weight" for x in "qkv")

Shards = Sequence[Mapping[str, Weight]]


def open_meta(folder: Path) -> Stored:
    """A folder as Meta publishes it, of any number of shards; a tensor's parts are joined when it is read.

    What params.json does not tell is told from shapes. Weights are compared where these do not tell either: the first
    rows of a head with the embedding's, of key heads with each other; all of them where they are the same.

    Raises:
        CheckpointError: damaged or incomplete, quantized, or shards that do not fit each other.
    """
    params, files = read_json(folder / PARAMS), _shard_files(folder)
    shards = [{from_meta_name(n): w for n, w in open_torch_file(file).items() if n != "rope.freqs"} for file in files]
    _check_shards(shards, files)
    rows, columns = shards[0][EMBEDDING].shape
    model = params.get("model")
    by_rows = columns == (model if isinstance(model, dict) else params).get("dim")  # Llama 3's cut; before, by columns
    config = read_params(params, rows * len(files) if by_rows else rows, folder / PARAMS)
    _check_layers(shards[0], config.n_layers, folder)
    _check_complete(shards, config, folder)
    repeat = _repeats(shards, config)
    heads = _heads(shards, config) // repeat or config.n_kv_heads
    config = config.model_copy(update={"n_kv_heads": heads, "tie_embeddings": _tied(shards, by_rows)})
    lineage = read_lineage(folder)
    context, stops = lineage.get("max_seq_len", config.max_seq_len), lineage.get("stop_ids", [])
    if type(context) is not int or not 0 < context < 1 << 31:
        raise CheckpointError(f"max_seq_len is {context!r:.80}", where=folder / LINEAGE)
    if not isinstance(stops, list) or not all(type(id) is int and 0 <= id < config.vocab_size for id in stops):
        raise CheckpointError(f"stop_ids are {stops!r:.80}", where=folder / LINEAGE)
    config = config.model_copy(update={"max_seq_len": context})
    joined = partial(_joined, shards=shards, config=config, by_rows=by_rows, repeat=repeat)
    weights = {name: joined(name) for name in shards[0] if not (name == HEAD and config.tie_embeddings)}
    april = config.rope_scaling is None  # whose control tokens have fewer names
    tokenizer = partial(tokenizer_from, folder, "llama3" if april else "llama3.1")
    return Stored(folder, "meta", config, weights, storage(weights), files, tokenizer, stops, lineage)


def _shard_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, .01.pth, ...: all of them."""
    files = sorted(file for file in folder.iterdir() if _SHARD.fullmatch(file.name))
    numbers = [int(file.name[-6:-4]) for file in files]
    if not files or numbers != list(range(len(files))):
        missing = next(i for i in range(len(files) + 1) if i not in numbers)
        raise CheckpointError(f"no consolidated.{missing:02}.pth here", where=folder, cause="an incomplete copy")
    return files


def _check_shards(shards: Shards, files: Sequence[Path]) -> None:
    shapes = [{name: weight.shape for name, weight in shard.items()} for shard in shards]
    if odd := [file.name for file, shape in zip(files, shapes, strict=True) if shape != shapes[0]]:
        raise CheckpointError(
            f"the tensors of {', '.join(odd)} differ from those of {files[0].name} in name or shape",
            where=files[0].parent, cause="an incomplete copy, or shards of two models",
        )  # fmt: skip
    matrices = {EMBEDDING, *({HEAD, _KEYS, _VALUES} & shapes[0].keys())}
    if odd := sorted(name for name in matrices if len(shapes[0].get(name, ())) != 2):
        raise CheckpointError(f"no {to_meta_name(odd[0])} that is a matrix", where=files[0], cause="not Meta's Llama")


def _check_layers(shard: Mapping[str, Weight], n_layers: int, folder: Path) -> None:
    found = len({name.split(".")[1] for name in shard if name.startswith("layers.")})
    if found != n_layers:  # before a model of so many layers is built to compare it with
        raise CheckpointError(
            f"params.json says {n_layers} layers, the files hold {found}", where=folder, cause="parts of two models"
        )


def _check_complete(shards: Shards, config: ModelConfig, folder: Path) -> None:
    """The last shards leave no gap in the numbers when they are missing, but their heads do."""
    heads, here = config.n_heads * config.head_dim, shards[0][_QUERIES].shape[0] if _QUERIES in shards[0] else 0
    if here and heads % here == 0 and (parts := heads // here) > len(shards):
        raise CheckpointError(
            f"shard {len(shards)} of {parts} is missing: no consolidated.{len(shards):02}.pth here", where=folder,
            cause="an incomplete copy",
        )  # fmt: skip


def _heads(shards: Shards, config: ModelConfig) -> int:
    """Key heads in the files, repeated ones counted."""
    return len(shards) * shards[0][_KEYS].shape[0] // config.head_dim if _KEYS in shards[0] else 0


def _repeats(shards: Shards, config: ModelConfig) -> int:
    """How many neighbouring shards hold the same key/value head: 2 in 405B's 16 shards, whose params.json counts 16."""
    stored = _heads(shards, config)
    if stored > config.n_kv_heads and stored % config.n_kv_heads == 0:
        return stored // config.n_kv_heads
    if stored != len(shards) or _VALUES not in shards[0]:
        return 1
    same = [all(_equal(a[name], b[name]) for name in (_KEYS, _VALUES)) for a, b in pairwise(shards)]
    times = next((i + 1 for i, equal in enumerate(same) if not equal), len(shards))
    return times if same == [(i + 1) % times != 0 for i in range(len(same))] else 1


def _equal(a: Weight, b: Weight) -> bool:
    """Whether two matrices are the same, of which those that differ are not read through."""
    one, other = a.read(), b.read()
    return torch.equal(one[:1], other[:1]) and torch.equal(one, other)


def _tied(shards: Shards, by_rows: bool) -> bool:
    """Whether the head is the embedding: absent, the same record (Llama 3.2), or stored a second time."""
    if HEAD not in shards[0] or (by_rows and all(shard[HEAD] is shard[EMBEDDING] for shard in shards)):
        return True
    embeddings = [shard[EMBEDDING].read() for shard in shards]
    for number, shard in enumerate(shards):
        head = shard[HEAD].read()
        for at in range(0, len(head), _ROWS_COMPARED):
            rows = slice(at, at + _ROWS_COMPARED)
            whole = slice(number * len(head) + at, number * len(head) + min(at + _ROWS_COMPARED, len(head)))
            same = embeddings[number][rows] if by_rows else torch.cat([e[whole] for e in embeddings], 1)
            if not torch.equal(same, head[rows]):
                return False
    return True


def _joined(name: str, shards: Shards, config: ModelConfig, by_rows: bool, repeat: int) -> Weight:
    """A tensor of all shards, with our rows."""
    axis = (0 if by_rows else 1) if name == EMBEDDING else cut_axis(name)
    parts = [shard[name] for shard in shards][:: repeat if is_key_or_value(name) else 1]
    parts = parts[:1] if axis is None else parts
    shape = list(parts[0].shape)
    if axis is not None and axis < len(shape):
        shape[axis] *= len(parts)

    def read() -> Tensor:
        tensors = [part.read() for part in parts]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis or 0)
        return to_halves(whole, config.head_dim) if is_rotated(name) else whole

    return Weight(tuple(shape), parts[0].dtype, read, owned=len(parts) > 1 or is_rotated(name))
