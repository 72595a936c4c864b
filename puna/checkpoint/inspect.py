"""What lies at a path, told from headers and small files: no weight is read."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from puna.checkpoint.adapter import CONFIG as ADAPTER
from puna.checkpoint.adapter import WEIGHTS, adapter_config, base_of
from puna.checkpoint.gguf.file import is_gguf, open_gguf
from puna.checkpoint.gguf.model import gguf_config
from puna.checkpoint.names import quantization_of
from puna.checkpoint.quantized import kinds
from puna.checkpoint.registered import REGISTERED
from puna.checkpoint.registry import find_model, holds_model, load_tokenizer, locate, open_model
from puna.checkpoint.safetensors_file import read_header
from puna.checkpoint.stored import Stored, rows_missing
from puna.checkpoint.weight_files import inside, read_json
from puna.errors import CheckpointError, DataError, PunaError
from puna.files import MANIFEST, as_path, read_manifest
from puna.lineage import fingerprint, parents_of, read_lineage
from puna.model.config import ModelConfig, count_parameters
from puna.model.presets import PRESETS
from puna.tokenizer.chat.format import BUNDLED, bundled
from puna.tokenizer.formats import is_tokenizer
from puna.tokenizer.tokenizer import Tokenizer

_ANCESTORS = 50  # that are told: a stranger's puna.json can name any number of folders, each of which is looked at
_IN_WORDS = {
    "shape": "config", "rope": "config", "norm eps": "config", "context": "config", "weights": "tensors",
    "files": "bytes", "tokenizer": "ids", "control": "ids", "stops": "ids",
}  # fmt: skip
"""What is said for people, and the value that tells a program the same."""
_NEAR = 4  # values by which a model may differ from a preset and still be likened to it
_TEMPLATE_LINES, _TEMPLATE_WIDTH = 3, 64


def inspect(name: str | Path) -> dict[str, Any]:
    """A model of any format, an adapter, a tokenizer, or what a run made of them.

    Raises:
        CheckpointError: nothing there, or damaged. DataError: token shards.
    """
    place = as_path(name)
    if (place / "index.json").exists():
        raise DataError("token shards, not a model", where=place, fix=f"puna data stats {place}")
    if (is_tokenizer(place) and not holds_model(place)) or (is_gguf(place) and not open_gguf(place).names()):
        return {"path": str(place), "format": "tokenizer", **_tokenizer(load_tokenizer(place), []), **_around(place)}
    found = find_model(name)
    run = {"run": f"{place}; puna runs show {place}"} if (place / "resolved.yaml").exists() else {}
    if (found / ADAPTER).exists():
        return {"path": str(found), **run, **_adapter(found), **_around(found)}
    stored = open_model(found)
    return {"path": str(found), **run, **_model(stored), **_around(found, stored.lineage)}


def as_data(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `inspect` found for programs: without the sentences that say what a value says, too."""
    return {name: value for name, value in found.items() if _IN_WORDS.get(name) not in found}


def in_words(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `inspect` found for people: without values that a sentence tells."""
    return {name: value for name, value in found.items() if name not in {*_IN_WORDS.values(), "parents"}}


def nearest_presets(config: ModelConfig) -> tuple[list[str], list[str]]:
    """The presets that share most values with `config`, and what differs: `vocab_size 32,001 (32,000)`."""
    ours = config.model_dump()
    different = {n: [k for k, v in preset.model_dump().items() if ours[k] != v] for n, preset in PRESETS.items()}
    fewest = min(map(len, different.values()))
    names = [name for name, keys in different.items() if len(keys) == fewest]
    preset = PRESETS[names[0]].model_dump()
    names = [name for name in names if PRESETS[name] == PRESETS[names[0]]]
    return names, [f"{key} {_plain(ours[key])} ({_plain(preset[key])})" for key in different[names[0]]]


def lineage_chain(made_from: Mapping[str, Any]) -> Iterator[str]:
    """One line for each ancestor, parents before theirs; whether it is still what it was, if it is on this disk.

    What several were made from is a line for each of them, and followed once: a ring ends.
    """
    waiting = [(0, parent) for parent in reversed(parents_of(made_from))]
    followed = set[Path]()
    for _ in range(_ANCESTORS):
        if not waiting:
            return
        depth, parent = waiting.pop()
        place, now = _found(parent)
        theirs = read_lineage(place) if place else {}
        by = f" by {theirs['recipe']}" if isinstance(theirs.get("recipe"), str) else ""
        yield f"{'  ' * depth}<- {parent['path']}{by}, {now}"
        if place and place not in followed:
            followed.add(place)
            waiting += [(depth + 1, other) for other in reversed(parents_of(theirs))]
    if waiting:
        yield "and more"


def _found(parent: Mapping[str, Any]) -> tuple[Path | None, str]:
    """Where a parent lies, and whether it is still what it was."""
    try:
        named, known = Path(parent["path"]), parent.get("fingerprint")
        if not named.exists():
            named = locate(parent["path"]) or named
        place = next((p for p in (named, named / "final") if _made(p)), named)
        if not place.exists():
            return None, "not on this disk"
        now = "not hashed" if not known else "unchanged" if known == fingerprint(place) else "changed since"
        return place.resolve(), now
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, somebody else's folder
        return None, f"cannot be looked at: {getattr(error, 'strerror', error)}"


def _model(stored: Stored) -> dict[str, Any]:
    config = stored.config
    head = "tied head" if config.tie_embeddings else "own head"
    scaling = config.rope_scaling
    scaled = f", scaled by {scaling.factor:g} beyond {scaling.original_max_seq_len:,}" if scaling else ", not scaled"
    told: dict[str, Any] = {
        "format": stored.format,
        "architecture": _architecture(config),
        "parameters": count_parameters(config),
        "shape": f"{config.n_layers} layers of {config.dim}, {config.n_heads} heads of {config.head_dim} "
        f"({config.n_kv_heads} key/value), feed-forward {config.ffn_dim}, {config.vocab_size:,} ids, {head}",
        "context": config.max_seq_len,
        "rope": f"theta {config.rope_theta:,g}{scaled}",
        "norm eps": config.norm_eps,
        "config": config.model_dump(),
        **_stored(_kinds(stored), [f for f in stored.files if f.exists()]),
    }
    if stored.format == "hf":
        file = stored.path / "config.json"
        if section := quantization_of(read_json(file), file):
            told["quantized"] = kinds(section, file)
    if problems := stored.problems():
        told["does not fit its config"] = problems[:10]
    try:
        tokenizer = stored.read_tokenizer()
        told |= _tokenizer(tokenizer, stored.stop_ids)
    except PunaError as error:  # weights alone are worth a look, too
        return {**told, "tokenizer": f"none: {error.what}"}
    if wrong := rows_missing(tokenizer, config):
        told["tokenizer does not fit"] = wrong[0]
    return told


def _architecture(config: ModelConfig) -> str:
    names, other = nearest_presets(config)
    if len(other) > _NEAR:
        return _registered(config) or "a Llama of its own: no preset is near"
    return f"nearest to {names[0]}, but {', '.join(other)}" if other else " / ".join(names)


def _registered(config: ModelConfig) -> str | None:
    """The registered model on this disk that has this architecture."""
    places = {name: place for name in REGISTERED if (place := locate(name)) and place.exists()}
    with suppress(CheckpointError):  # its damage is not this model's
        return next((name for name, place in places.items() if gguf_config(open_gguf(place)) == config), None)


def _adapter(folder: Path) -> dict[str, Any]:
    config = adapter_config(folder)
    kind = "rs" * config.rslora + ("DoRA" if config.dora else "LoRA")
    patterns = {"ranks": config.rank_pattern, "alphas": config.alpha_pattern}
    told = {
        "format": "adapter",
        "adapter of": base_of(folder),
        "kind": f"{kind}, rank {config.rank}, alpha {config.alpha:g}",
        **{f"other {name}": dict(pattern) for name, pattern in patterns.items() if pattern},
        "targets": config.targets if isinstance(config.targets, str) else ", ".join(config.targets),
        **_adapter_weights(folder),
    }
    brought = (folder / "tokenizer.json").exists()
    return {**told, **(_tokenizer(Tokenizer(folder), []) if brought else {"tokenizer": "its base's"})}


def _adapter_weights(folder: Path) -> dict[str, Any]:
    try:
        entries = read_header(path := inside(folder, WEIGHTS)).entries.values()
    except CheckpointError as error:
        return {"weights": f"cannot be read: {error.what}"}
    kinds = Counter(entry.dtype for entry in entries)
    return {"parameters": sum(math.prod(entry.shape) for entry in entries), **_stored(kinds, [path])}


def _tokenizer(tokenizer: Tokenizer, more_stops: Any) -> dict[str, Any]:
    control = tokenizer.special_tokens
    shown = list(control.items())[:8]
    more = f", and {len(control) - len(shown)} more" if len(control) > len(shown) else ""
    stops = dict.fromkeys([*tokenizer.stop_ids, *more_stops])
    named = {key: tokenizer.named_id(f"{key.lower()}_token") for key in ("BOS", "EOS")}
    ends = (f"{key} {id} {tokenizer.token(id)}" if id is not None else f"no {key}" for key, id in named.items())
    return {
        "tokenizer": f"{tokenizer.vocab_size:,} ids, {', '.join(ends)}, {tokenizer.fingerprint[:19]}",
        "control": ", ".join(f"{token} {i}" for token, i in shown) + more,
        "stops": ", ".join(f"{i} {tokenizer.token(i)}" for i in stops),
        "ids": {"count": tokenizer.vocab_size, **named, "stops": list(stops), "control": control},
        **_template(tokenizer.files.get("chat_template.jinja")),
    }


def _template(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        return {"template": "none: it continues text"}
    text = raw.decode("utf-8", "replace")
    name = next((name for name in BUNDLED if bundled(name).strip() == text.strip()), "its own")
    lines = [line.strip()[:_TEMPLATE_WIDTH] for line in text.splitlines() if line.strip()]
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()[:12]
    return {"template": [f"{name}, {len(lines)} lines, {digest}", *lines[:_TEMPLATE_LINES]]}


def _around(found: Path, lineage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Lineage, which a GGUF carries inside, and the state of the manifest, which a single file does not have."""
    made = dict(lineage or read_lineage(found))
    told: dict[str, Any] = {}
    if made:
        code = f", code {str(made['code'])[:12]}" if made.get("code") else ""
        told["made by"] = f"{made.get('recipe') or made.get('verb') or 'puna'} of puna {made.get('puna', '?')}{code}"
        told |= {key: str(made[key]) for key in ("data",) if made.get(key)}
        told["lineage"] = list(lineage_chain(made)) or ["nothing: new weights"]
        told["parents"] = parents_of(made)
    try:
        count = len(read_manifest(found))
        told["manifest"] = f"hashes of {count} files, not compared: puna verify {found}"
    except CheckpointError as error:
        told["manifest"] = "none" if not (found / MANIFEST).exists() else error.what
    return told


def _kinds(stored: Stored) -> Counter[str]:
    """How many tensors are stored in each type."""
    if stored.format == "gguf" or " x " in stored.storage:
        pairs = (kind.split(" x ") for kind in stored.storage.split(", "))
        return Counter({name: int(count) for name, count in pairs})
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    kinds = (str(weight.dtype).removeprefix("torch.") for weight in stored.weights.values())
    return Counter(names.get(kind, kind) for kind in kinds)


def _stored(kinds: Counter[str], files: Sequence[Path]) -> dict[str, Any]:
    sizes = {file.name: file.stat().st_size for file in files}
    return {
        "weights": ", ".join(f"{kind} x {count}" for kind, count in kinds.most_common()),
        "files": [f"{name}  {size / 1e6:,.1f} MB" for name, size in sizes.items()],
        "tensors": dict(kinds.most_common()),
        "bytes": sizes,
    }


def _made(place: Path) -> bool:
    return any((place / name).exists() for name in ("puna.json", MANIFEST))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return f"factor {value['factor']:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
