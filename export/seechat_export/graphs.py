"""The decoder as an ONNX graph, written node by node, and the layout of its weights on disk.

The graph is not traced from torch: its attention and its block-quantized products are ONNX
Runtime's own operators, which torch does not have, and building it needs no weights, so that a
13 GB checkpoint can be written out one tensor at a time (see docs/decisions.md).

    inputs_embeds [1, s, hidden]
      └─ per layer: LayerNorm ─ qkv ─ rotary(q, k) ─ If bidirectional:
                        │           then MultiHeadAttention, TensorScatter into the cache
                        │           else GroupQueryAttention: causal, appends to the cache
                        ├─ * ALPHA ─── + ── dense ──┘
                        └─ LayerNorm ─ MLP, the same way
      └─ chosen rows ─ LayerNorm ─ lm_head ─ logits [r, vocab]

The cache is the caller's: past and present are the same buffers, and both branches write into them.
It is float16 unless the weights are float32: half the memory, read faster, and 1e-4 in the logits.

Two rearrangements happen to the query_key_value rows; both leave every product as it was:
- the published order [head][q | k | v][head_size] becomes [q | k | v][head][head_size];
- within a head of q and k, the quarters [a1 a2 b1 b2] become [a1 b1 a2 b2], which makes the
  two-dimensional rotary embedding one ordinary rotation whose angles come from two positions.
A head whose size is no multiple of 8, which GroupQueryAttention wants, has each quarter padded with
zeros; the scale stays that of the true size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from seechat_lite.nn.chatglm import ALPHA
from seechat_weights.bundle import LMConfig
from seechat_weights.precisions import Precision

OPSET = 24  # TensorScatter
MICROSOFT = "com.microsoft"
ALIGN = 4096  # a page: lets the runtime map each tensor straight from the file


@dataclass(frozen=True)
class Stored:
    """One array in the weights file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Item:
    """One of our tensors and the arrays stored for it.

    kind: "vector", stored as it is, or "linear", stored as the precision says. shape: the
    tensor's, [outputs, inputs] of a linear, once its heads are rearranged. heads: which axis runs
    over heads and is rearranged first: "rows" (query_key_value), "columns" (the attention's dense)
    or "" for neither. bits: of the integers of a linear in blocks, else 0.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    heads: str
    stored: tuple[Stored, ...]
    bits: int = 0


def padded_head_size(config: LMConfig) -> int:
    """Size of a head in the graph and its cache: the next multiple of 8."""
    return -(-config.head_size // 8) * 8


def cache_dtype(precision: Precision) -> ir.DataType:
    """What the key/value cache holds."""
    exact = precision.dtype == "float32" and not precision.block
    return ir.DataType.FLOAT if exact else ir.DataType.FLOAT16


def hidden_name(layer: int) -> str:
    """Name of a layer's input, float32 [1, s, hidden]; of the last norm's after the last layer."""
    return f"layers.{layer}.input" if layer else "inputs_embeds"


class Weights:
    """Hands out graph values for weights and lays their bytes out one after another."""

    def __init__(self, tape: Tape, location: str, precision: Precision, block_size: int) -> None:
        self.tape = tape
        self.location = location
        self.precision = precision
        self.block_size = block_size
        self.items: list[Item] = []
        self.end = 0

    def vector(self, key: str, size: int, *, heads: str = "") -> ir.Value:
        """A bias or a norm's parameter: float32 [size], never quantized."""
        (stored,), (value,) = self._place([(key, "float32", (size,))])
        self.items.append(Item(key, "vector", (size,), heads, (stored,)))
        return value

    def linear(
        self,
        x: ir.Value,
        key: str,
        outputs: int,
        inputs: int,
        *,
        bias: bool = True,
        heads: str = "",
        bits: int = 0,
    ) -> ir.Value:
        """x [..., inputs] times the transposed weight [outputs, inputs] (plus bias).

        bits: of a weight in blocks, if not those of the precision.
        """
        if self.precision.block:
            bits = bits or self.precision.bits
            y = self._block_linear(x, key, outputs, inputs, heads, bits)
        else:
            y = self._float_linear(x, key, outputs, inputs, heads)
        if not bias:
            return y
        rows = heads if heads == "rows" else ""
        return self.tape.op("Add", [y, self.vector(f"{key}.bias", outputs, heads=rows)])

    def _float_linear(
        self, x: ir.Value, key: str, outputs: int, inputs: int, heads: str
    ) -> ir.Value:
        arrays = [(f"{key}.weight_t", self.precision.dtype, (inputs, outputs))]
        stored, (weight,) = self._place(arrays)
        self.items.append(Item(f"{key}.weight", "linear", (outputs, inputs), heads, stored))
        if self.precision.dtype != "float32":  # folded away when the graph is loaded on a CPU
            weight = self.tape.op("Cast", [weight], {"to": ir.DataType.FLOAT})
        return self.tape.op("MatMul", [x, weight])

    def _block_linear(
        self, x: ir.Value, key: str, outputs: int, inputs: int, heads: str, bits: int
    ) -> ir.Value:
        block = self.block_size
        blocks = -(-inputs // block)
        arrays = [
            (f"{key}.quant", "uint8", (outputs, blocks, block * bits // 8)),
            (f"{key}.scales", self.precision.dtype, (outputs, blocks)),
        ]
        stored, (quant, scales) = self._place(arrays)
        self.items.append(Item(f"{key}.weight", "linear", (outputs, inputs), heads, stored, bits))
        # accuracy_level 4: the products' inputs are rounded to 8 bits a block, for integer kernels
        attributes = {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": block,
            "accuracy_level": 4,
        }
        return self.tape.op("MatMulNBits", [x, quant, scales], attributes, domain=MICROSOFT)

    def _place(
        self, arrays: list[tuple[str, str, tuple[int, ...]]]
    ) -> tuple[tuple[Stored, ...], list[ir.Value]]:
        stored, values = [], []
        for name, dtype, shape in arrays:
            one = Stored(name, dtype, shape, -(-self.end // ALIGN) * ALIGN)
            self.end = one.offset + one.nbytes
            tensor = ir.ExternalTensor(
                self.location,
                one.offset,
                one.nbytes,
                ir.DataType.from_numpy(np.dtype(dtype)),
                shape=ir.Shape(shape),
                name=name,
            )
            stored.append(one)
            values.append(self.tape.initializer(tensor))
        return tuple(stored), values


def decoder(
    config: LMConfig,
    precision: Precision,
    block_size: int,
    location: str,
    *,
    prefix_tokens: int = 0,
) -> tuple[ir.Model, list[Item], int]:
    """The decoder graph, the items of its weights file in file order, and the file's bytes.

    `location` is the weights file's name beside the graph. prefix_tokens: of a P-tuning prefix,
    which the caller puts into the cache before anything else. Inputs of the graph (s new tokens,
    `capacity` the length of the cache buffers, t = cached tokens + s):

    inputs_embeds float32 [1, s, hidden] · rotary_cos, rotary_sin float32 [s, head / 2] ·
    last_index int32 [1] = t - 1 · total_length int32 [] = t · bidirectional bool [] ·
    logit_rows int64 [r]: of which of the new tokens logits are wanted ·
    past_key_i, past_value_i cache_dtype [1, heads, capacity, head], with `head` as padded_head_size

    Outputs: logits float32 [r, vocab]; present_key_i, present_value_i, to be bound to the very
    buffers of the past. A bidirectional call must start with a cache that holds the prefix alone.
    """
    graph = ir.Graph((), (), nodes=(), opset_imports={"": OPSET, MICROSOFT: 1}, name="decoder")
    tape = Tape(graph)
    weights = Weights(tape, location, precision, block_size)
    hidden, heads = config.hidden_size, config.num_heads

    def declare(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        graph.inputs.append(value)
        return value

    x = embeds = declare(hidden_name(0), ir.DataType.FLOAT, [1, "s", hidden])
    head = padded_head_size(config)
    half, width = head // 2, heads * head
    cos = declare("rotary_cos", ir.DataType.FLOAT, ["s", half])
    sin = declare("rotary_sin", ir.DataType.FLOAT, ["s", half])
    last_index = declare("last_index", ir.DataType.INT32, [1])
    total_length = declare("total_length", ir.DataType.INT32, [])
    bidirectional = declare("bidirectional", ir.DataType.BOOL, [])
    logit_rows = declare("logit_rows", ir.DataType.INT64, ["r"])
    rotary_start = tape.initializer(ir.tensor(np.zeros(1, np.int64), name="rotary_start"))
    alpha = tape.initializer(ir.tensor(np.float32(ALPHA), name="alpha"))
    split_heads = tape.initializer(ir.tensor(np.array([1, -1, heads, head]), name="split_heads"))
    first_place = tape.initializer(ir.tensor(np.array([prefix_tokens]), name="first_place"))
    scale = config.head_size**-0.5
    kind, cache_shape = cache_dtype(precision), [1, heads, "capacity", head]
    presents: list[ir.Value] = []

    def norm(x: ir.Value, key: str) -> ir.Value:
        scale, bias = weights.vector(f"{key}.weight", hidden), weights.vector(f"{key}.bias", hidden)
        attributes = {"axis": -1, "epsilon": config.layernorm_epsilon}
        return tape.op("LayerNormalization", [x, scale, bias], attributes)

    def residual(x: ir.Value, branch: Callable[[ir.Value], ir.Value]) -> ir.Value:
        return tape.op("Add", [tape.op("Mul", [x, alpha]), branch(x)])

    def attention(x: ir.Value, layer: int) -> ir.Value:
        prefix = f"layers.{layer}.attention"
        fused = weights.linear(x, f"{prefix}.query_key_value", 3 * width, hidden, heads="rows")
        q, k, v = tape.op_multi_out("Split", [fused], {"axis": -1, "num_outputs": 3}, num_outputs=3)
        rotary = {"num_heads": heads}
        q, k = (
            tape.op("RotaryEmbedding", [t, rotary_start, cos, sin], rotary, domain=MICROSOFT)
            for t in (q, k)
        )
        past = [declare(f"past_{part}_{layer}", kind, cache_shape) for part in ("key", "value")]

        def cached(t: Tape, x: ir.Value) -> ir.Value:
            return x if kind == ir.DataType.FLOAT else t.op("Cast", [x], {"to": kind})

        # GroupQueryAttention is causal, and the context of a prompt is not. There all new tokens
        # see each other, which needs no cache: MultiHeadAttention never holds all the scores
        def full(t: Tape) -> list[ir.Value]:
            kept = [
                t.op("Transpose", [t.op("Reshape", [x, split_heads])], {"perm": (0, 2, 1, 3)})
                for x in (k, v)
            ]
            presents = [
                t.op("TensorScatter", [p, cached(t, x), first_place], {"axis": 2})
                for p, x in zip(past, kept, strict=True)
            ]
            seen = [k, v]
            if prefix_tokens:
                seen = [seen_from_start(t, p) for p in presents]
            attributes = {"num_heads": heads, "scale": scale}
            return [t.op("MultiHeadAttention", [q, *seen], attributes, domain=MICROSOFT), *presents]

        def seen_from_start(t: Tape, present: ir.Value) -> ir.Value:  # [1, heads, t, head]
            zero, two = (t.op("Constant", [], {"value_ints": [i]}) for i in (0, 2))
            length = t.op("Reshape", [total_length, t.op("Constant", [], {"value_ints": [1]})])
            length = t.op("Cast", [length], {"to": ir.DataType.INT64})
            return t.op(
                "Cast",
                [t.op("Slice", [present, zero, length, two])],
                {"to": ir.DataType.FLOAT},
            )

        def causal(t: Tape) -> list[ir.Value]:
            out, *presents = t.op_multi_out(
                "GroupQueryAttention",
                [*(cached(t, x) for x in (q, k, v)), *past, last_index, total_length],
                {"num_heads": heads, "kv_num_heads": heads, "scale": scale},
                num_outputs=3,
                domain=MICROSOFT,
            )
            return [t.op("Cast", [out], {"to": ir.DataType.FLOAT}), *presents]

        chosen, *present = tape.op_multi_out(
            "If",
            [bidirectional],
            {
                "then_branch": _branch(f"{prefix}.full", full),
                "else_branch": _branch(f"{prefix}.causal", causal),
            },
            num_outputs=3,
        )
        for part, value in zip(("key", "value"), present, strict=True):
            value.name = f"present_{part}_{layer}"
            value.type, value.shape = ir.TensorType(kind), ir.Shape(cache_shape)
            presents.append(value)
        return weights.linear(chosen, f"{prefix}.dense", hidden, width, heads="columns")

    def mlp(x: ir.Value, layer: int) -> ir.Value:
        prefix = f"layers.{layer}.mlp"
        wide = weights.linear(x, f"{prefix}.dense_h_to_4h", config.inner_size, hidden)
        wide = tape.op("Gelu", [wide], {"approximate": "tanh"})
        return weights.linear(wide, f"{prefix}.dense_4h_to_h", hidden, config.inner_size)

    for i in range(config.num_layers):
        x = residual(norm(x, f"layers.{i}.input_layernorm"), lambda x, i=i: attention(x, i))
        x = residual(norm(x, f"layers.{i}.post_attention_layernorm"), lambda x, i=i: mlp(x, i))
        x.name, x.type, x.shape = hidden_name(i + 1), embeds.type, embeds.shape

    batch = tape.initializer(ir.tensor(np.array([0]), name="batch"))
    rows = tape.op("Gather", [tape.op("Squeeze", [x, batch]), logit_rows], {"axis": 0})
    x = norm(rows, "final_layernorm")  # [r, hidden]
    bits = precision.head_bits
    logits = weights.linear(x, "lm_head", config.vocab_size, hidden, bias=False, bits=bits)
    logits.name = "logits"
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["r", config.vocab_size])
    graph.outputs.extend([logits, *presents])
    return ir.Model(graph, ir_version=10, producer_name="seechat-lite"), weights.items, weights.end


def _branch(name: str, build: Callable[[Tape], list[ir.Value]]) -> ir.Graph:
    """One branch of an If. Names are shared with the outer graph: the branch's bear its own."""
    graph = ir.Graph((), (), nodes=(), name=name)
    graph.outputs.extend(build(Tape(graph)))
    values = (value for node in graph for value in node.outputs)
    for i, value in enumerate(values):
        value.name = f"{name}.{i}"
    return graph
