"""Reads pickles without running them, with an interpreter that knows tensors and calls nothing.

A pickle is a program: it names functions of any installed module and has them called. This
interpreter takes the program apart with the standard library's `pickletools` and builds plain
lists, dictionaries and descriptions of tensors. It never looks up a name from a pickle. It knows
the functions that rebuild a tensor by their names, turns configuration objects of training scripts
into inert placeholders, and refuses every other name. `MAX_BYTES` and `MAX_OPCODES` bound work and
memory.

CPython's Lib/pickletools.py documents the opcodes. The names that torch writes are those of its
torch/_utils.py and torch/serialization.py.
"""

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from seechat_weights.errors import CheckpointError
from seechat_weights.files.reading import line, shown

MAX_BYTES = 32 << 20  # of one pickle; a shard of ChatGLM-6B has one of 10 kB
MAX_OPCODES = 1_000_000
_MAX_LINE = 4096
_MAX_DOTTED = 256  # characters of a class's name
_MAX_INT = 1 << 32  # of a key: larger ones can be chosen so that all collide in one slot of a table

# classes in the configuration and state that training scripts save beside the weights
_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|collections\.(defaultdict|Counter|deque)"
    r"|(__builtin__|builtins)\.(dict|list|tuple|set|frozenset|int|long|float|str|unicode|bool|bytes|object"
    r"|complex|slice|range)"
    r"|copy_?reg\._reconstructor|_codecs\.encode"
    r"|numpy\.(dtype|ndarray|bool_|u?int(8|16|32|64)|float(16|32|64))"
    r"|numpy\.(core|_core)\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|numpy\.random\._pickle\.\w+|numpy\.random\._mt19937\.MT19937"
    r"|pathlib\.(Pure)?(Posix|Windows)?Path|datetime\.(date|datetime|timedelta)|uuid\.UUID"
    r"|torch\.(device|Size|dtype|Generator|bool|half|float|double|long|int|uint8|int8|u?int(16|32|64)"
    r"|b?float16|float(32|64))"
    r"|typing\.(Any|Dict|List|Optional|Union)"
    r"|(omegaconf|easydict|yacs|addict|ml_collections|seechat|minigpt4|lavis|sat|deepspeed)"
    r"(\.\w+)*\.[A-Z]\w*|__torch__(\.\w+)+"
)
# opcodes whose argument is the value
_IMMEDIATE = re.compile(
    r"STRING|UNICODE|INT|BININT[12]?|LONG[14]?|FLOAT|BINFLOAT|(SHORT_)?BIN(STRING|BYTES|UNICODE)"
    r"|BIN(BYTES|UNICODE)8"
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A run of numbers in the container, as a pickle names it."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor as a pickle describes it: a strided view of a storage, counted in numbers."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


@dataclass(eq=False, slots=True)
class Inert:
    """A placeholder for an object of an unknown class; it does nothing."""

    name: str
    state: Any = None  # usually its attributes
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class _Global:
    name: str  # "module.attribute"; never looked up


class Window:
    """Part of a mapped file, read like a file, within bounds."""

    def __init__(self, data: Any, start: int, end: int) -> None:
        self._data, self._at, self._end = data, start, min(end, start + MAX_BYTES)

    def read(self, count: int) -> bytes:
        """The next bytes, as of a file."""
        part = self._data[self._at : min(self._at + max(count, 0), self._end)]
        self._at += len(part)
        return bytes(part)

    def readline(self) -> bytes:
        """The next line, as of a file; empty without a line's end."""
        part = bytes(self._data[self._at : min(self._at + _MAX_LINE, self._end)])
        part = part[: part.find(b"\n") + 1]  # empty without a line's end, which is an error
        if b"\\" in part:
            raise ValueError("a backslash in a name")
        self._at += len(part)
        return part

    def tell(self) -> int:
        """The present position."""
        return self._at


def unpickle(window: Window, where: str, storages: dict[str, Storage] | None = None) -> Any:
    """Return the object that a pickle builds, made of plain values, Tensor, Storage and Inert.

    window: the bytes; it is left after the pickle.
    where: the file's name, for errors.
    storages: gets the pickle's storages, if given.

    Raises CheckpointError; it names the first thing that only running code could build.
    """
    try:
        return _run(window, where, {} if storages is None else storages)
    except CheckpointError:
        raise
    # a damaged pickle's opcodes can fail in any of these ways
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as e:
        raise CheckpointError(
            f"{where}: damaged, truncated or no pickle of tensors ({line(e)}); expected a file "
            "written by torch.save: download it again"
        ) from None


def _run(window: Window, where: str, storages: dict[str, Storage]) -> Any:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for count, (opcode, arg, _) in enumerate(pickletools.genops(cast(BinaryIO, window))):
        name = opcode.name
        if count > MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES} steps")
        if _IMMEDIATE.fullmatch(name):
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            items = stack[-_TUPLES[name] :]
            if len(items) < _TUPLES[name]:
                raise IndexError("stack underflow")
            stack[-_TUPLES[name] :] = [tuple(items)]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else cast(int, arg)
            if place >= _MAX_INT:
                raise ValueError(f"a memo at {shown(place)}")
            memo[place] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[arg])
        elif name in ("TUPLE", "FROZENSET"):
            stack.append(tuple(to_mark()))
        elif name == "LIST":
            stack.append(to_mark())
        elif name == "DICT":
            items = to_mark()
            stack.append({})
            _set_items(stack[-1], items)
        elif name in ("SETITEMS", "SETITEM"):
            items = to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set_items(stack[-1], items)
        elif name in ("APPENDS", "ADDITEMS", "APPEND"):
            items = [stack.pop()] if name == "APPEND" else to_mark()
            if isinstance(stack[-1], list):
                stack[-1] += items
            elif not isinstance(stack[-1], Inert):  # nothing needs what a placeholder collects
                raise TypeError("no list to append to")
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if type(module) is not str or type(attribute) is not str:
                    raise TypeError("a class whose name is no text")
                # not joined if too long: a pickle could ask for it again and again
                dotted = f"{module[:_MAX_DOTTED]}.{attribute[:_MAX_DOTTED]}"
            else:
                dotted = str(arg).replace(" ", ".", 1)
            stack.append(_global(dotted, where))
        elif name in ("REDUCE", "NEWOBJ"):
            args, called = stack.pop(), stack.pop()
            stack.append(_call(called, args, where))
        elif name == "NEWOBJ_EX":
            stack[-3:] = [_call(stack[-3], stack[-2], where)]
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict | Tensor):  # OrderedDict's _metadata and the like
                raise TypeError("state for what takes none")
        elif name == "BINPERSID":
            storage = _storage(stack.pop(), where)
            known = storages.setdefault(storage.key, storage)
            if (known.dtype, known.count) != (storage.dtype, storage.count):
                raise ValueError(f"storage {shown(storage.key)} in two sizes")
            stack.append(known)
        elif name in ("POP", "POP_MARK"):
            to_mark() if name == "POP_MARK" else stack.pop()
        elif name in ("PERSID", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise _unsafe(where, shown(arg) if name == "INST" else f"code by {name}")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"{name} is nothing that torch writes")
    raise ValueError("no end")


def _global(name: str, where: str) -> _Global:
    known = name in _REBUILD or name in _ORDERED or _dtype(name) or _HARMLESS.fullmatch(name)
    if not known or len(name) > _MAX_DOTTED:
        raise _unsafe(where, shown(name))
    return _Global(name)


def _call(called: Any, args: Any, where: str) -> Any:
    """What torch would build by calling a name of the pickle; other names are refused."""
    if not isinstance(called, _Global) or not isinstance(args, tuple):
        raise TypeError("calls what is no class")
    if called.name in _ORDERED:
        if not args:
            return {}
        raise ValueError("an OrderedDict with arguments")
    if called.name in _REBUILD:
        tensor = _REBUILD[called.name](args)
        if not isinstance(tensor, Tensor) or not isinstance(tensor.storage, Storage):
            raise TypeError(f"{called.name} of something else")
        return tensor
    return Inert(called.name, args)


def _set_items(target: Any, items: list[Any]) -> None:
    into = target.items if isinstance(target, Inert) else target
    if not isinstance(into, dict) or len(items) % 2:
        raise TypeError("no dictionary to set items of")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < _MAX_INT):
            key = object()  # keeps its place; hashing a nested key can overflow the stack
        if key in into:
            raise ValueError(f"{shown(key)} is there twice")
        into[key] = value


def _storage(described: Any, where: str) -> Storage:
    """A persistent id: ("storage", class, key, device, count) and, in old files, a view."""
    if isinstance(described, tuple) and described and described[0] == "module":
        raise _unsafe(where, "a module with its source code")
    if not isinstance(described, tuple) or len(described) not in (5, 6):
        raise ValueError("a storage that is not described as torch does")
    what, kind, key, _, count = described[:5]
    dtype = _dtype(kind.name) if isinstance(kind, _Global) else None
    if what != "storage" or dtype is None or not isinstance(key, str | int):
        raise ValueError("a storage of an unknown kind")
    if len(described) == 6 and described[5] is not None:
        raise ValueError("a view of a storage, as torch 0.1 wrote them")
    if not isinstance(count, int) or not 0 <= count < 2**48:
        raise ValueError("a storage of absurd size")
    return Storage(dtype, str(key), count)


def _dtype(name: str) -> str | None:
    """The dtype of a torch storage class, under the name that numpy and torch use."""
    module, _, kind = name.rpartition(".")
    return _STORAGES.get(kind) if module in ("torch", "torch.cuda", "torch.storage") else None


def _unsafe(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: unsafe pickle, it calls {what}; refused, nothing of it was run; expected "
        "tensors alone: get a safetensors file, or one that holds only the weights"
    )


_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_ORDERED = ("collections.OrderedDict",)
_REBUILD: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": lambda args: Tensor(*args[:4]),
    "torch._utils._rebuild_tensor_v2": lambda args: Tensor(*args[:4]),
    "torch._utils._rebuild_parameter": lambda args: args[0],
    "torch._utils._rebuild_parameter_with_state": lambda args: args[0],
}
