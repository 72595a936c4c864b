"""Is the forward pass a Llama, whichever way it is asked? Differences are shares of the largest logit."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from puna.checkpoint.adapter import CONFIG as ADAPTER
from puna.checkpoint.adapter import base_of, quantized_base_of
from puna.checkpoint.names import to_disk_name
from puna.checkpoint.registry import find_model, open_model
from puna.checkpoint.rounded import rounded
from puna.eval.doctor import written_out
from puna.eval.doctor.case import Case
from puna.eval.doctor.data_checks import Parts
from puna.infer.generate import generate
from puna.model.cache import KVCache
from puna.model.mode import evaluating
from puna.ops.packed import dequantize


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value; infinite where one is not finite."""
    largest = theirs.abs().max().item()
    difference = (ours.to(theirs.dtype) - theirs).abs().max().item()
    return difference / max(largest, 1e-30) if math.isfinite(difference) and math.isfinite(largest) else math.inf


def gradients_apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest relative distance of any parameter's gradient; missing ones are infinitely far."""
    if set(ours) != set(theirs):
        return math.inf
    norms = {name: gradient.norm().item() for name, gradient in theirs.items()}
    floor = 1e-3 * max(norms.values())  # a gradient of nearly nothing is nearly all rounding
    found = [(ours[n] - theirs[n]).norm().item() / max(norms[n], floor, 1e-30) for n in theirs]
    return max(found) if all(map(math.isfinite, found)) else math.inf


@torch.no_grad()
def disk(case: Case) -> Parts:
    """The logits against a Llama written out from the files: config keys, defaults, names, head order, RoPE."""
    path = case.source.path
    adapter = path if (path / ADAPTER).exists() else None
    base = find_model(base_of(path)) if adapter else path
    values, weights, interleaved = written_out.read(base, next(case.model.parameters()).dtype, case.device)
    if adapter and (kind := quantized_base_of(adapter)):  # what is examined is the model, not the rounding
        packed = {n: w.packed for n, w in rounded(open_model(base), kind).weights.items() if w.packed is not None}
        some = next(iter(weights.values()))
        weights = {**weights, **{to_disk_name(n): dequantize(read()).to(some) for n, read in packed.items()}}
    weights = written_out.add_adapter(weights, adapter) if adapter else weights
    ids = case.long[0].tolist()
    return {"logits": apart(case.model.eval()(case.long)[0], written_out.logits(values, weights, ids, interleaved))}


@torch.no_grad()
def causality(case: Case) -> Parts:
    """Other ids at the end must change nothing before them, and something at the end."""
    length = case.long.shape[1]
    cut = length * 2 // 3
    other = case.long.clone()
    other[:, cut:] = (other[:, cut:] + 1) % case.model.config.vocab_size
    with evaluating(case.model):
        before, after = case.model(case.long), case.model(other)
    return {"earlier logits": apart(after[:, :cut], before[:, :cut])}


@torch.no_grad()
def positions(case: Case) -> Parts:
    """The same ids further on, beyond the original context where RoPE is scaled: only distances may count."""
    tokens = case.long[:, : min(64, case.model.config.max_seq_len // 2)]
    places = torch.arange(tokens.shape[1], device=case.device)[None]
    with evaluating(case.model):
        return {
            f"from position {shift(case)}": apart(
                case.model(tokens, positions=places + shift(case)), case.model(tokens, positions=places)
            )
        }


def shift(case: Case) -> int:
    """How far `positions` moves a text."""
    config = case.model.config
    scaling = config.rope_scaling
    reach = max(512, 2 * scaling.original_max_seq_len if scaling else 0)
    return min(reach, config.max_seq_len - config.max_seq_len // 2)


@torch.no_grad()
def batch(case: Case) -> Parts:
    """Rows of unequal length side by side, padded, against each alone."""
    rows = [torch.tensor(row.ids, device=case.device) for row in case.windows[:4]]
    rows[0] = rows[0][: max(2, len(rows[0]) // 3)]
    with evaluating(case.model):
        together = case.model(pad_sequence(rows, batch_first=True, padding_value=case.tokenizer.eos_id))
        worst = max(apart(together[i, : len(r)], case.model(r[None])[0]) for i, r in enumerate(rows))
    return {"logits": worst}


@torch.no_grad()
def cache(case: Case) -> Parts:
    """Through the cache in pieces of many ids, single ones and a rest, against one forward of all."""
    tokens = case.long[:, :112]
    length = tokens.shape[1]
    sizes = [length // 3, *[1] * (length // 6), 5]
    sizes.append(length - sum(sizes))
    store = KVCache(case.model.config, 1, length, case.model.compute_dtype, case.device)
    pieces, start = [], 0
    with evaluating(case.model):
        for size in (s for s in sizes if s > 0):
            places = torch.arange(start, start + size, device=case.device)[None]
            pieces.append(case.model(tokens[:, start : start + size], positions=places, cache=store))
            start += size
        return {"logits": apart(torch.cat(pieces, dim=1), case.model(tokens[:, :start]))}


def generation(case: Case) -> Parts:
    """Greedy ids of a ragged batch against full forwards of each row: how far the chosen logit is from the largest."""
    room = case.model.config.max_seq_len - 8
    prompts = [row.ids[:room][: 3 + 11 * n] for n, row in enumerate(case.windows[:3])]
    rows = generate(case.model, prompts, max_tokens=6)
    worst = 0.0
    with torch.no_grad(), evaluating(case.model):
        for prompt, row in zip(prompts, rows, strict=True):
            whole = torch.tensor([[*prompt, *row]], device=case.device)
            logits = case.model(whole[:, :-1])[0, len(prompt) - 1 :].double()
            gap = logits.max(-1).values - logits.gather(1, whole[0, len(prompt) :, None])[:, 0]
            worst = max(worst, (gap.max() / logits.abs().max()).item())
    stops = rows[0][2]
    stopped = generate(case.model, prompts[:1], max_tokens=6, stop_ids=[stops])[0]
    expected = rows[0][: rows[0].index(stops) + 1]
    return {"chosen logit to largest": worst, "went on after a stop id": stopped != expected}
