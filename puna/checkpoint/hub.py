"""Models of the Hugging Face hub: found in its cache on this machine, fetched into it when asked. Data sets: found.

Looking up never touches the network, and only `download` imports the library that does.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from puna.errors import CheckpointError, UsageError
from puna.files import make_folder, require_space, write_text
from puna.log import log

WANTED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "puna.json", "LICENSE*",
)  # fmt: skip
"""What `download` fetches: no pickles, no second copy of the weights in another format, nothing of a sub-folder."""
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")


class HubName(NamedTuple):
    """`org/name@rev`."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


class Cached(NamedTuple):
    """A model in the cache, whole or not."""

    name: HubName
    folder: Path


def hub_name(text: str) -> HubName | None:
    """The parts of `org/name` or `org/name@rev`; None for what cannot be one, such as a path that climbs."""
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in text or "//" in text:
        return None
    return HubName(f"{match[1]}/{match[2]}", match[3] or "main")


def cache_folder() -> Path:
    """Where the hub's own tools keep models: $HF_HUB_CACHE, or `hub` in $HF_HOME or the user's cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    place = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(place)).expanduser()


def find_cached(name: HubName, kind: Literal["models", "datasets"] = "models") -> Path | None:
    """The snapshot of a branch, a tag or a whole commit hash, if the cache has it."""
    home = _home(name, kind)
    try:
        commit = (home / "refs" / name.revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = name.revision
    folder = home / "snapshots" / commit
    return folder if re.fullmatch(r"[0-9a-zA-Z._-]+", commit) and commit.strip(".") and folder.is_dir() else None


def cached_models() -> Iterator[Cached]:
    """Every branch and tag in the cache that leads to a config.json."""
    for refs in sorted(cache_folder().glob("models--*--*/refs")):
        for path in sorted(p for p in refs.rglob("*") if p.is_file()):
            org, name = refs.parent.name.split("--")[1:][:2]
            found = hub_name(f"{org}/{name}@{path.relative_to(refs).as_posix()}")
            folder = find_cached(found) if found else None
            if found and folder and (folder / "config.json").exists():
                yield Cached(found, folder)


def download(name: HubName, patterns: Sequence[str] = ()) -> Path:
    """Fetch a model into the cache and return its snapshot; what is there already is checked, not fetched again.

    Args:
        patterns: files to fetch instead of `WANTED`: names as the hub lists them, with `*` and `?`.

    Raises:
        UsageError: HF_HUB_OFFLINE is set, or no file matches. CheckpointError: it cannot be had, or is not what the
        hub says it is. ResourceError: the disk is too small.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UsageError("HF_HUB_OFFLINE is set", where=name, fix=f"HF_HUB_OFFLINE=0 puna download {name}")
    folder, files = _listed(name, patterns)
    make_folder(cache_folder())
    absent = [f for f in files if not (folder / f.rfilename).exists()]
    size, missing = (sum(f.size or 0 for f in some) / 1e9 for some in (files, absent))
    log.info("fetching %s: %d files, %.2f GB, of which %.2f GB are missing", name, len(files), size, missing)
    require_space(cache_folder(), int(missing * 1e9))
    for file in files:
        _fetch(name, folder, file)
    # Written last: a download that broke off is not found under its name.
    reference = _home(name) / "refs" / name.revision
    make_folder(reference.parent)
    write_text(reference, folder.name)
    return folder


def _listed(name: HubName, patterns: Sequence[str]) -> tuple[Path, list[Any]]:
    """The snapshot's folder, which need not be there yet, and the files to fetch into it."""
    from huggingface_hub import HfApi

    with _explained(name):
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise CheckpointError(f"the hub calls {name.revision!r} commit {commit[:100]!r}", where=name, cause="hostile")
    return _home(name) / "snapshots" / commit, _chosen(name, info.siblings or [], patterns)


def _fetch(name: HubName, folder: Path, file: Any) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if not os.isatty(2):
        disable_progress_bars()
    with _explained(name):
        hf_hub_download(name.repo, file.rfilename, revision=folder.name, cache_dir=cache_folder())
    _check_content(name, folder / file.rfilename, file)


def _chosen(name: HubName, listed: Sequence[Any], patterns: Sequence[str]) -> list[Any]:
    for file in listed:
        parts = file.rfilename.split("/")
        if not all(re.fullmatch(r"[^\\:\x00-\x1f]{1,255}", part) and part.strip(". ") for part in parts):
            raise CheckpointError(f"the hub lists a file called {file.rfilename[:100]!r}", where=name, cause="hostile")
    chosen = [f for f in listed if any(fnmatchcase(f.rfilename, p) for p in patterns or WANTED)]
    if not patterns:
        chosen = [f for f in chosen if "/" not in f.rfilename]
    if not chosen or not (patterns or any(f.rfilename.endswith(".safetensors") for f in chosen)):
        weights = [f.rfilename for f in listed if f.rfilename.endswith((".gguf", ".bin", ".pth", ".safetensors"))]
        raise UsageError(
            "no file matches" if patterns else "no weights in safetensors", where=name,
            cause=f"it holds {', '.join(weights[:12]) or 'no weights'}", fix=f"puna download {name} --files 'NAME'",
        )  # fmt: skip
    return chosen


def _check_content(name: HubName, path: Path, file: Any) -> None:
    """Compare a file with the hash the hub gives: SHA-256 of a large file, git's blob hash of a small one."""
    size = path.stat().st_size
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != (file.lfs.sha256 if file.lfs else file.blob_id):
        path.resolve().unlink()  # so that the next download fetches it anew
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.rfilename} is not the file the hub lists", where=name, cause="damaged on the way, or by a proxy",
            fix=f"puna download {name}",
        )  # fmt: skip


@contextlib.contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn what goes wrong in the hub's library into an error that says what to do."""
    from huggingface_hub import errors

    page, again = f"https://huggingface.co/{name.repo}", f"puna download {name}"
    try:
        yield
    except Exception as error:  # the library's own, its HTTP client's, the system's: all mean that nothing came
        if isinstance(error, errors.GatedRepoError):
            what, cause = "gated: its licence has to be accepted first", f"accept it at {page}, make a token there"
            again = f"HF_TOKEN=... {again}"
        elif isinstance(error, errors.RevisionNotFoundError):
            what, cause, again = f"it has no revision {name.revision!r}", "a typing error", f"see {page}/tree/main"
        elif getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404):
            what, cause = "no such model on the hub, or a private one", "a typing error, or no token"
            again = f"HF_TOKEN=... {again}"
        else:
            what = f"cannot be fetched: {' '.join(str(error).split())[:200] or type(error).__name__}"
            cause = "no network, or a server that fails; files that came whole are kept"
        raise CheckpointError(what, where=name, cause=cause, fix=again) from error


def _home(name: HubName, kind: str = "models") -> Path:
    return cache_folder() / f"{kind}--{name.repo.replace('/', '--')}"
