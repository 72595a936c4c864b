"""The Python API's object: a model with its tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from puna.checkpoint.adapter import CONFIG as ADAPTER
from puna.checkpoint.adapter import base_of, embedding_rows, load_adapter, quantized_base_of, tokenizer_of
from puna.checkpoint.model_directory import check_folder_name, save_model
from puna.checkpoint.names import DTYPES
from puna.checkpoint.quantized import packed_tensors
from puna.checkpoint.registry import find_model, open_model
from puna.checkpoint.rounded import rounded
from puna.config import nearest, nearest_path
from puna.device import choose_device, choose_dtype
from puna.errors import CheckpointError, UsageError
from puna.files import as_path, atomic_folder
from puna.infer.cache.paged_cache import PagedCache
from puna.infer.engine import Engine
from puna.infer.forward import Row, forward
from puna.infer.native import FEW_TOKENS
from puna.infer.request import Completion, Event, Request, Result
from puna.infer.sampling import Sampling
from puna.infer.speculation.draft import Draft, SelfDraft, packed_copy
from puna.infer.speculation.speculate import Lookup, Proposer, Speculation
from puna.lineage import lineage
from puna.log import log
from puna.model.config import count_parameters
from puna.model.resize import resize_embeddings
from puna.model.transformer import Transformer
from puna.ops.native.library import native
from puna.ops.packed_layers import packed_layers
from puna.quant.quantize import put
from puna.tokenizer.chat.format import ChatFormat
from puna.tokenizer.chat.messages import Message, Tool
from puna.tokenizer.tokenizer import Tokenizer

_SAMPLING = [each.name for each in fields(Sampling) if each.name not in ("max_tokens", "stop_ids")]


@dataclass(frozen=True, repr=False)
class Llama:
    """A loaded model: `model` is the Transformer, `tokenizer` its tokenizer, `path` where both came from.

    `variables` is what its chat template is told besides messages and tools (see ChatFormat).
    """

    model: Transformer
    tokenizer: Tokenizer
    path: Path
    stop_ids: list[int]
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        weight = self.model.norm.weight
        kept = "packed weights, " if packed_layers(self.model) else ""
        count = count_parameters(self.model.config)
        return f"Llama({str(self.path)!r}: {count:,} parameters, {kept}{str(weight.dtype)[6:]} on {weight.device})"

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a raw prompt, with BOS where the tokenizer's config asks for it."""
        begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        return begin + self.tokenizer.encode(text, special=special)

    @torch.inference_mode()
    def logits(self, ids: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """(B, T) ids -> (B, T, V) fp32 next-token logits; rows have one length."""
        tokens = torch.as_tensor(ids, device=next(self.model.parameters()).device)
        if tokens.ndim != 2:
            raise UsageError(f"ids have shape {tuple(tokens.shape)}", fix="rows of one length: [[1, 2, 3]]")
        if not 0 < tokens.numel() <= FEW_TOKENS or tokens.device.type != "cpu" or native() is None:
            return self.model(tokens).float()
        # A step of the engine, whose kernels read the weights in a third of the time that torch takes for so few rows.
        cache = PagedCache(self.model.config, len(tokens), self.model.compute_dtype, tokens.device)
        hidden = forward(self.model, cache, [Row(ids, 0, [cache.take()]) for ids in tokens.tolist()])
        return self.model.lm_head(hidden).view(*tokens.shape, -1).float()

    @overload
    def generate(self, prompt: str, max_tokens: int = 256, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], max_tokens: int = 256, **sampling: Any) -> list[str]: ...
    def generate(self, prompt: str | list[str], max_tokens: int = 256, **sampling: Any) -> str | list[str]:
        """The continuation of raw text, without the prompt. `sampling`: see `Sampling`; of several samples the first,
        and `complete` has all of them, with log-probabilities and reasons."""
        ids = [self.encode(p) for p in ([prompt] if isinstance(prompt, str) else prompt)]
        results = self.complete(ids, max_tokens, **sampling)
        texts = [self.added_text(before, r.completions[0]) for before, r in zip(ids, results, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def added_text(self, before: Sequence[int], completion: Completion) -> str:
        """What a completion adds to the text of the ids before it, up to a stop string."""
        return self.tokenizer.decode_after(before, completion.token_ids) + self._tail(completion)

    def _tail(self, completion: Completion) -> str:
        """What comes after the last id, up to a stop string that begins inside the next one."""
        text = completion.text
        return "" if text is None else text[len(self.tokenizer.decode(completion.token_ids)) :]

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = 256,
        *,
        tools: Sequence[Tool] | None = None,
        **sampling: Any,
    ) -> str:
        """The assistant's answer to `[{"role": "user", "content": ...}, ...]`, by the model's chat template."""
        [result] = self.complete([self.template.prompt(messages, tools)], max_tokens, **sampling)
        return self.added_text([], result.completions[0])

    def respond(
        self,
        messages: Sequence[Message],
        max_tokens: int = 256,
        *,
        tools: Sequence[Tool] | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """The answer as a message to append: with `tool_calls` where the model calls `tools` (JSON schemas)
        or those that are built in."""
        [result] = self.complete([self.template.prompt(messages, tools)], max_tokens, **sampling)
        [completion] = result.completions
        return self.template.answer(completion.token_ids, tools, self._tail(completion))

    @cached_property
    def template(self) -> ChatFormat:
        """The model's chat template."""
        return ChatFormat(self.tokenizer, **self.variables)

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        on_token: Callable[[int], None] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Ids that continue each prompt of ids, ended by one of `stop_ids`, by length, or before a stop string: the
        text before one that begins inside an id is `complete`'s alone.

        Args:
            on_token: called with each id that continues the first prompt, as it comes.
            sampling: see `Sampling`; prompt i has the seed `seed + i`.
        """
        results = self.complete(prompts, max_tokens, on_token=on_token, **sampling)
        return [list(result.completions[0].token_ids) for result in results]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 256,
        *,
        on_token: Callable[[int], None] | None = None,
        speculate: str | None = None,
        adapter: str | Path | None = None,
        **sampling: Any,
    ) -> list[Result]:
        """`continue_ids` with everything the engine tells: n samples, why they ended, log-probabilities.

        Args:
            speculate: guess ahead by `lookup` in the text so far, by `self` (a copy of the model in 4 bits) or by a
                smaller model with this tokenizer: the same texts, sooner where guessing pays.
            adapter: a LoRA directory or a run that made one, for these prompts; it stays loaded until
                `engine.remove_adapter`.
        """
        for key in sampling:
            if key not in _SAMPLING:
                fix = ", ".join(("max_tokens", "speculate", "adapter", *_SAMPLING))
                raise UsageError(f"no sampling option `{key}`{nearest(key, _SAMPLING)}", fix=fix)
        options = Sampling(max_tokens, stop_ids=tuple(self.stop_ids), **sampling)
        name = None if adapter is None else self._adapter(adapter)
        seeds = range(options.seed, options.seed + len(prompts) * options.n, options.n)
        asked = [Request(p, replace(options, seed=seed), name) for p, seed in zip(prompts, seeds, strict=True)]
        guessing = None if speculate is None else self.speculation(speculate)
        first = self.engine.added

        def show(event: Event) -> None:
            if on_token is not None and event.request == first and event.sample == 0:
                for token in event.token_ids:
                    on_token(token)

        try:
            return self.engine.run(asked, show, speculate=guessing)
        finally:
            if len(asked) > 1 and not self.engine.busy:  # somebody else's requests may be open
                self._release()

    @cached_property
    def engine(self) -> Engine:
        """What everything here is generated by. After one prompt it keeps what it read, so that a conversation goes on
        where it was; after several it gives its memory back."""
        return Engine(self.model, decode=self.tokenizer.decode)

    def speculation(self, by: str) -> Speculation:
        """Guessing as `complete` knows it by name; made once, for it learns where it pays.

        Raises:
            UsageError: a draft model with another tokenizer. CheckpointError: no such model.
        """
        if by not in self._speculations:
            self._speculations[by] = Speculation(self._proposer(by))
        return self._speculations[by]

    def _release(self) -> None:
        self.engine.release()
        for each in self._speculations.values():
            each.proposer.release()

    def _proposer(self, by: str) -> Proposer:
        if by == "lookup":
            return Lookup()
        if by == "self":
            return SelfDraft(packed_copy(self.model), self.model)
        try:
            find_model(by)
        except CheckpointError as error:
            near = nearest(by, ["lookup", "self"])
            fix = "lookup, self, or a smaller model with this tokenizer"
            raise CheckpointError(f"{error.what}{near}", where=f"speculate={by}", fix=fix) from None
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.model.compute_dtype)
        draft = load(by, dtype, str(next(self.model.parameters()).device), packed="auto")
        if not draft.tokenizer.same_ids(self.tokenizer):
            raise UsageError(f"{by} has another tokenizer than {self.path}", fix="a draft of the same family")
        return Draft(draft.model, self.model)

    def _adapter(self, path: str | Path) -> str:
        if (name := str(path)) not in self.engine.adapters.names:
            try:
                found = find_model(path)
            except CheckpointError as error:
                near, fix = nearest_path(Path(path)), "a run of `puna run sft`, or a folder with adapter_config.json"
                raise CheckpointError(f"{error.what}{near}", where=f"adapter={path}", fix=fix) from None
            if not (found / ADAPTER).exists():
                fix = f"puna.load({name!r}) of a model; here a folder with {ADAPTER}"
                raise UsageError("a model, not an adapter", where=f"adapter={path}", fix=fix)
            self.engine.add_adapter(name, found)
        return name

    @cached_property
    def _speculations(self) -> dict[str, Speculation]:
        return {}

    def add_tokens(self, tokens: Sequence[str], *, special: bool = True) -> "Llama":
        """A model with more tokens: their ids at the end, their rows in embedding and head the mean of all others.

        Args:
            special: control tokens, which text never becomes; otherwise words that are always one id.

        Raises:
            UsageError: a token that exists already.
        """
        tokenizer = self.tokenizer.with_tokens(tokens, special=special)
        rows = max(self.model.config.vocab_size, tokenizer.vocab_size)
        model = resize_embeddings(self.model, rows, self.tokenizer.vocab_size)
        stops = dict.fromkeys([*tokenizer.stop_ids, *self.stop_ids])  # what was added may be the end of a turn
        return replace(self, model=model, tokenizer=tokenizer, stop_ids=list(stops))

    def save(self, path: str | Path, dtype: str = "bf16", made_from: Mapping[str, Any] | None = None) -> None:
        """Write a model directory that transformers, vLLM and llama.cpp's converter open.

        Args:
            made_from: its lineage; by default that it was saved from this model.

        Raises:
            UsageError: `path` exists, or has the name of a file.
        """
        check_folder_name(target := as_path(path))
        with atomic_folder(target) as folder:
            made_from = made_from or lineage("save", [self.path])
            packed = packed_tensors(self.model, DTYPES[dtype]) if packed_layers(self.model) else ({}, {})
            save_model(folder, self.model, self.tokenizer, dtype, dict(made_from), self.stop_ids, packed)


def load(
    path: str | Path, dtype: str = "auto", device: str = "auto", *, variables: Mapping[str, Any] | None = None,
    packed: bool | Literal["auto"] = False, quantize: str | None = "auto",
) -> Llama:  # fmt: skip
    """Load a model or adapter directory, a run folder, a .gguf file, or a registered name such as smollm2-135m.

    Args:
        dtype: fp32, bf16, fp64, or auto: bf16 where the hardware has native bf16.
        variables: for the chat template, such as {"builtin_tools": ["brave_search"]} or {"date_string": "01 Mar 2025"}.
        packed: compute in quantized weights as they are stored, instead of dequantizing them; auto: where kernels for
            that are at hand. Packed weights are frozen.
        quantize: round the linear layers of the blocks as they are read: nf4, int8, int4 or int8-int4. auto: to what
            the base of an adapter was rounded to while it was trained, and of anything else nothing; None: nothing.

    Raises:
        CheckpointError: not a model, or damaged. DataError: its tokenizer cannot be read.
        UsageError: what cannot be quantized so.
    """
    llama = load_base(path, dtype, device, packed=packed, quantize=quantize)
    if (llama.path / ADAPTER).exists():
        load_adapter(llama.model, llama.path)
    return replace(llama, model=llama.model.eval(), variables=variables or {})


def load_base(
    path: str | Path, dtype: str = "auto", device: str = "auto", *, packed: bool | Literal["auto"] = False,
    quantize: str | None = "auto",
) -> Llama:  # fmt: skip
    """`load`, but of an adapter its base alone, with the adapter's tokenizer and a row for each of its tokens."""
    where = choose_device(device)
    found = find_model(path)
    compute = choose_dtype(dtype, where)
    adapted = (found / ADAPTER).exists()
    stored = open_model(base_of(found) if adapted else found)
    to = quantize if quantize != "auto" else quantized_base_of(found) if adapted else None
    if to is not None:
        stored = rounded(stored, to)
    with ThreadPoolExecutor(1) as side:  # parsing a vocabulary takes as long as the weights, and holds no lock
        reading = side.submit(tokenizer_of, found, stored)
        keep = to is not None or packed is True or (packed == "auto" and where.type == "cpu" and native() is not None)
        model = stored.load(compute, where, put if keep else None)
        if to is not None:
            log.info("weights: %s, the linear layers rounded to %s", stored.storage, to)
        elif stored.quantized:
            log.info("weights: %s, %s", stored.storage, "as stored" if packed_layers(model) else "dequantized")
    rows = embedding_rows(found) if adapted else None
    if rows is not None and rows != model.config.vocab_size:
        model = resize_embeddings(model, rows)
    tokenizer = reading.result()
    stops = dict.fromkeys([*tokenizer.stop_ids, *stored.stop_ids])
    return Llama(model, tokenizer, found, list(stops))
