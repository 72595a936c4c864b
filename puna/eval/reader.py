"""A model that is asked in text: how likely texts are, and what it writes. Everything runs on one engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from puna.eval.pairs import Encoder
from puna.infer.engine import Engine
from puna.infer.llama import Llama
from puna.infer.request import Likelihood, Request
from puna.infer.sampling import Sampling

Progress = Callable[[int], None]
"""Told how many are done."""
_AT_ONCE = 256  # texts between two reports of progress: what neighbours share is still in the cache


class Reader:
    """Reads and writes with the model of `llama`.

    Args:
        special: control strings in what is asked are control ids (a rendered chat template).
        batch: most texts written at a time.
    """

    def __init__(self, llama: Llama, *, special: bool = False, batch: int = 32, chunk: int = 512):
        self.stop_ids, self.max_seq_len = tuple(llama.stop_ids), llama.model.config.max_seq_len
        self.encoder = Encoder(llama.tokenizer, self.max_seq_len, special=special)
        # behind a letter: a tokenizer may drop the space that a text begins with, and Python's first line has four
        self.decode = partial(llama.tokenizer.decode_after, llama.tokenizer.encode("a"))
        self.engine = Engine(llama.model, decode=self.decode, batch=batch, chunk=chunk)

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
        long lose their beginning."""
        room = max(1, self.max_seq_len - sampling.max_tokens)
        asked = replace(sampling, stop_ids=(*sampling.stop_ids, *self.stop_ids))
        requests = [Request(ids[-room:], asked) for ids in self.encoder.batch(prompts)]
        done = 0

        def count(event: object) -> None:
            nonlocal done
            done += getattr(event, "result", None) is not None
            if progress:
                progress(done)

        results = self.engine.run(requests, count)
        return [[self._text(c.token_ids, c.text) for c in result.completions] for result in results]

    def _text(self, ids: Sequence[int], text: str | None) -> str:
        return self.decode(ids) if text is None else text
