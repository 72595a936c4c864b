"""A quantized model directory with a certificate: what the rounding did, measured on what was written."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.model_directory import check_folder_name, save_model
from puna.checkpoint.quantized import packed_tensors
from puna.checkpoint.registry import find_model, open_model
from puna.device import choose_device, require_memory
from puna.errors import DataError, UsageError
from puna.eval.parity.material import PROMPTS, TEXT
from puna.eval.parity.observe import Observed, apart, observe, same_answers
from puna.files import as_path, atomic_folder, write_json
from puna.infer.llama import Llama, load
from puna.lineage import lineage
from puna.log import Progress, log
from puna.model.config import count_parameters
from puna.ops.packed_layers import packed_layers
from puna.quant.gptq import gptq
from puna.quant.quantize import pack_layers, planned
from puna.quant.schemes import Kind, scheme

CERTIFICATE = "certificate.json"
_CALIBRATION = 8192  # ids: some ten for each input of a small model, and minutes instead of hours for a large one


def quantize(
    source: str | Path, target: str | Path, name: str, *, group: int | None = None, compact: bool = False,
    text: str = TEXT, prompts: Sequence[str] = PROMPTS, max_tokens: int = 32, calibration: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write `source` quantized into the directory `target`, whole or not at all, and measure what that changed.

    Everything is measured in fp32 on the model read back from the new directory, with its packed weights.

    Args:
        name: of the scheme, a row of SCHEMES.
        group: weights that share a scale, instead of the scheme's own number.
        compact: the embedding in 8 bits, too (see `scheme`).
        text: for the perplexities.
        prompts: for the answers and logits.
        max_tokens: most ids of an answer.
        calibration: a text that decides where to round (see `gptq`); by default every weight to its nearest.

    Returns:
        The certificate, which lies in `target` as certificate.json as well.

    Raises:
        UsageError: `target` exists or has the name of a file, or a scheme that the model cannot have.
        CheckpointError: no model. ResourceError: memory does not hold its weights in fp32.
    """
    target, to = as_path(target), scheme(name, group, compact)
    check_folder_name(target)
    if target.exists():
        raise UsageError("exists already", where=target, fix="another folder, or remove that one first")
    stored = open_model(found := find_model(source))
    parameters = count_parameters(stored.config)  # of a tied head once
    require_memory(4 * parameters, choose_device())
    if stored.quantized:
        log.warning("weights: %s, rounded anew: all that follows is measured against those, not against what they "
                    "were made from", stored.storage)  # fmt: skip
    before = load(found, "fp32")
    plan = planned(before.model, to)
    sizes = {"before": sum(file.stat().st_size for file in stored.files), "bf16": 2 * parameters}
    first = observe(before, prompts, max_tokens, text)
    _round(before, plan, calibration)
    told = {
        "scheme": name, "group": to.linears.group, "compact": compact, "calibrated": bool(calibration),
        "storage": stored.storage, "torch": torch.__version__, "max_tokens": max_tokens,
        "sha256": {"text": _hash(text), "calibration": _hash(calibration), "prompts": _hash(json.dumps(list(prompts)))},
    }  # fmt: skip
    made_from = lineage("quantize", [found], **told)
    with atomic_folder(target) as folder:
        parts = packed_tensors(before.model, torch.bfloat16)
        save_model(folder, before.model, before.tokenizer, "bf16", made_from, before.stop_ids, parts)
        del before, parts
        after = load(folder, "fp32", packed=True)
        second = observe(after, prompts, max_tokens, text, rows=first.rows)
        certificate = {**told, **_sizes(after, sizes), **differences(first, second, len(text.encode()))}
        write_json(folder / CERTIFICATE, {"format": 1, "source": str(source), **certificate})
    return certificate


def _round(llama: Llama, plan: Mapping[str, Kind], calibration: str) -> None:
    """Every layer of `plan`: those of the blocks by a text, if there is one, and all others to the nearest."""
    with Progress("quantizing", len(plan)) as bar:

        def told_of(layer: str) -> None:
            bar.update(bar.done + 1, layer)

        blocks = {name: kind for name, kind in plan.items() if calibration and name.startswith("layers.")}
        if blocks:
            gptq(llama.model, blocks, _windows(llama, calibration), told_of)
        pack_layers(llama.model, {name: kind for name, kind in plan.items() if name not in blocks}, told_of)


def _windows(llama: Llama, text: str) -> Tensor:
    """(N, T) ids of a text: as many windows as 8,192 ids are."""
    length = min(512, llama.model.config.max_seq_len)
    ids = llama.encode(text)[: _CALIBRATION // length * length]
    if len(ids) < length:
        raise DataError(f"the calibration text has {len(ids)} ids", fix=f"a longer one: {_CALIBRATION:,} are used")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def table(certificate: dict[str, Any]) -> dict[str, str]:
    """A certificate as lines for people."""
    scale = f"a scale for each {certificate['group'] or 'row'}" + (" of a row" if certificate["group"] else "")
    perplexity, logits, size = certificate["perplexity"], certificate["logits"], certificate["bytes"]
    share = perplexity["after"] / perplexity["before"] - 1
    return {
        "scheme": f"{certificate['scheme']}, {scale}" + ", calibrated" * certificate["calibrated"],
        "source": certificate["storage"],
        "size": f"{size['after'] / 1e6:,.1f} MB of {size['before'] / 1e6:,.1f} ({size['bf16'] / 1e6:,.1f} in bf16)",
        "bits": f"{certificate['bits']:.2f} a weight where packed",
        "perplexity": f"{perplexity['before']:.3f} -> {perplexity['after']:.3f} ({share:+.2%}) on "
        f"{certificate['text_bytes']:,} bytes of text",
        "logits": f"apart by {logits['mean']:.3g} in the mean, {logits['max']:.3g} at most; "
        f"KL {certificate['kl']['mean']:.3g} nats a position",
        "greedy": f"the same next id in {certificate['agreement']:.1%} of positions; "
        f"{certificate['same_answers']} of {certificate['answers']} answers the same to the end",
    }


def _hash(text: str) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def _sizes(after: Llama, sizes: dict[str, int]) -> dict[str, Any]:
    written = sum(file.stat().st_size for file in after.path.glob("*.safetensors"))
    return {"bits": packed_bits(after), "bytes": {**sizes, "after": written}}


def packed_bits(llama: Llama) -> float:
    """Bits a weight of the packed matrices with their scales, in memory; of a tied one once."""
    packed = {layer.codes.data_ptr(): layer.packed for layer in packed_layers(llama.model).values()}.values()
    return sum(8 * weight.nbytes for weight in packed) / sum(math.prod(weight.shape) for weight in packed)


def differences(first: Observed, second: Observed, text_bytes: int) -> dict[str, Any]:
    """What a certificate says of two models that were shown the same rows and a text of so many bytes."""
    found = apart(first, second)
    same = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(first.logits, second.logits, strict=True)]
    return {
        "dtype": "fp32",
        "text_bytes": text_bytes,
        "perplexity": {"before": first.perplexity, "after": second.perplexity},
        "bits_per_byte": {"before": first.bits_per_byte, "after": second.bits_per_byte},
        "logits": {"mean": found.mean_logit, "max": found.max_logit},
        "kl": {"mean": max(0.0, found.mean_kl), "max": max(0.0, found.max_kl)},
        "agreement": torch.cat(same).mean().item(),
        "same_answers": sum(same_answers(first, second)),
        "answers": len(first.answers),
    }
