"""The weights of a model directory: one safetensors file, or several with an index that says which tensor is where."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from puna.checkpoint.safetensors_file import STORED, Weight, open_safetensors, write_safetensors
from puna.errors import CheckpointError
from puna.files import write_json

OpenFile = Callable[[Path], dict[str, Weight]]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000  # what others write; a download that breaks off loses at most this
_JSON_BYTES = 2_000_000  # JSON of `[]` grows 25-fold in memory


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a small JSON file of a model.

    Raises:
        CheckpointError: not there, not a mapping, or too large to be one.
    """
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"larger than {_JSON_BYTES // 10**6} MB")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("not a mapping")
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} here", where=path.parent, cause="not a model directory") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: {str(error)[:200]}", where=path) from None
    return tree


def weight_files(folder: Path) -> list[Path]:
    """The files of a model directory that hold weights: safetensors, or what torch.save wrote before them.

    Raises:
        CheckpointError: there are none, an index that names what is not a file of this directory, or two models.
    """
    names = [SINGLE]
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
            raise CheckpointError("has no weight_map of tensors to files", where=folder / INDEX)
        names = sorted(set(places.values()))
        if (folder / SINGLE).exists() and SINGLE not in names:
            raise CheckpointError(
                f"two models: {SINGLE}, which transformers opens, and other weights that {INDEX} names", where=folder,
                cause="one was saved over the other", fix="remove the files of one of them",
            )  # fmt: skip
    elif not (folder / SINGLE).exists():  # an old model: read as data, nothing in it is run
        names = sorted(p.name for p in folder.glob("pytorch_model*.bin")) or names
    return [inside(folder, name) for name in names]


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, if that is a file of this model and of nobody else.

    A link may lead nowhere but into the folder itself; in the Hugging Face cache, where every file of a snapshot is a
    link, also into the `blobs` of the same model or those that all models share.

    Raises:
        CheckpointError: anything that would open another file.
    """
    try:
        home = folder.resolve()
        real = (home / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name[:100]!r} names no file: {error}", where=folder) from None
    model, shared = home.parent.parent, home.parent.parent.parent / "blobs"  # models--org--name/snapshots/commit
    snapshot = home.parent.name == "snapshots" and model.name.startswith("models--")
    own = real.parent == home or (snapshot and (real.parent == model / "blobs" or real.parent.parent == shared))
    if Path(name).name != name or "\\" in name or not own:
        raise CheckpointError(
            f"{name[:100]!r} leads outside the folder", where=folder, cause="a hostile index or link",
            fix="a copy of the file in the folder, if you trust it",
        )  # fmt: skip
    return folder / name


def open_weights(files: list[Path], open_bin: OpenFile | None = None, integers: bool = False) -> dict[str, Weight]:
    """The tensors of all files by their disk names.

    Args:
        open_bin: reads what torch.save wrote.
        integers: allow those of quantized weights.

    Raises:
        CheckpointError: a damaged file, or a tensor that two of them hold.
    """
    weights: dict[str, Weight] = {}
    for file in files:
        found = open_bin(file) if open_bin and file.suffix == ".bin" else open_safetensors(file, integers)
        if twice := sorted(weights.keys() & found.keys()):
            raise CheckpointError(f"{twice[0]!r} is in another file too", where=file)
        weights |= found
    return weights


def storage(weights: Mapping[str, Weight]) -> str:
    """What tensors are stored in: `BF16`, or `INT4 x 210, F32 x 61`."""
    counts = Counter(weight.kind or STORED[weight.dtype] for weight in weights.values()).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{name} x {n}" for name, n in counts)


def write_weights(
    folder: Path, weights: Mapping[str, Weight], progress: Callable[[str], None], shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write tensors by their disk names, in their order, one file or as many as `shard_bytes` asks for."""
    shards = _divided(weights, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], progress)
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, progress)
        where |= dict.fromkeys(shard, name)
    total = sum(w.nbytes for w in weights.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _divided(weights: Mapping[str, Weight], shard_bytes: int) -> list[dict[str, Weight]]:
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    return shards
