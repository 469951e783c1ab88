"""Checks that a bundle's ONNX graph uses only what an export writes, over the bundle's own files.

The manifest's hashes prove that somebody wrote this graph. They do not prove that it is harmless: a
graph names files to read, operators to run, loops, and sizes. This module reads all of that before
ONNX Runtime sees the graph. It passes over the file once and does not need the onnx package. It
refuses whatever an export does not write.

The numbers of fields are those of onnx.proto3
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3).
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seechat_weights.bundle.layout import decoder_layout
from seechat_weights.bundle.manifest import Hashed, Manifest
from seechat_weights.bundle.precisions import stored_precision
from seechat_weights.errors import BundleError, CheckpointError
from seechat_weights.files.tensor_view import open_safetensors
from seechat_weights.files.untrusted import open_file
from seechat_weights.plain_text import one_line

MICROSOFT = "com.microsoft"
DOMAINS = ("", "ai.onnx", MICROSOFT)
IR_VERSIONS = range(8, 14)
DECODER_OPERATORS = frozenset(
    (domain, name)
    for domain, names in (
        ("", "Add Cast Concat Constant Gather Gelu If LayerNormalization MatMul Mul Reshape "
             "SimplifiedLayerNormalization Slice Split Squeeze TensorScatter Transpose Where"),
        (MICROSOFT, "GroupQueryAttention MatMulNBits MultiHeadAttention QuickGelu "
                    "RotaryEmbedding"),
    )
    for name in names.split()
)  # fmt: skip
# what torch traces of convolutions and attention: no control flow, no sequences,
# nothing random
VISION_OPERATORS = frozenset(
    (domain, name)
    for domain, names in (
        ("", "Abs Add And ArgMax Attention AveragePool BatchNormalization Cast CastLike Clip "
             "Concat Constant Conv Cos CumSum Div Dropout Elu Equal Erf Exp Expand Flatten "
             "Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool "
             "Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity "
             "InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log "
             "LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg Not Or PRelu Pad Pow Range "
             "Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare "
             "Relu Reshape Resize RMSNormalization Round Shape Sigmoid Sign Sin Slice Softmax "
             "Softplus Split Sqrt Squeeze Sub Swish Tanh Tile Transpose Unsqueeze Where Xor"),
        (MICROSOFT, "MatMulNBits MultiHeadAttention"),
    )
    for name in names.split()
)  # fmt: skip
# a scorer's towers: ViT, ResNet and BERT
TOWER_OPERATORS = frozenset(
    (domain, name)
    for domain, names in (
        ("", "Add AveragePool Cast Concat Constant Conv Div Expand Gather Gelu Gemm Identity "
             "LayerNormalization MatMul Mul ReduceMean Relu Reshape Shape Sigmoid Slice Softmax "
             "Squeeze Transpose Unsqueeze"),
        (MICROSOFT, "MultiHeadAttention"),
    )
    for name in names.split()
)  # fmt: skip
# operators that make a large tensor from a few small numbers
_GROWING = frozenset(["ConstantOfShape", "Expand", "Pad", "Range", "Resize", "Tile"])
_MOST_GROWN = 1 << 27  # numbers
_MOST_COUNT = 1 << 24  # the largest integer that may be a size
_OPEN_END = 1 << 62  # this or more stands for the end of a slice
_MOST_NODES = 200_000  # a decoder of 28 layers has 1700
_MOST_FIELDS = 5_000_000
_MOST_WITHIN = 1 << 16  # bytes that a decoder may hold in its graph: three constants
_MAX_RANK = 8

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_DTYPES = {1: "float32", 2: "uint8", 6: "int32", 7: "int64", 10: "float16"}
# wire types
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _RefusedError(ValueError):
    """A graph is refused; the text says why and follows the file's name."""


class External(NamedTuple):
    """Where a tensor's numbers lie: file, offset and length in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Initializer:
    """A tensor of the graph."""

    name: str
    dtype: int  # TensorProto.DataType
    shape: tuple[int, ...]
    external: External | None
    numbers: tuple[int, ...] = ()  # of a short one of integers that is not external


@dataclass
class Graph:
    """What was found in a graph: its tensors, its operators and the bytes it holds itself."""

    initializers: dict[str, Initializer] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)
    nodes: int = 0
    within: int = 0  # bytes of tensors that lie in the graph itself
    grown: set[str] = field(default_factory=set)  # inputs of operators that can make a large tensor


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Check all graphs of a bundle.

    folder: the bundle's folder.
    manifest: its manifest.

    Raises BundleError.
    """
    decoder, vision = manifest.decoder, manifest.vision
    for graph in (decoder.graph, decoder.half):
        if graph in manifest.files:
            check_decoder(folder, manifest, graph)
    for part in (vision, vision and vision.question):
        for graph in (part.graph, part.half) if part else ():
            if part and graph in manifest.files:
                check_vision(folder, manifest, graph)


def check_decoder(folder: Path, manifest: Manifest, graph: str) -> None:
    """Check that a decoder's graph is what an export writes over its weights file.

    folder: the bundle's folder.
    manifest: its manifest.
    graph: the graph's file: the decoder's own, or its float16 half.

    Raises BundleError.
    """
    decoder = manifest.decoder
    precision = stored_precision(
        decoder.precision, head_bits=decoder.head_bits, zeros=decoder.zeros
    )
    weights = f"{decoder.graph}.data"
    items = decoder_layout(manifest.lm, precision, decoder.block_size)
    places = {
        s.name: (s.dtype, s.shape, External(weights, s.offset, s.nbytes))
        for item in items
        for s in item.stored
    }

    def check(found: Graph) -> None:
        _check_places(found, manifest, places)
        if found.within > _MOST_WITHIN:
            raise _RefusedError(f"{found.within} bytes of constants; expected a few")

    _check(folder / graph, DECODER_OPERATORS, check, branches=True)


def check_vision(folder: Path, manifest: Manifest, graph: str) -> None:
    """Check that a vision graph is what an export writes.

    folder: the bundle's folder.
    manifest: its manifest.
    graph: the graph's file: the tower's, or that of a bridge which reads the question.

    Raises BundleError.
    """
    vision = manifest.vision
    assert vision
    question = vision.question
    asked = question is not None and graph in (question.graph, question.half)
    weights = question.weights if question and asked else vision.weights
    _check_weighted(folder, manifest, graph, weights, VISION_OPERATORS)


def check_tower(folder: Path, manifest: Hashed, graph: str, weights: str) -> None:
    """Check that the graph of a scorer's tower is what an export writes.

    folder: the scorer's folder.
    manifest: its manifest.
    graph: the graph's file.
    weights: the file of its weights.

    Raises BundleError.
    """
    _check_weighted(folder, manifest, graph, weights, TOWER_OPERATORS)


def _check_weighted(
    folder: Path,
    manifest: Hashed,
    graph: str,
    weights: str,
    allowed: frozenset[tuple[str, str]],
) -> None:
    """Check a graph whose weights lie in a safetensors file beside it, if there is one."""

    def check(found: Graph) -> None:
        places = {}
        if weights in manifest.files:
            tensors = open_safetensors(folder / weights)
            places = {
                n: (t.info.dtype, t.info.shape, External(weights, t.block.start, t.block.size))
                for n, t in tensors.items()
            }
        _check_places(found, manifest, places)

    _check(folder / graph, allowed, check, branches=False)


def _check_places(
    found: Graph,
    manifest: Hashed,
    places: Mapping[str, tuple[str, tuple[int, ...], External]],
) -> None:
    """Check that weights beside the graph lie in a listed file, each where the export puts it."""
    for tensor in found.initializers.values():
        if tensor.external is None:
            continue
        file, offset, length = tensor.external
        if file not in manifest.files:
            raise _RefusedError(
                f"weights in {one_line(file)[:80]!r}, which the manifest does not list"
            )
        if offset + length > manifest.files[file].bytes:
            raise _RefusedError(f"weights beyond the end of {file}")
        here = (_DTYPES.get(tensor.dtype), tensor.shape, tensor.external)
        if places.get(tensor.name) != here:
            raise _RefusedError(f"a tensor {one_line(tensor.name)[:80]!r} that is not in {file} so")


def _check(
    path: Path,
    allowed: frozenset[tuple[str, str]],
    check: Callable[[Graph], None],
    *,
    branches: bool,
) -> None:
    try:
        with open_file(path) as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = read_graph(data, branches=branches)
        unknown = sorted(found.operators - allowed)
        if unknown:
            domain, name = unknown[0]
            name = one_line(f"{domain}.{name}".lstrip("."))
            raise _RefusedError(f"the operator {name[:80]}, which no export writes there")
        _check_growth(found)
        check(found)
    except (_RefusedError, CheckpointError) as e:
        raise BundleError(
            f"{path}: the graph has {e}; expected what an export writes: get the bundle "
            "from somebody you trust, or export the model again"
        ) from None
    except (OSError, ValueError) as e:  # an empty file cannot be mapped
        said = (e.strerror if isinstance(e, OSError) else None) or e
        raise BundleError(
            f"{path}: cannot be read ({said}); expected an ONNX file: copy the bundle again"
        ) from None


def _check_growth(found: Graph) -> None:
    for name, tensor in found.initializers.items():
        sizes = [abs(n) for n in tensor.numbers]
        if any(_MOST_COUNT < n < _OPEN_END for n in sizes):
            raise _RefusedError(f"a size of {max(sizes)} in {one_line(name)[:80]!r}")
        if name in found.grown and math.prod(n for n in sizes if n) > _MOST_GROWN:
            raise _RefusedError(f"sizes {sizes} in {one_line(name)[:80]!r}")


# --- protobuf


class _Reader:
    """Reads the fields of protobuf messages in a mapped file, and limits how many."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self._left = _MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, wire type, start and end of each field; a number is given twice instead."""
        at = start
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise _RefusedError(f"more than {_MOST_FIELDS} fields")
            key, at = self.varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, at = self.varint(at, end)
                yield number, kind, value, value
                continue
            if kind == _BYTES:
                size, at = self.varint(at, end)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise _RefusedError("a field of an unknown kind")
            if size > end - at:
                raise _RefusedError("a field beyond its message's end")
            yield number, kind, at, at + size
            at += size

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self.data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value & (2**64 - 1), at
        raise _RefusedError("a number without end")

    def text(self, start: int, end: int) -> str:
        if end - start > 4096:
            raise _RefusedError(f"a name of {end - start} bytes")
        return bytes(self.data[start:end]).decode("utf-8")  # UnicodeDecodeError is a ValueError

    def integers(self, kind: int, start: int, end: int) -> list[int]:
        """The signed integers of a repeated field, packed or not."""
        if kind == _VARINT:
            return [_signed(start)]
        found, at = [], start
        while at < end:
            value, at = self.varint(at, end)
            found.append(_signed(value))
            if len(found) > 64:
                raise _RefusedError("a long list of integers")
        return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def read_graph(data: mmap.mmap | bytes, *, branches: bool) -> Graph:
    """Read a ModelProto.

    data: the file's bytes.
    branches: whether an If may have two graphs, one level deep.

    Raises ValueError for anything that no export writes, whatever the operators.
    """
    reader, graph, version, seen = _Reader(data), Graph(), None, False
    for number, kind, start, end in reader.fields(0, len(data)):
        if number == 1:
            version = start
        elif number == 7:
            if seen or kind != _BYTES:  # protobuf merges messages that come twice
                raise _RefusedError("two graphs")
            seen = True
            _read_graph(reader, start, end, graph, branches=branches)
        elif number == 8:
            _read_opset(reader, kind, start, end)
        elif number in (20, 25, 26):
            raise _RefusedError("functions, training or devices of its own")
    if not seen or version not in IR_VERSIONS:
        raise _RefusedError(f"no graph, or ir_version {version}")
    return graph


def _read_opset(reader: _Reader, kind: int, start: int, end: int) -> None:
    if kind != _BYTES:
        raise _RefusedError("a field of an unknown kind")
    for number, _, start, end in reader.fields(start, end):  # noqa: B020
        if number == 1 and (domain := reader.text(start, end)) not in DOMAINS:
            raise _RefusedError(f"operators of the domain {one_line(domain)[:80]!r}")


def _read_graph(reader: _Reader, start: int, end: int, graph: Graph, *, branches: bool) -> None:
    for number, kind, at, to in reader.fields(start, end):
        if number == 15:
            raise _RefusedError("sparse weights")
        if number not in (1, 5):
            continue
        if kind != _BYTES:
            raise _RefusedError("a field of an unknown kind")
        if number == 1:
            _read_node(reader, at, to, graph, branches=branches)
        else:
            _add(graph, _read_tensor(reader, at, to, graph))


def _add(graph: Graph, tensor: Initializer) -> None:
    if tensor.name in graph.initializers:
        raise _RefusedError(f"two tensors {one_line(tensor.name)[:80]!r}")
    graph.initializers[tensor.name] = tensor


def _read_node(reader: _Reader, start: int, end: int, graph: Graph, *, branches: bool) -> None:
    graph.nodes += 1
    if graph.nodes > _MOST_NODES:
        raise _RefusedError(f"more than {_MOST_NODES} operators")
    names: dict[int, list[str]] = {1: [], 2: [], 4: [], 7: [], 8: []}
    attributes: list[tuple[int, int]] = []
    for number, kind, at, to in reader.fields(start, end):
        if number in names:
            if kind != _BYTES:
                raise _RefusedError("a name that is no text")
            names[number].append(reader.text(at, to))
        elif number == 5 and kind == _BYTES:
            attributes.append((at, to))
    if len(names[4]) != 1 or len(names[7]) > 1 or any(names[8]):
        raise _RefusedError("an operator without a name, or with two")
    (name,), domain = names[4], (names[7] or [""])[0]
    domain = "" if domain == "ai.onnx" else domain
    graph.operators.add((domain, name))
    if name in _GROWING:
        graph.grown.update(names[1])
    for at, to in attributes:
        output = names[2][0] if name == "Constant" and names[2] else ""
        _read_attribute(reader, at, to, graph, output, within=branches and name == "If")


def _read_attribute(
    reader: _Reader, start: int, end: int, graph: Graph, output: str, *, within: bool
) -> None:
    values: list[int] = []
    tensors = graphs = 0
    for number, kind, at, to in reader.fields(start, end):
        if number in (10, 11, 14, 15, 21, 22, 23):
            raise _RefusedError("an attribute of tensors, graphs or types")
        if number in (3, 8) and kind in (_VARINT, _BYTES):
            values += reader.integers(kind, at, to)
        elif number == 5:
            tensors += 1
            if kind != _BYTES or tensors > 1:
                raise _RefusedError("an attribute that is no tensor")
            tensor = _read_tensor(reader, at, to, graph)
            if tensor.external:
                raise _RefusedError("an attribute whose numbers are in a file")
            if output:
                _add(graph, replace(tensor, name=output))
        elif number == 6:
            graphs += 1
            if not within or kind != _BYTES or graphs > 1:
                raise _RefusedError("control flow")
            _read_graph(reader, at, to, graph, branches=False)
    if any(_MOST_COUNT < abs(n) < _OPEN_END for n in values):
        raise _RefusedError(f"a size of {max(map(abs, values))}")
    if output and not tensors:
        _add(graph, Initializer(output, 7, (len(values),), None, tuple(values)))


def _read_tensor(reader: _Reader, start: int, end: int, graph: Graph) -> Initializer:
    shape: list[int] = []
    once: dict[int, list[int]] = {2: [], 14: []}  # data_type, data_location
    names: list[str] = []
    entries: dict[str, str] = {}
    stored, integers = 0, list[int]()
    for number, kind, at, to in reader.fields(start, end):
        if number == 1:
            shape += reader.integers(kind, at, to)
        elif number in once:
            if kind != _VARINT:
                raise _RefusedError("a tensor whose kind is no number")
            once[number].append(at)
        elif number == 8:
            names.append(reader.text(at, to))
        elif number == 13:
            key, value = _read_entry(reader, kind, at, to)
            if key in entries:
                raise _RefusedError(f"a tensor with two of {one_line(key)[:80]!r}")
            entries[key] = value
        elif number in (3, 6):
            raise _RefusedError("a tensor in segments, or of texts")
        elif number in (4, 5, 7, 9, 10, 11):
            if kind != _BYTES:
                to, at = 8, 0  # one number
            stored += to - at
            if number == 9 and once[2] == [7] and to - at <= 64 and (to - at) % 8 == 0:
                integers += np.frombuffer(bytes(reader.data[at:to]), "<i8").tolist()
            elif number == 7 and to - at <= 64:
                integers += reader.integers(kind, at, to)
    if len(once[2]) != 1 or len(once[14]) > 1 or len(names) > 1:
        raise _RefusedError("a tensor that says something twice, or not its kind")
    name, dtype = (names or [""])[0], once[2][0]
    if dtype not in _ITEM_BYTES:
        raise _RefusedError(f"a tensor of the unknown kind {dtype}")
    if len(shape) > _MAX_RANK or any(not 0 <= n < 1 << 40 for n in shape):
        raise _RefusedError(f"a tensor of shape {shape[:9]}")
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    external = None
    if once[14] and once[14][0]:
        if stored or once[14][0] != 1:
            raise _RefusedError("a tensor in two places")
        external = _external(entries)
        if external.length != size:
            raise _RefusedError(f"a tensor of {size} bytes in {external.length}")
    elif entries:
        raise _RefusedError("a tensor in two places")
    elif size > 8 * max(stored, 1):  # a varint may have fewer bytes than its number
        raise _RefusedError(f"a tensor of {size} bytes in {stored}")
    graph.within += 0 if external else max(size, stored)
    return Initializer(name, dtype, tuple(shape), external, tuple(integers))


def _read_entry(reader: _Reader, kind: int, start: int, end: int) -> tuple[str, str]:
    if kind != _BYTES:
        raise _RefusedError("a field of an unknown kind")
    found: dict[int, str] = {}
    for number, kind, at, to in reader.fields(start, end):
        if number in found or number not in (1, 2) or kind != _BYTES:
            raise _RefusedError("a place that is not said as one")
        found[number] = reader.text(at, to)
    return found.get(1, ""), found.get(2, "")


def _external(entries: Mapping[str, str]) -> External:
    """Where a tensor lies. An export always writes all of file, offset and length."""
    if entries.keys() - {"location", "offset", "length"} or not entries.get("location"):
        raise _RefusedError("a tensor whose place is not said")
    numbers = [entries.get(key, "0") for key in ("offset", "length")]
    if not all(n.isascii() and n.isdecimal() and len(n) < 16 for n in numbers):
        raise _RefusedError("a tensor whose place is no number")
    offset, length = map(int, numbers)
    return External(entries["location"], offset, length)
