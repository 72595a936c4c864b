"""A model that is asked in text: how likely texts are, and what it writes. Everything runs on one engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from puna.errors import UsageError
from puna.eval.pairs import Encoder
from puna.infer.engine import Engine
from puna.infer.llama import Llama
from puna.infer.request import Likelihood, Request
from puna.infer.sampling import Sampling

Progress = Callable[[int], None]
"""Told how many are done."""
_AT_ONCE = 256  # texts between two reports of progress: what neighbours share is still in the cache


def room_for(max_tokens: int, max_seq_len: int) -> int:
    """How many ids of a question a model can read before an answer of `max_tokens`.

    Raises:
        UsageError: none.
    """
    if max_tokens >= max_seq_len:
        raise UsageError(f"answers of {max_tokens} tokens leave no room for a question",
                         cause=f"the model reads {max_seq_len}", fix=f"--max-tokens {max_seq_len // 2}")  # fmt: skip
    return max_seq_len - max_tokens


class Reader:
    """Reads and writes with the model of `llama`.

    Args:
        special: control strings in what is asked are control ids (a rendered chat template).
        batch: most texts written at a time.
    """

    def __init__(self, llama: Llama, *, special: bool = False, batch: int = 32, chunk: int = 512):
        self.stop_ids, self.max_seq_len = tuple(llama.stop_ids), llama.model.config.max_seq_len
        self.about = {"model": str(llama.path), "dtype": str(llama.model.compute_dtype).removeprefix("torch.")}
        """What its answers depend on, besides what is asked."""
        self.encoder = Encoder(llama.tokenizer, self.max_seq_len, special=special)
        # behind a letter: a tokenizer may drop the space that a text begins with, and Python's first line has four
        self.decode = partial(llama.tokenizer.decode_after, llama.tokenizer.encode("a"))
        self.unfinished = 0
        """How many written texts have ended at their length, so far."""
        self.engine = Engine(llama.model, decode=self.decode, batch=batch, chunk=chunk)

    @property
    def cut(self) -> int:
        """How many texts have lost their beginning, so far."""
        return self.encoder.cut

    def likelihoods(self, asked: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Likelihood]:
        """log p(continuation | context) in nats for each (context, continuation)."""
        found: list[Likelihood] = []
        for start in range(0, len(asked), _AT_ONCE):
            found += self.engine.score(self.encoder.pairs(asked[start : start + _AT_ONCE]))
            if progress:
                progress(len(found))
        return found

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text) in nats, however long."""
        windows = [self.encoder.windows(text) for text in texts]
        scores = iter(self.engine.score([pair for each in windows for pair in each]))
        return [sum(next(scores).total for _ in each) for each in windows]

    def write(self, prompts: Sequence[str], sampling: Sampling, progress: Progress | None = None) -> list[list[str]]:
        """`sampling.n` continuations of each prompt, ended before a stop string or a stop id. Prompts that are too
        long lose their beginning, which `cut` counts. Prompt i has the seeds `sampling.seed + i * n` and on: one asked
        again is sampled again.

        Raises:
            UsageError: see `room_for`.
        """
        room = room_for(sampling.max_tokens, self.max_seq_len)
        rows = self.encoder.batch(prompts)
        self.encoder.cut += sum(len(ids) > room for ids in rows)
        asked = replace(sampling, stop_ids=(*sampling.stop_ids, *self.stop_ids))
        seeds = range(sampling.seed, sampling.seed + len(rows) * sampling.n, sampling.n)
        requests = [Request(ids[-room:], replace(asked, seed=seed)) for ids, seed in zip(rows, seeds, strict=True)]
        done = 0

        def count(event: object) -> None:
            nonlocal done
            done += getattr(event, "result", None) is not None
            if progress:
                progress(done)

        results = self.engine.run(requests, count)
        self.unfinished += sum(c.finish_reason == "length" for result in results for c in result.completions)
        return [[self._text(c.token_ids, c.text) for c in result.completions] for result in results]

    def _text(self, ids: Sequence[int], text: str | None) -> str:
        return self.decode(ids) if text is None else text
