"""The whole life of a Llama in one readable PyTorch codebase. Importing this imports neither torch nor a submodule."""

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# OpenMP reads this when torch loads: spinning threads collapse to a tenth of their speed beside a busy neighbour.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from puna.checkpoint.convert import convert
    from puna.checkpoint.inspect import inspect
    from puna.eval.parity.verify import verify
    from puna.infer.llama import Llama, load
    from puna.recipes import plan, run

_LAZY = {
    "load": "puna.infer.llama",
    "Llama": "puna.infer.llama",
    "run": "puna.recipes",
    "plan": "puna.recipes",
    "convert": "puna.checkpoint.convert",
    "inspect": "puna.checkpoint.inspect",
    "verify": "puna.eval.parity.verify",
}
__all__ = ["Llama", "__version__", "convert", "inspect", "load", "plan", "run", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'puna' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
