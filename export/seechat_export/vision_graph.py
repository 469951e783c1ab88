"""Writes vision networks as ONNX: traced without weights, which are then written one at a time.

A traced graph names the network's parameters. What is stored for each is computed only when the
file is written, so that exporting takes the memory of the largest matrix, not of the network.
"""

import contextlib
import copy
import functools
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from seechat_lite.nn.block_quantization import quantize_blocks
from seechat_lite.nn.layer_streaming import Streamed
from seechat_weights.arguments import check_choice
from seechat_weights.bundle.precisions import VISION_PRECISIONS
from seechat_weights.config import VisionConfig, half_graph
from seechat_weights.errors import CheckpointError
from seechat_weights.vision.bundled import BLOCK_SIZE, CODES, HALF, SCALES, TRANSPOSED

OPSET = 21  # opset 23's Attention measured no faster and runs on fewer devices
ACCURACY_LEVEL = 4

Values = Callable[[], np.ndarray]  # float32 or float16


def export_vision(module: nn.Module, config: VisionConfig, path: Path, *, precision: str) -> None:
    """Write a vision module as ONNX: pixel_values [n, 3, S, S] -> image_embeds [n, tokens, hidden].

    A bridge that reads the question gets a graph of its own, see config.QuestionConfig.

    The arithmetic is float32. The weights of a Streamed network go to a file beside the graph,
    VisionConfig.weights. With fp16 and int8 there is a second graph over that file,
    VisionConfig.half, which computes in float16, for GPUs. The weights of any other network are
    kept in the one graph.

    module: a Streamed network, or any network with its weights.
    config: describes it.
    path: the graph to write.
    precision: "fp32"; "fp16" stores matrices as float16; "int8" stores the matrices of products in
        blocks of BLOCK_SIZE.
    """
    check_choice("vision_precision", precision, VISION_PRECISIONS)
    size = config.pixels.image_size
    pixels = Inputs({"pixel_values": torch.zeros(2, 3, size, size)})
    if config.question is None or config.output is None:
        _export(module, pixels, path, precision)
        return
    assert isinstance(module, Streamed)
    _export(module.part("tower"), pixels, path, precision)
    asked = Inputs(
        {
            "seen": torch.zeros(2, *config.output),
            "question_ids": torch.zeros(2, 5, dtype=torch.int64),
        },
        longest=config.question.pieces,
    )
    _export(module.part("bridge"), asked, path.with_name(config.question.graph), precision)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a graph, by name.

    examples: float tensors whose first axis is free, and ids whose second axis is free as well.
    longest: the most ids.
    output: the name of the graph's output.
    """

    examples: dict[str, torch.Tensor]
    longest: int = 0
    output: str = "image_embeds"

    def axes(self) -> tuple[dict[int, Any], ...]:
        """The free axes of each input."""
        n = torch.export.Dim("n", min=1)
        found: list[dict[int, Any]] = []
        for example in self.examples.values():
            ids = not example.is_floating_point()
            length = {1: torch.export.Dim("pieces", min=2, max=self.longest)} if ids else {}
            found.append({0: n, **length})
        return tuple(found)


def _export(module: nn.Module, inputs: Inputs, path: Path, precision: str) -> None:
    """Write a module as a graph at `path`; see export_vision."""
    form = VISION_PRECISIONS[precision]
    with _quiet():
        if isinstance(module, Streamed):
            model = _trace_streamed(module, inputs)
        else:
            model = _trace(module, inputs, optimize=True)
        # the graph would name the exporting machine's source files
        ClearMetadataAndDocStringPass()(model)
        if form.integers:
            _store_as_int8(model.graph)
        if not form.exact:
            _store_as_fp16(model.graph)
        if isinstance(module, Streamed):
            _write_weights(model.graph, path.with_name(f"{path.name}.data"))
        ir.save(model, path)
        if isinstance(module, Streamed) and not form.exact:
            _compute_in_fp16(model.graph)
            ir.save(model, path.with_name(half_graph(path.name)))


def export_tower(module: Streamed, inputs: Inputs, path: Path, *, halves: bool) -> None:
    """Write a scorer's tower as ONNX, and its weights beside it; the arithmetic is float32.

    module: the tower.
    inputs: its one input.
    path: the graph to write.
    halves: store matrices as float16.
    """
    with _quiet():
        model = _trace_streamed(module, inputs)
        ClearMetadataAndDocStringPass()(model)
        if halves:
            _store_as_fp16(model.graph)
        _write_weights(model.graph, path.with_name(f"{path.name}.data"))
        ir.save(model, path)


def _write_weights(graph: ir.Graph, path: Path) -> None:
    """Write lazy tensors to a safetensors file, one at a time, and note where each lies in it.

    ONNX Runtime finds them by their place, every other reader (vision.bundled) by their names.
    """
    kinds = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.UINT8: "U8"}
    lazy = [
        (name, value, value.const_value)
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.LazyTensor)
    ]
    # a matrix's codes and scales are made at once, so they lie side by side
    order: dict[str, int] = {}

    def place(entry: tuple[str, ir.Value, ir.LazyTensor]) -> tuple[bool, int]:
        name = entry[0].partition(CODES)[0].partition(SCALES)[0]
        # float32 first: the other types need less alignment
        return entry[2].dtype != ir.DataType.FLOAT, order.setdefault(name, len(order))

    lazy.sort(key=place)
    header, at = {}, 0
    for name, _, tensor in lazy:
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape.numpy()),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, value, tensor in lazy:
            offset = f.tell()
            f.write(tensor.numpy().data)
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=name,
                base_dir=path.parent,
            )


def _trace(module: nn.Module, inputs: Inputs, *, optimize: bool) -> ir.Model:
    program = torch.onnx.export(
        module,
        tuple(inputs.examples.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs.examples),
        output_names=[inputs.output],
        dynamic_shapes=inputs.axes(),
        optimize=optimize,
        verbose=False,
    )
    assert program is not None  # only the old exporter returns None
    return program.model


def _trace_streamed(module: Streamed, inputs: Inputs) -> ir.Model:
    """Trace a network without weights; its initializers read them when they are written."""
    from onnxscript.optimizer import optimize_ir

    network = copy.deepcopy(module.network)
    shapes = {}
    for prefix, part in network.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            shapes[f"{prefix}.{name}" if prefix else name] = tuple(parameter.shape)
            # one number that looks like the whole parameter: the trace must not take its memory.
            # Not zero, because a bias of zero would be left out
            nothing = torch.full((), torch.nan).expand(parameter.shape)
            setattr(part, name, nn.Parameter(nothing, requires_grad=False))
    model = _trace(network, inputs, optimize=False)
    graph = model.graph
    given = list(graph.inputs)
    values = {name: graph.initializers.pop(name) for name in shapes}
    for value in values.values():  # unknown, so that nothing is computed in advance
        value.const_value = None
        graph.inputs.append(value)
    optimize_ir(model)
    graph.inputs[:] = given
    for name, value in values.items():
        read = functools.partial(module.read, name)
        for node, _ in list(value.uses()):
            if node.op_type == "Transpose":
                _store_transposed(graph, node, shapes[name], read)
        if value.uses():
            value.const_value = _lazy(name, shapes[name], read)
            graph.register_initializer(value)
        elif name + TRANSPOSED not in graph.initializers:
            raise RuntimeError(f"torch {torch.__version__} left {name} out of the vision graph")
    return model


def _store_transposed(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...], read: Values) -> None:
    """Store a matrix as its product takes it: [inputs, outputs]."""
    (matrix,), (old,) = node.inputs, node.outputs
    assert matrix is not None
    new = _initializer(f"{matrix.name}{TRANSPOSED}", shape[::-1], lambda: read().T)
    ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)
    graph.register_initializer(new)


def _initializer(
    name: str, shape: tuple[int, ...], read: Values, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    tensor = _lazy(name, shape, read, dtype)
    return ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(dtype))


def _lazy(
    name: str, shape: tuple[int, ...], read: Values, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.LazyTensor:
    def tensor() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(read(), dtype.numpy())
        if dtype == ir.DataType.FLOAT16 and not np.isfinite(array).all():
            raise CheckpointError(
                f"the vision network's {name.removesuffix(HALF)} has numbers beyond 65504, the "
                "end of float16; expected smaller ones: export with vision_precision fp32",
                options={"vision_precision": "fp32"},
            )
        return ir.tensor(array, name=name)

    return ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)


def _store_as_fp16(graph: ir.Graph) -> None:
    """Store weight matrices as float16; each is cast back to float32 before its users.

    Vectors (biases, layer norms) stay as they are: they are small, and rounding them shows. The
    casts come first in the graph. ONNX Runtime orders a graph by going back from its outputs, first
    to the later one of a node's inputs, so that each cast then runs right before its user. If the
    casts are not folded, only one matrix at a time is held in float32.
    """
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        shape = tuple(tensor.shape.numpy())
        stored = _initializer(name + HALF, shape, tensor.numpy, ir.DataType.FLOAT16)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        (back,) = cast.outputs
        back.name, back.dtype, back.shape = f"{name}.fp32", ir.DataType.FLOAT, value.shape
        ir.convenience.replace_all_uses_with(value, back)
        graph.register_initializer(stored)
        del graph.initializers[name]
        graph.insert_before(graph[0], cast)


def _store_as_int8(graph: ir.Graph) -> None:
    """Replace products with stored matrices by MatMulNBits, which keeps them in 8 bits.

    Convolutions, embeddings and vectors are left as they are.
    """
    matrices: dict[str, Callable[[], np.ndarray]] = {}

    # codes and scales of a matrix are two tensors of the file, written in turn
    @functools.lru_cache(maxsize=1)
    def quantized(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.from_numpy(np.ascontiguousarray(matrices[name]().T))
        return quantize_blocks(weight, bits=8, block_size=BLOCK_SIZE)

    for node in list(graph):
        matrix = node.inputs[1] if node.op_type == "MatMul" else None
        tensor = matrix.const_value if matrix else None
        if matrix is None or tensor is None or len(tensor.shape) != 2:
            continue
        name, (inputs, outputs) = str(matrix.name), tensor.shape.numpy()
        blocks = -(-inputs // BLOCK_SIZE)
        matrices[name] = tensor.numpy
        codes = _initializer(
            name + CODES,
            (outputs, blocks, BLOCK_SIZE),
            lambda name=name: quantized(name)[0].numpy(),
            ir.DataType.UINT8,
        )
        scales = _initializer(
            name + SCALES, (outputs, blocks), lambda name=name: quantized(name)[1].numpy()
        )
        attributes = {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK_SIZE}
        attributes["accuracy_level"] = ACCURACY_LEVEL
        product = ir.node(
            "MatMulNBits", [node.inputs[0], codes, scales], attributes, domain="com.microsoft"
        )
        (new,), (old,) = product.outputs, node.outputs
        new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.insert_before(node, product)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        graph.register_initializer(codes)
        graph.register_initializer(scales)
        if not matrix.uses():
            del graph.initializers[name]
    graph.opset_imports.setdefault("com.microsoft", 1)


def _compute_in_fp16(graph: ir.Graph) -> None:
    """Make the arithmetic float16; pixels and embeddings stay float32."""
    full, half = ir.DataType.FLOAT, ir.DataType.FLOAT16
    for node in list(graph):
        if node.op_type == "Cast" and node.outputs[0].dtype == full:  # the cast of a stored matrix
            (stored,), (widened,) = node.inputs, node.outputs
            assert stored is not None and stored.dtype == half
            ir.convenience.replace_all_uses_with(widened, stored)
            graph.remove(node, safe=True)
    for node in graph:
        node.attributes.pop("accuracy_level", None)  # for the CPU
        for value in node.outputs:
            if value.dtype == full:
                value.dtype = half
    for value in [*graph.inputs, *graph.initializers.values()]:
        if value.dtype == full:
            users = list(value.uses())
            cast = ir.node("Cast", [value], {"to": half.value})
            cast.outputs[0].name = f"{value.name}.fp16"
            for user, place in users:
                user.replace_input_with(place, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    (found,) = graph.outputs
    cast = ir.node("Cast", [found], {"to": full.value})
    (new,) = cast.outputs
    new.name, new.dtype, new.shape = found.name, full, found.shape
    found.name = f"{found.name}.fp16"
    graph.append(cast)
    graph.outputs[:] = [new]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter: its warnings, log lines and prints."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
