"""The pickle inside a torch file, read and written as data. Nothing it names is ever imported, made or called.

A checkpoint's `data.pkl` is a dictionary of names, sizes and places of bytes, said in some twenty of pickle's opcodes.
They are carried out here on plain values; what they want to call is compared with three names, whose meaning is
written below, and anything else is refused by name. So there is no unpickler that a file could turn against us.
"""

import pickletools
import struct
import warnings
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}  # fmt: skip

_MOST_STEPS = 1 << 17  # a tensor takes some forty: 3,000 tensors, where the largest Llama has 1,138
_MOST_AXES = 8
_LONGEST_NAME = 80  # of what a pickle wants to import; what is read is shorter


class Refused(Exception):
    """The pickle is damaged, or asks for more than tensors."""


class Place(NamedTuple):
    """Where a tensor lies: a record of the file, and what part of it in which order (in elements)."""

    key: str
    dtype: torch.dtype
    numel: int
    """Elements of the whole record."""
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Name(NamedTuple):
    """Something the pickle wants to import: its dotted name, and never the thing."""

    dotted: str


class _Record(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


def read_pickle(raw: bytes) -> Any:
    """What `raw` describes: dictionaries, lists, tuples, numbers, strings, and a `Place` for each tensor.

    Raises:
        Refused: it wants something called that is no tensor, or it is no pickle.
    """
    try:
        with warnings.catch_warnings():  # of odd escapes in strings, by the parser
            warnings.simplefilter("ignore")
            return _run(raw)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, struct.error) as error:
        raise Refused(f"its data.pkl is damaged ({type(error).__name__})") from None


def _run(raw: bytes) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks that marks have set aside
    memo: dict[int, Any] = {}
    argument: Any
    for step, (op, argument, _) in enumerate(pickletools.genops(raw)):
        if step == _MOST_STEPS:
            raise Refused(f"its data.pkl has more than {_MOST_STEPS:,} steps, as no Llama's has")
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                outer.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[op.name]())
            case "TUPLE":
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(op.name[-1]))])))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items, stack = stack, outer.pop()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1].update(_pairs([key, value]))
            case "SETITEMS":
                items, stack = stack, outer.pop()
                stack[-1].update(_pairs(items))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Name(".".join((module[:_LONGEST_NAME], name[:_LONGEST_NAME]))))
            case "BINPERSID":
                stack.append(_record(stack.pop()))
            case "REDUCE":
                arguments, what = stack.pop(), stack.pop()
                stack.append(_made(what, arguments))
            case "BUILD":  # attributes of a state_dict: module versions
                stack.pop()
            case "STOP":
                return stack.pop()
            case _:
                made = next((x.dotted for x in reversed(stack) if isinstance(x, _Name)), "")
                raise Refused(f"it asks for {made or 'something'} ({op.name}), which no tensor needs")
    raise ValueError("no end")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if not all(isinstance(key, str | int) for key in keys):  # the hash of nested tuples can take years
        raise ValueError("keys")
    return dict(zip(keys, items[1::2], strict=True))


def _record(id: Any) -> _Record:
    kind, name, key, _, count = id
    dtype = _STORAGES.get(name.dotted.removeprefix("torch."))
    if kind != "storage" or dtype is None:
        raise Refused(f"tensors stored as {name.dotted[:80]} are not read: integers are a quantized model's")
    if not isinstance(key, str) or not _whole([count]):
        raise ValueError("storage")
    return _Record(key, dtype, count)


def _made(what: Any, arguments: Any) -> Any:
    name = what.dotted
    if name == "torch._utils._rebuild_tensor_v2":
        return _place(*arguments[:4])
    if name == "torch._utils._rebuild_parameter":
        return arguments[0]
    if name == "collections.OrderedDict" and not arguments:  # its items follow one by one
        return {}
    raise Refused(f"it asks to run {name[:80]}, which no tensor needs")


def _place(record: _Record, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Place:
    if not len(shape) == len(stride) <= _MOST_AXES or not _whole([offset, *shape, *stride]):
        raise ValueError("sizes")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if prod(shape) and (last >= record.numel or prod(shape) > record.numel):  # more than it holds: a stride of 0
        raise Refused("a tensor reaches beyond its record, or is larger")
    return Place(*record, offset, tuple(shape), tuple(stride))


def _whole(numbers: list[Any]) -> bool:
    return all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


def write_pickle(tensors: Mapping[str, Place]) -> bytes:
    """The data.pkl of a dictionary of tensors, as torch.load(weights_only=True) reads it."""
    items = b"".join(_text(name) + _tensor(place) for name, place in tensors.items())
    return b"\x80\x02}(" + items + b"u."


def _tensor(place: Place) -> bytes:
    name = next(name for name, dtype in _STORAGES.items() if dtype is place.dtype)
    record = b"(" + _text("storage") + f"ctorch\n{name}\n".encode() + _text(place.key) + _text("cpu")
    shape, stride = (b"(" + b"".join(map(_number, sizes)) + b"t" for sizes in (place.shape, place.stride))
    needs_no_gradient, hooks = b"\x89", b"ccollections\nOrderedDict\n)R"
    arguments = (record, _number(place.numel), b"tQ", _number(place.offset), shape, stride, needs_no_gradient, hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(arguments) + b"tR"


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(n: int) -> bytes:
    return b"J" + struct.pack("<i", n) if n < 1 << 31 else b"\x8a\x08" + struct.pack("<q", n)
