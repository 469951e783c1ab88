"""Writes decoders as ONNX graphs, node by node: the part that all LM families share.

A graph is not traced from torch. Its attention and its block-quantized products are ONNX Runtime's
own operators, which torch does not have. Building it needs no weights either, so that a 13 GB
checkpoint can be written out one tensor at a time (see docs/decisions). The layer of a family is in
a file of its own, such as chatglm_graph.

The cache belongs to the caller: past and present are the same buffers, and attention writes into
them. It is float16 unless the weights are float32. This takes half the memory, is read faster, and
changes the logits by 1e-4.

A call appends either several tokens to one sequence, or one token to each of several sequences (b).
Their caches are the rows of one buffer. All weights are read once in either case.

For GPUs a second graph, `half`, computes in float16 over the same weights and has no control flow.
An If must know the lengths on the host; every layer would fetch them from the device, and that
waits for all work before.

The weights lie in their file as seechat_weights.bundle.layout says. Its order of heads makes every
family's rotary embedding one ordinary rotation. The scale is that of a head's true size.
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
    """The type of the key/value cache.

    precision: of the weights.
    """
    return ir.DataType.from_numpy(np.dtype(precision.cache_dtype))


def hidden_name(layer: int) -> str:
    """The name of a layer's input, [b, s, hidden].

    layer: its number; the number of layers gives the input of the last norm.
    """
    return f"layers.{layer}.input" if layer else "inputs_embeds"


class Weights:
    """Makes graph values for weights that lie in a file.

    tape: the graph being built.
    location: the file's name.
    items: where each weight lies.
    block_size: inputs that share a scale.
    dtype: what is computed with. Weights stored as another float are cast to it; ONNX Runtime folds
        the casts away when it loads the graph.
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
        """A bias or a norm's parameter, [size].

        key: our name of the tensor.
        """
        (value,) = self._values(self.items[key])
        return value

    def linear(self, x: ir.Value, key: str, *, bias: bool = True) -> ir.Value:
        """x times a transposed weight [outputs, inputs], plus its bias.

        x: [..., inputs].
        key: our name of the linear.
        bias: whether it has a bias.
        """
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
            # the CPU's integer kernels round the products' inputs to 8 bits a block
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
    prefix_tokens: length of a P-tuning prefix; the caller puts it into the cache before anything
        else.
    half: write the graph for GPUs.

    Inputs of the graph (number: float16 with `half`, else float32; b sequences, each with s new
    tokens, b or s is 1; `capacity` the length of the cache buffers, t = cached tokens + s of each
    sequence):

    inputs_embeds number [b, s, hidden] · rotary_cos, rotary_sin number [b * s, head / 2] ·
    rotary_row int64 [b, s]: the row of these for each token · last_index int32 [b] = t - 1 ·
    total_length int32 []: the largest t · the family's own `extra_inputs` ·
    logit_rows int64 [r]: the new tokens, of all b * s, whose logits are wanted ·
    past_key_i, past_value_i cache_dtype [b, kv_heads, capacity, head]: `head` is padded_head_size

    Outputs: logits float32 [r, vocab]; present_key_i, present_value_i, to be bound to the same
    buffers as the past.
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
        # the graph computes in this type
        self.dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        self.kind = cache_dtype(precision)
        self.head = config.padded_head_size
        self.heads, self.kv_heads = config.num_heads, config.kv_heads
        self.cache_shape = ["b", self.kv_heads, "capacity", self.head]
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

    def layer(self, x: ir.Value, index: int) -> ir.Value:
        """Add a whole layer; returns its output, [b, s, hidden].

        x: its input, [b, s, hidden].
        index: the layer's number.
        """
        raise NotImplementedError

    def norm(self, x: ir.Value, key: str) -> ir.Value:
        """Add a norm.

        x: its input.
        key: the start of its parameters' names; "final_layernorm" is the norm before the head.
        """
        raise NotImplementedError

    def build(self) -> ir.Model:
        """Return the finished graph."""
        hidden = self.config.hidden_size
        x = embeds = self.declare(hidden_name(0), self.dtype, ["b", "s", hidden])
        self.cos = self.declare("rotary_cos", self.dtype, ["tokens", self.head // 2])
        self.sin = self.declare("rotary_sin", self.dtype, ["tokens", self.head // 2])
        self.rotary_row = self.declare("rotary_row", ir.DataType.INT64, ["b", "s"])
        self.last_index = self.declare("last_index", ir.DataType.INT32, ["b"])
        self.total_length = self.declare("total_length", ir.DataType.INT32, [])
        self.extra_inputs()
        logit_rows = self.declare("logit_rows", ir.DataType.INT64, ["r"])
        self.constants()
        for i in range(self.config.num_layers):
            x = self.layer(x, i)
            x.name, x.type, x.shape = hidden_name(i + 1), embeds.type, embeds.shape
        tokens = self.tape.initializer(ir.tensor(np.array([-1, hidden]), name="tokens"))
        flat = self.tape.op("Reshape", [x, tokens])
        rows = self.tape.op("Gather", [flat, logit_rows], {"axis": 0})
        logits = self.weights.linear(self.norm(rows, "final_layernorm"), "lm_head", bias=False)
        if self.half:
            logits = self.tape.op("Cast", [logits], {"to": ir.DataType.FLOAT})
        logits.name = "logits"
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["r", self.config.vocab_size])
        self.graph.outputs.extend([logits, *self._presents])
        return ir.Model(self.graph, ir_version=10, producer_name="seechat-lite")

    def declare(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        """Add an input to the graph.

        name, dtype, shape: of the input.
        """
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def declare_past(self, layer: int) -> list[ir.Value]:
        """Add a layer's part of the cache as inputs: key and value.

        layer: its number.
        """
        parts = ("key", "value")
        return [self.declare(f"past_{p}_{layer}", self.kind, self.cache_shape) for p in parts]

    def give_present(self, layer: int, present: list[ir.Value]) -> None:
        """Make what a layer wrote into its part of the cache outputs of the graph.

        layer: its number.
        present: key and value.
        """
        for part, value in zip(("key", "value"), present, strict=True):
            value.name = f"present_{part}_{layer}"
            value.type, value.shape = ir.TensorType(self.kind), ir.Shape(self.cache_shape)
            self._presents.append(value)

    def rotated(self, x: ir.Value, heads: int) -> ir.Value:
        """Rotate queries or keys by their positions.

        x: [b, s, heads * head].
        heads: how many.
        """
        inputs = [x, self.rotary_row, self.cos, self.sin]
        return self.tape.op("RotaryEmbedding", inputs, {"num_heads": heads}, domain=MICROSOFT)

    def cached(self, tape: Tape, x: ir.Value) -> ir.Value:
        """Cast `x` to the type of the cache."""
        return x if self.kind == self.dtype else tape.op("Cast", [x], {"to": self.kind})

    def restored(self, tape: Tape, x: ir.Value) -> ir.Value:
        """Cast `x` from the cache to the type of the computation."""
        return x if self.kind == self.dtype else tape.op("Cast", [x], {"to": self.dtype})

    def causal(
        self, tape: Tape, q: ir.Value, k: ir.Value, v: ir.Value, past: list[ir.Value]
    ) -> list[ir.Value]:
        """Causal attention behind the cache, which it appends to; returns output, key, value."""
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
    """One branch of an If.

    The outer graph and the branch share one set of names, so the branch's names begin with its own.

    name: the branch's name.
    build: adds the nodes and returns the outputs.
    """
    graph = ir.Graph((), (), nodes=(), name=name)
    graph.outputs.extend(build(Tape(graph)))
    values = (value for node in graph for value in node.outputs)
    for i, value in enumerate(values):
        value.name = f"{name}.{i}"
    return graph
