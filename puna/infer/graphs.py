"""Steps of one token a text as CUDA graphs: captured once for each size of batch, replayed with other inputs.

A step of a small model is hundreds of kernels of a few microseconds each, which Python cannot launch that fast; a graph
is one launch. Everything in it has fixed shapes and addresses, so a step is padded to the next size that was captured.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from puna.infer.cache.paged_cache import PagedCache, StepCache
from puna.infer.forward import Row
from puna.log import log
from puna.model.mode import evaluating
from puna.model.transformer import Transformer
from puna.ops.paged_attention import Rows

_WIDTH = 16  # blocks of a table, at least: texts outgrow fewer too soon

Step = Callable[[], Tensor]
"""Gives the same tensor each time, with other content."""


class DecodeGraphs:
    """Replays steps over a cache's pool and a model's weights, which it reads where they are.

    Weights that were written to in place are seen; after some were replaced, call `forget`.

    Args:
        capture: makes of a step what replays it; by default a CUDA graph on a card, and nothing elsewhere.
    """

    def __init__(self, model: Transformer, cache: PagedCache, capture: Callable[[Step], Step] | None = None):
        on_card = cache.device.type == "cuda"
        self.model, self.cache, self.capture = model, cache, cuda_graphs() if on_card and capture is None else capture
        self.captured: dict[tuple[int, int], tuple[Tensor, Step]] = {}
        """By rows and blocks of a table: the inputs, and what replays a step over them."""
        self._reads: list[Tensor] = []  # kept, so that what a graph reads never becomes another's memory
        self._moved = True

    def run(self, rows: list[Row]) -> Tensor | None:
        """The final hidden states (N, dim), valid until the next run; None for a step that a graph cannot do.

        Args:
            rows: one token of each of N texts, or it is not such a step.
        """
        if self.capture is None or any(len(row.ids) > 1 for row in rows):
            return None
        self._drop_stale()
        longest = max(_WIDTH, *(len(row.table) for row in rows))
        size = _power_of_two(len(rows)), min(_power_of_two(longest), self.cache.blocks.count)
        inputs = _inputs(rows, *size)
        if size in self.captured:
            self.captured[size][0].copy_(inputs)
        else:
            try:
                self.captured[size] = self._captured(inputs, self.capture)
            except RuntimeError as error:  # something in the model waits for the device, or no memory is left
                log.warning("decoding without CUDA graphs, slower: %s", str(error).splitlines()[0])
                self.capture = None
                self.release()
                return None
        return self.captured[size][1]()[: len(rows)]

    def forget(self) -> None:
        """Weights may have been replaced: graphs are used again only if none was."""
        self._moved = True

    def release(self) -> None:
        """Give the graphs' memory back."""
        self.captured.clear()
        self._reads, self._moved = [], True

    def _captured(self, inputs: Tensor, capture: Callable[[Step], Step]) -> tuple[Tensor, Step]:
        (keys, values), fixed = self.cache.pool, inputs.to(self.cache.device)

        def step() -> Tensor:
            tokens, positions, tables = fixed[:, 0], fixed[:, 1].long(), fixed[:, 2:].long()
            with evaluating(self.model):
                cache = StepCache(keys, values, Rows(tables, positions))
                return self.model(tokens[None], positions=positions[None], cache=cache, head=False)[0]

        return fixed, capture(step)

    def _drop_stale(self) -> None:
        """A graph reads addresses. Those of weights that were replaced, or of a pool given back, are not to be read."""
        if self._moved or self._reads[0] is not self.cache.pool[0]:
            reads = [*self.cache.pool, *(x.detach() for x in (*self.model.parameters(), *self.model.buffers()))]
            if [x.data_ptr() for x in reads] != [x.data_ptr() for x in self._reads]:
                self.captured.clear()
            self._reads, self._moved = reads, False


def cuda_graphs() -> Callable[[Step], Step]:
    """Captures steps as CUDA graphs that share one pool of memory: only one runs at a time."""
    memory = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # compiles and allocates, which a capture must not
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


def _inputs(rows: list[Row], count: int, width: int) -> Tensor:
    """(count, 2 + width) int32: of each text its token, its position, its table.

    Padding repeats the shortest text, which is the least to read, and writes what that one writes to the same place.
    """
    given = [[ids[0], start, *table, *[0] * (width - len(table))] for ids, start, table in rows]
    shortest = min(given, key=lambda row: row[1])
    return torch.tensor(given + [shortest] * (count - len(given)), dtype=torch.int32)


def _power_of_two(count: int) -> int:
    """That holds `count`: a few sizes serve all, and less than half of a step is padding."""
    return 1 << (count - 1).bit_length()
