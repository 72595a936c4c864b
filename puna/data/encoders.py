"""Encoding on all cores: processes that are fed and read in the data's order, so that their number changes nothing.

They are programs of their own (`python -m puna.data.encoders`) and speak JSON and raw arrays over pipes. What
multiprocessing starts would import the caller's script once more, which a script without
`if __name__ == "__main__"` does not survive, and would outlive a caller that is killed; these end with their input.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from puna import errors
from puna.data.conversations import Conversation
from puna.data.encode import Chunk, Encoding, encode_chunk
from puna.errors import PunaError, ResourceError
from puna.log import log
from puna.tokenizer.chat.format import ChatFormat
from puna.tokenizer.tokenizer import Tokenizer

CHUNK = 256
"""Conversations that are encoded together."""
ALONE = 8
"""Chunks encoded before processes are started: about as long as these take to start."""
_MOST = 32  # reading keeps about this many busy

Work = Sequence[Conversation] | PunaError
"""A chunk to encode, or what its reading failed with: told in its turn, after mistakes in earlier conversations."""


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_order(
    conversations: Iterable[Conversation], encoding: Encoding, workers: int | None = None
) -> Generator[Chunk, None, None]:
    """Chunks of encoded rows in the order of the conversations; only a few chunks are ever in memory.

    Args:
        workers: processes; by default as many as cores. With 1 all is done in this one.

    Raises:
        DataError: the first conversation that cannot be read or encoded. ResourceError: a process died.
    """
    works = _works(conversations)
    for work in islice(works, ALONE):
        yield _encode(work, encoding)
    if (workers or cores()) == 1:
        yield from (_encode(work, encoding) for work in works)
    elif (next_work := next(works, None)) is not None:
        yield from _on_processes(chain([next_work], works), encoding, workers or min(cores(), _MOST))


def _works(conversations: Iterable[Conversation]) -> Iterator[Work]:
    chunk: list[Conversation] = []
    try:
        for conversation in conversations:
            chunk.append(conversation)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    except PunaError as error:
        yield from filter(None, [chunk, error])
        return
    if chunk:
        yield chunk


def _encode(work: Work, encoding: Encoding) -> Chunk:
    if isinstance(work, PunaError):
        raise work
    return encode_chunk(work, encoding)


def _on_processes(works: Iterable[Work], encoding: Encoding, workers: int) -> Iterator[Chunk]:
    waiting: deque[Future[Chunk]] = deque()
    with tempfile.TemporaryDirectory(prefix="puna-") as folder, ThreadPoolExecutor(workers) as threads:
        encoding.chat.tokenizer.save(Path(folder))
        processes: list[_Process] = []
        idle: SimpleQueue[_Process] = SimpleQueue()

        def ask(work: Work) -> Chunk:  # each process is asked by one thread at a time
            process = idle.get()
            try:
                return process.encode(work)
            finally:
                idle.put(process)

        try:
            for _ in range(workers):  # those that run end with the others, whatever happens meanwhile
                processes.append(_Process(encoding, folder))
                idle.put(processes[-1])
            for work in works:
                waiting.append(threads.submit(ask, work))
                if len(waiting) > 2 * workers:  # bounded, or all that is read would wait in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.end()


class _Process:
    """A process that encodes: what it is asked is written, then its answer is read."""

    def __init__(self, encoding: Encoding, tokenizer: str):
        self._tell = encoding.chat.tell
        place = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH")]))
        # One thread each: there is a process for every core already.
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        chat = encoding.chat
        variables = {name: value for name, value in chat.variables.items() if not callable(value)}
        setup = [tokenizer, chat.source, variables, encoding.seq_len, encoding.train, encoding.too_long]
        with contextlib.suppress(OSError):  # it is dead: who asks it to encode is told
            self._ask(setup)

    def encode(self, work: Work) -> Chunk:
        """`encode_chunk` over there.

        Raises:
            DataError: what it raised. ResourceError: the process is no more.
        """
        if isinstance(work, PunaError):
            raise work
        try:
            self._ask(work)
            answer = json.loads(self._output.readline() or b"{}")
            total = sum(answer["lengths"])
            ids = np.frombuffer(_exactly(self._output, 4 * total), dtype="<u4")
            trained = np.frombuffer(_exactly(self._output, total), dtype=bool)
        except (OSError, EOFError, ValueError, KeyError):
            what = "a process that encodes has died"
            raise ResourceError(what, cause="it was killed, or memory ran out", fix="run it again") from None
        for told in answer.get("told", ()):
            self._tell(told)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(**answer["error"])
        if "crash" in answer:
            raise RuntimeError(answer["crash"])
        lengths, draws = np.array(answer["lengths"], np.int32), np.array(answer["draws"], np.float64)
        return Chunk(ids, trained, lengths, draws, answer["sources"], answer["fates"])

    def end(self) -> None:
        """It only computes: killed it loses nothing, and a thread that waits for it goes on."""
        self._process.kill()
        self._process.wait()
        for stream in (self._input, self._output):
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, what: Any) -> None:
        self._input.write(json.dumps(what).encode() + b"\n")
        self._input.flush()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


class _Told(logging.Handler):
    """What is said while a chunk is encoded; the caller says it, once for all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def taken(self) -> list[str]:
        taken, self.messages = self.messages, []
        return taken


def main() -> None:
    """Answer a line of conversations with a line about their rows, then their ids and trained bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that asks decides
    log.handlers[:] = [told := _Told()]
    log.propagate = False
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    folder, template, variables, *rest = json.loads(questions.readline())
    encoding = Encoding(ChatFormat(Tokenizer(Path(folder)), template, **variables), *rest)
    for line in questions:
        arrays: tuple[bytes, ...] = ()
        try:
            chunk = encode_chunk([Conversation(*fields) for fields in json.loads(line)], encoding)
            answer: dict[str, Any] = {
                "lengths": chunk.lengths.tolist(), "draws": chunk.draws.tolist(), "sources": chunk.sources,
                "fates": chunk.fates,
            }  # fmt: skip
            arrays = chunk.ids.astype("<u4").tobytes(), chunk.trained.tobytes()
        except PunaError as error:
            told_of = {"what": error.what, "where": error.where, "cause": error.cause, "fix": error.fix}
            answer = {"lengths": [], "kind": type(error).__name__, "error": told_of}
        except Exception:
            answer = {"lengths": [], "crash": traceback.format_exc()}
        answers.write(json.dumps({**answer, "told": told.taken()}).encode() + b"\n")
        answers.writelines(arrays)
        answers.flush()


if __name__ == "__main__":
    main()
