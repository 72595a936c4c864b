"""llama.cpp as an oracle: in this interpreter, or in the one that PUNA_LLAMA_CPP names; always in a process of its own.

It takes minutes to compile, so it is no part of the tests' requirements; without it its tests skip, loudly.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_GREEDY = """
import json, sys
import llama_cpp, numpy
ask = json.load(sys.stdin)
model = llama_cpp.Llama(ask["model"], n_ctx=ask["context"], n_batch=ask["context"], n_threads=1, logits_all=True,
                        type_k=0, type_v=0, n_gpu_layers=0, verbose=False)
ids = ask["ids"] or model.tokenize(ask["text"].encode(), add_bos=False, special=True)
model.eval(ids)
logits, made = model.scores[: len(ids)].tolist() if ask["logits"] else [], []
for _ in range(ask["new"]):
    made.append(int(numpy.argmax(model.scores[model.n_tokens - 1])))
    if made[-1] == model.token_eos():
        break
    model.eval([made[-1]])
print(json.dumps({"prompt": ids, "ids": made, "logits": logits, "metadata": model.metadata}))
"""
_QUANTIZE = """
import ctypes, glob, os, sys
import llama_cpp, numpy
kind, rows, columns, size, source, target = sys.argv[1:]
library = ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(llama_cpp.__file__), "lib", "libggml-base.*"))[0])
run = library.ggml_quantize_chunk
run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
array, out = numpy.fromfile(source, "<f4"), numpy.empty(int(size), "u1")
run(int(kind), array.ctypes.data, out.ctypes.data, 0, int(rows), int(columns), None)
out.tofile(target)
"""
_REQUANTIZE = """
import ctypes, sys
import llama_cpp
how = llama_cpp.llama_model_quantize_default_params()
how.ftype, how.nthread = int(sys.argv[3]), 1
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(how)))
"""


def _run(script: str, *words: str, given: str = "") -> str:
    here = importlib.util.find_spec("llama_cpp") is not None
    interpreter = sys.executable if here else os.environ.get("PUNA_LLAMA_CPP")
    if not interpreter:
        pytest.skip("no llama_cpp here and PUNA_LLAMA_CPP names no interpreter that has it: llama.cpp is not asked")
    done = subprocess.run([interpreter, "-c", script, *words], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def greedy(
    model: Path, ids: Sequence[int] = (), new: int = 0, *, text: str = "", logits: bool = False, context: int = 256
) -> dict[str, Any]:
    """What llama.cpp makes of a prompt: `prompt` ids, the `ids` that follow, all `logits` of the prompt, `metadata`."""
    ask = {"model": str(model), "ids": list(ids), "new": new, "text": text, "logits": logits, "context": context}
    return json.loads(_run(_GREEDY, given=json.dumps(ask)).splitlines()[-1])


def quantize(array: np.ndarray, kind: int, size: int, folder: Path) -> np.ndarray:
    """(rows, columns) fp32 -> its `size` bytes by llama.cpp's reference quantizer."""
    source, target = folder / "source", folder / "target"
    array.astype("<f4").tofile(source)
    _run(_QUANTIZE, str(kind), *map(str, array.shape), str(size), str(source), str(target))
    return np.fromfile(target, np.uint8)


def requantize(source: Path, target: Path, file_type: int) -> Path:
    """A GGUF file as llama.cpp quantizes it."""
    _run(_REQUANTIZE, str(source), str(target), str(file_type))
    return target
