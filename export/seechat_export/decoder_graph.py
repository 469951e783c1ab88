"""Decoders as ONNX graphs, written node by node: what all LM families share.

A graph is not traced from torch: its attention and its block-quantized products are ONNX Runtime's
own operators, which torch does not have, and building it needs no weights, so that a 13 GB
checkpoint can be written out one tensor at a time (see docs/decisions). The layer of a family is in
a file of its own: chatglm_graph, llama_graph.

The cache is the caller's: past and present are the same buffers, and attention writes into them. It
is float16 unless the weights are float32: half the memory, read faster, and 1e-4 in the logits.

For GPUs a second graph, `half`, computes in float16 over the same weights and has no control flow:
an If has to know the lengths on the host, so that in every layer they would be fetched from the
device, which waits for all work before.

The weights lie in their file as seechat_weights.bundle.layout says, whose order of heads makes
every family's rotary embedding one ordinary rotation. The scale is that of a head's true size.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from seechat_weights.bundle.layout import ArraySpan, TensorLayout, decoder_layout
from seechat_weights.bundle.precisions import Precision
from seechat_weights.config import LMConfig

OPSET, HALF_OPSET = 24, 21  # 24 brought TensorScatter; fewer devices have it
MICROSOFT = "com.microsoft"


def cache_dtype(precision: Precision) -> ir.DataType:
    """What the key/value cache holds."""
    return ir.DataType.from_numpy(np.dtype(precision.cache_dtype))


def hidden_name(layer: int) -> str:
    """Name of a layer's input, [1, s, hidden]; of what the last norm reads after the last layer."""
    return f"layers.{layer}.input" if layer else "inputs_embeds"


class Weights:
    """Graph values for the weights of `items`, which lie in the file `location`.

    dtype: what is computed with; weights stored as another float are cast to it, and ONNX Runtime
    folds the casts away when it loads the graph.
    """

    def __init__(
        self,
        tape: Tape,
        location: str,
        items: list[TensorLayout],
        block_size: int,
        dtype: ir.DataType,
    ) -> None:
        self.tape = tape
        self.location = location
        self.block_size = block_size
        self.dtype = dtype
        self.items = {item.key: item for item in items}

    def vector(self, key: str) -> ir.Value:
        """A bias or a norm's parameter: [size]."""
        (value,) = self._values(self.items[key])
        return value

    def linear(self, x: ir.Value, key: str, *, bias: bool = True) -> ir.Value:
        """x [..., inputs] times the transposed weight [outputs, inputs] (plus bias)."""
        item = self.items[f"{key}.weight"]
        y = self._block_linear(x, item) if item.bits else self._float_linear(x, item)
        return self.tape.op("Add", [y, self.vector(f"{key}.bias")]) if bias else y

    def _float_linear(self, x: ir.Value, item: TensorLayout) -> ir.Value:
        (weight,) = self._values(item)
        return self.tape.op("MatMul", [x, weight])

    def _block_linear(self, x: ir.Value, item: TensorLayout) -> ir.Value:
        attributes = {
            "K": item.shape[1],
            "N": item.shape[0],
            "bits": item.bits,
            "block_size": self.block_size,
        }
        if self.dtype == ir.DataType.FLOAT:
            # the products' inputs are rounded to 8 bits a block, for the CPU's integer kernels
            attributes["accuracy_level"] = 4
        inputs = [x, *self._values(item)]
        return self.tape.op("MatMulNBits", inputs, attributes, domain=MICROSOFT)

    def _values(self, item: TensorLayout) -> list[ir.Value]:
        return [self._value(self._tensor(stored)) for stored in item.stored]

    def _value(self, tensor: ir.ExternalTensor) -> ir.Value:
        value = self.tape.initializer(tensor)
        if tensor.dtype in (ir.DataType.UINT8, self.dtype):
            return value
        return self.tape.op("Cast", [value], {"to": self.dtype})

    def _tensor(self, stored: ArraySpan) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.location,
            stored.offset,
            stored.nbytes,
            ir.DataType.from_numpy(np.dtype(stored.dtype)),
            shape=ir.Shape(stored.shape),
            name=stored.name,
        )


class DecoderGraph:
    """A decoder over weights that lie as bundle.layout.decoder_layout says; families subclass it.

    config, precision, block_size: what the weights were laid out with.
    location: the weights file's name beside the graph.
    prefix_tokens: of a P-tuning prefix, which the caller puts into the cache before anything else.
    half: write the graph for GPUs.

    Inputs of the graph (number: float16 with `half`, else float32; s new tokens, `capacity` the
    length of the cache buffers, t = cached tokens + s):

    inputs_embeds number [1, s, hidden] · rotary_cos, rotary_sin number [s, head / 2] ·
    last_index int32 [1] = t - 1 · total_length int32 [] = t · the family's own `extra_inputs` ·
    logit_rows int64 [r]: of which of the new tokens logits are wanted ·
    past_key_i, past_value_i cache_dtype [1, kv_heads, capacity, head]: `head` is padded_head_size

    Outputs: logits float32 [r, vocab]; present_key_i, present_value_i, to be bound to the very
    buffers of the past.
    """

    def __init__(
        self,
        config: LMConfig,
        precision: Precision,
        block_size: int,
        location: str,
        *,
        prefix_tokens: int = 0,
        half: bool = False,
    ) -> None:
        self.config = config
        self.half = half
        self.prefix_tokens = prefix_tokens
        self.dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT  # what is computed in
        self.kind = cache_dtype(precision)
        self.head = config.padded_head_size
        self.heads, self.kv_heads = config.num_heads, config.kv_heads
        self.cache_shape = [1, self.kv_heads, "capacity", self.head]
        opsets = {"": HALF_OPSET if half else OPSET, MICROSOFT: 1}
        self.graph = ir.Graph((), (), nodes=(), opset_imports=opsets, name="decoder")
        self.tape = Tape(self.graph)
        items = decoder_layout(config, precision, block_size)
        self.weights = Weights(self.tape, location, items, block_size, self.dtype)
        self._presents: list[ir.Value] = []

    def extra_inputs(self) -> None:
        """Declare the inputs that only this family has."""

    def constants(self) -> None:
        """Make the small constants that all layers share."""
        start = ir.tensor(np.zeros(1, np.int64), name="rotary_start")
        self._rotary_start = self.tape.initializer(start)

    def layer(self, x: ir.Value, index: int) -> ir.Value:
        """A whole layer: [1, s, hidden] to the same."""
        raise NotImplementedError

    def norm(self, x: ir.Value, key: str) -> ir.Value:
        """The norm whose parameters are `key`.*; also that before the head, "final_layernorm"."""
        raise NotImplementedError

    def build(self) -> ir.Model:
        """The finished graph."""
        hidden = self.config.hidden_size
        x = embeds = self.declare(hidden_name(0), self.dtype, [1, "s", hidden])
        self.cos = self.declare("rotary_cos", self.dtype, ["s", self.head // 2])
        self.sin = self.declare("rotary_sin", self.dtype, ["s", self.head // 2])
        self.last_index = self.declare("last_index", ir.DataType.INT32, [1])
        self.total_length = self.declare("total_length", ir.DataType.INT32, [])
        self.extra_inputs()
        logit_rows = self.declare("logit_rows", ir.DataType.INT64, ["r"])
        self.constants()
        for i in range(self.config.num_layers):
            x = self.layer(x, i)
            x.name, x.type, x.shape = hidden_name(i + 1), embeds.type, embeds.shape
        batch = self.tape.initializer(ir.tensor(np.array([0]), name="batch"))
        squeezed = self.tape.op("Squeeze", [x, batch])
        rows = self.tape.op("Gather", [squeezed, logit_rows], {"axis": 0})
        logits = self.weights.linear(self.norm(rows, "final_layernorm"), "lm_head", bias=False)
        if self.half:
            logits = self.tape.op("Cast", [logits], {"to": ir.DataType.FLOAT})
        logits.name = "logits"
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["r", self.config.vocab_size])
        self.graph.outputs.extend([logits, *self._presents])
        return ir.Model(self.graph, ir_version=10, producer_name="seechat-lite")

    def declare(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        """An input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def declare_past(self, layer: int) -> list[ir.Value]:
        """A layer's part of the cache: key and value."""
        parts = ("key", "value")
        return [self.declare(f"past_{p}_{layer}", self.kind, self.cache_shape) for p in parts]

    def give_present(self, layer: int, present: list[ir.Value]) -> None:
        """Name what a layer has written into its part of the cache as outputs of the graph."""
        for part, value in zip(("key", "value"), present, strict=True):
            value.name = f"present_{part}_{layer}"
            value.type, value.shape = ir.TensorType(self.kind), ir.Shape(self.cache_shape)
            self._presents.append(value)

    def rotated(self, x: ir.Value, heads: int) -> ir.Value:
        """Queries or keys [1, s, heads * head], turned by their positions."""
        inputs = [x, self._rotary_start, self.cos, self.sin]
        return self.tape.op("RotaryEmbedding", inputs, {"num_heads": heads}, domain=MICROSOFT)

    def cached(self, tape: Tape, x: ir.Value) -> ir.Value:
        """`x` as the cache holds it."""
        return x if self.kind == self.dtype else tape.op("Cast", [x], {"to": self.kind})

    def restored(self, tape: Tape, x: ir.Value) -> ir.Value:
        """`x` out of the cache, as it is computed with."""
        return x if self.kind == self.dtype else tape.op("Cast", [x], {"to": self.dtype})

    def causal(
        self, tape: Tape, q: ir.Value, k: ir.Value, v: ir.Value, past: list[ir.Value]
    ) -> list[ir.Value]:
        """Causal attention behind the cache, which it appends to: output, key, value."""
        out, *present = tape.op_multi_out(
            "GroupQueryAttention",
            [
                *(self.cached(tape, x) for x in (q, k, v)),
                *past,
                self.last_index,
                self.total_length,
            ],
            {
                "num_heads": self.heads,
                "kv_num_heads": self.kv_heads,
                "scale": self.config.head_size**-0.5,
            },
            num_outputs=3,
            domain=MICROSOFT,
        )
        return [self.restored(tape, out), *present]


def branch(name: str, build: Callable[[Tape], list[ir.Value]]) -> ir.Graph:
    """One branch of an If. Names are shared with the outer graph: the branch's bear its own."""
    graph = ir.Graph((), (), nodes=(), name=name)
    graph.outputs.extend(build(Tape(graph)))
    values = (value for node in graph for value in node.outputs)
    for i, value in enumerate(values):
        value.name = f"{name}.{i}"
    return graph
