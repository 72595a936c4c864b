"""The reference generation loop: plain, batched, ragged. Faster engines are tested against it."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from puna.errors import UsageError
from puna.infer.sampling import Filters, Sampling, sample
from puna.model.cache import KVCache
from puna.model.mode import evaluating
from puna.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_tokens` ids, a stop id included as the last one.

    Prompts may have different lengths: they are padded on the right, and a row's padding lies in cache slots that
    its queries never see and its own tokens overwrite. What all of them begin with (a system message, solved
    examples) is computed once.

    Raises:
        UsageError: an empty prompt, or one that does not fit the context with one more token.
    """
    vocab_size = model.config.vocab_size
    if any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
        raise UsageError(f"a prompt has an id outside 0..{vocab_size - 1}", cause="ids of another tokenizer")
    sampling = Sampling(temperature=temperature, top_p=top_p)
    longest = max(map(len, prompts), default=0)
    limit = model.config.max_seq_len
    if not prompts or not all(prompts):
        raise UsageError("an empty prompt has nothing to continue", fix="a prompt of at least one token, BOS will do")
    if longest >= limit:
        raise UsageError(f"the prompt has {longest} tokens, the context holds {limit}", fix="a shorter prompt")
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    filters = Filters.of([sampling] * len(prompts), device)
    cache = KVCache(model.config, len(prompts), min(limit, longest + max_tokens), model.compute_dtype, device)
    with evaluating(model):
        if shared := _shared(prompts):
            once = KVCache(model.config, 1, shared, model.compute_dtype, device)
            model(torch.tensor([list(prompts[0][:shared])], device=device), cache=once, head=False)
            cache.begin_with(once)
        tokens = pad_sequence([torch.tensor(list(p[shared:]), device=device) for p in prompts], batch_first=True)
        positions = torch.arange(shared, longest, device=device).expand_as(tokens)
        last = torch.tensor([len(p) - 1 - shared for p in prompts], device=device)
        out: list[list[int]] = [[] for _ in prompts]
        done = [max_tokens < 1] * len(prompts)
        while not all(done):
            hidden = model(tokens, positions=positions, cache=cache, head=False)
            hidden = hidden[torch.arange(len(prompts), device=device), last.clamp(max=hidden.shape[1] - 1)]
            drawn = [float(torch.rand(1, generator=generator)) for generator in generators]
            chosen = sample(model.lm_head(hidden), filters, drawn)
            for row, token in enumerate(chosen.tolist()):
                if not done[row]:
                    out[row].append(token)
                    if on_token is not None and row == 0:
                        on_token(token)
                    full = len(prompts[row]) + len(out[row]) >= limit
                    done[row] = token in stop_ids or len(out[row]) >= max_tokens or full
            lengths = [len(p) + len(o) - 1 for p, o in zip(prompts, out, strict=True)]
            positions = torch.tensor(lengths, device=device)[:, None]  # (B, 1): finished rows rewrite their last slot
            tokens, last = chosen[:, None], torch.zeros_like(last)
    return out


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with, short of the last id of any: that one's output is wanted."""
    limit = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
    return next((i for i in range(limit) if len({p[i] for p in prompts}) > 1), limit)
