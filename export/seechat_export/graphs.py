"""The decoder as an ONNX graph, written node by node, and the layout of its weights on disk.

The graph is not traced from torch: its attention and its block-quantized products are ONNX
Runtime's own operators, which torch does not have, and building it needs no weights, so that a
13 GB checkpoint can be written out one tensor at a time (see docs/decisions/runtime.md).

    inputs_embeds [1, s, hidden]
      └─ per layer: LayerNorm ─ qkv ─ rotary(q, k) ─ If bidirectional:
                        │           then MultiHeadAttention, TensorScatter into the cache
                        │           else GroupQueryAttention: causal, appends to the cache
                        ├─ * ALPHA ─── + ── dense ──┘
                        └─ LayerNorm ─ MLP, the same way
      └─ chosen rows ─ LayerNorm ─ lm_head ─ logits [r, vocab]

The cache is the caller's: past and present are the same buffers, and both branches write into them.
It is float16 unless the weights are float32: half the memory, read faster, and 1e-4 in the logits.

For GPUs the same is written once more, over the same weights, in float16 and without the If:
GroupQueryAttention fills the cache in every call, and a Where takes either its output or that of
MultiHeadAttention, which costs next to nothing for one token. An If has to know the lengths on the
host: in every layer they would be fetched from the device, which waits for all work before.

The weights lie in their file as seechat_weights.layout says, whose order of heads makes the
two-dimensional rotary embedding one ordinary rotation; the scale stays that of a head's true size.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from seechat_lite.nn.chatglm import ALPHA
from seechat_weights.bundle import LMConfig
from seechat_weights.layout import Item, Stored, decoder_layout
from seechat_weights.precisions import Precision

OPSET, HALF_OPSET = 24, 21  # 24 brought TensorScatter; fewer devices have it
MICROSOFT = "com.microsoft"


def cache_dtype(precision: Precision) -> ir.DataType:
    """What the key/value cache holds."""
    return ir.DataType.FLOAT if precision.exact else ir.DataType.FLOAT16


def hidden_name(layer: int) -> str:
    """Name of a layer's input, [1, s, hidden]; of the last norm's after the last layer."""
    return f"layers.{layer}.input" if layer else "inputs_embeds"


class Weights:
    """Graph values for the weights of `items`, which lie in the file `location`.

    dtype: what is computed with; weights stored as another float are cast to it, and ONNX Runtime
    folds the casts away when it loads the graph.
    """

    def __init__(
        self, tape: Tape, location: str, items: list[Item], block_size: int, dtype: ir.DataType
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

    def _float_linear(self, x: ir.Value, item: Item) -> ir.Value:
        (weight,) = self._values(item)
        return self.tape.op("MatMul", [x, weight])

    def _block_linear(self, x: ir.Value, item: Item) -> ir.Value:
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

    def _values(self, item: Item) -> list[ir.Value]:
        return [self._value(self._tensor(stored)) for stored in item.stored]

    def _value(self, tensor: ir.ExternalTensor) -> ir.Value:
        value = self.tape.initializer(tensor)
        if tensor.dtype in (ir.DataType.UINT8, self.dtype):
            return value
        return self.tape.op("Cast", [value], {"to": self.dtype})

    def _tensor(self, stored: Stored) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.location,
            stored.offset,
            stored.nbytes,
            ir.DataType.from_numpy(np.dtype(stored.dtype)),
            shape=ir.Shape(stored.shape),
            name=stored.name,
        )


def decoder(
    config: LMConfig,
    precision: Precision,
    block_size: int,
    location: str,
    *,
    prefix_tokens: int = 0,
    half: bool = False,
) -> ir.Model:
    """The decoder graph, over the weights of seechat_weights.layout.decoder_layout.

    `location` is the weights file's name beside the graph. prefix_tokens: of a P-tuning prefix,
    which the caller puts into the cache before anything else. half: the graph for GPUs. Inputs of
    the graph (number: float16 with `half`, else float32; s new tokens, `capacity` the length of the
    cache buffers, t = cached tokens + s):

    inputs_embeds number [1, s, hidden] · rotary_cos, rotary_sin number [s, head / 2] ·
    last_index int32 [1] = t - 1 · total_length int32 [] = t · bidirectional bool [] ·
    logit_rows int64 [r]: of which of the new tokens logits are wanted ·
    past_key_i, past_value_i cache_dtype [1, heads, capacity, head], with `head` as padded_head_size

    Outputs: logits float32 [r, vocab]; present_key_i, present_value_i, to be bound to the very
    buffers of the past. A bidirectional call must start with a cache that holds the prefix alone.
    """
    opsets = {"": HALF_OPSET if half else OPSET, MICROSOFT: 1}
    graph = ir.Graph((), (), nodes=(), opset_imports=opsets, name="decoder")
    tape = Tape(graph)
    dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    items = decoder_layout(config, precision, block_size)
    weights = Weights(tape, location, items, block_size, dtype)
    hidden, heads = config.hidden_size, config.num_heads

    def declare(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        graph.inputs.append(value)
        return value

    x = embeds = declare(hidden_name(0), dtype, [1, "s", hidden])
    head = config.padded_head_size
    cos = declare("rotary_cos", dtype, ["s", head // 2])
    sin = declare("rotary_sin", dtype, ["s", head // 2])
    last_index = declare("last_index", ir.DataType.INT32, [1])
    total_length = declare("total_length", ir.DataType.INT32, [])
    bidirectional = declare("bidirectional", ir.DataType.BOOL, [])
    logit_rows = declare("logit_rows", ir.DataType.INT64, ["r"])
    rotary_start = tape.initializer(ir.tensor(np.zeros(1, np.int64), name="rotary_start"))
    alpha = tape.initializer(ir.tensor(dtype.numpy().type(ALPHA), name="alpha"))
    scale = config.head_size**-0.5
    kind, cache_shape = cache_dtype(precision), [1, heads, "capacity", head]
    presents: list[ir.Value] = []

    def norm(x: ir.Value, key: str) -> ir.Value:
        scale, bias = weights.vector(f"{key}.weight"), weights.vector(f"{key}.bias")
        attributes = {"axis": -1, "epsilon": config.layernorm_epsilon}
        return tape.op("LayerNormalization", [x, scale, bias], attributes)

    def residual(x: ir.Value, branch: Callable[[ir.Value], ir.Value]) -> ir.Value:
        return tape.op("Add", [tape.op("Mul", [x, alpha]), branch(x)])

    def attention(x: ir.Value, layer: int) -> ir.Value:
        prefix = f"layers.{layer}.attention"
        fused = weights.linear(x, f"{prefix}.query_key_value")
        q, k, v = tape.op_multi_out("Split", [fused], {"axis": -1, "num_outputs": 3}, num_outputs=3)
        rotary = {"num_heads": heads}
        q, k = (
            tape.op("RotaryEmbedding", [t, rotary_start, cos, sin], rotary, domain=MICROSOFT)
            for t in (q, k)
        )
        past = [declare(f"past_{part}_{layer}", kind, cache_shape) for part in ("key", "value")]

        def cached(t: Tape, x: ir.Value) -> ir.Value:
            return x if kind == dtype else t.op("Cast", [x], {"to": kind})

        def restored(t: Tape, x: ir.Value) -> ir.Value:
            return x if kind == dtype else t.op("Cast", [x], {"to": dtype})

        def constant(t: Tape, *numbers: int) -> ir.Value:
            return t.op("Constant", [], {"value_ints": numbers})

        def heads_first(t: Tape, x: ir.Value) -> ir.Value:  # [1, heads, s, head]
            split = t.op("Reshape", [x, constant(t, 1, -1, heads, head)])
            return t.op("Transpose", [split], {"perm": (0, 2, 1, 3)})

        # GroupQueryAttention is causal, and the context of a prompt is not. There all new tokens
        # see each other, which needs no cache: MultiHeadAttention never holds all the scores
        def full(t: Tape) -> ir.Value:
            seen = [k, v]
            if prefix_tokens:
                places = [constant(t, place) for place in (0, prefix_tokens, 2)]
                before = [restored(t, t.op("Slice", [p, *places])) for p in past]
                after = [heads_first(t, x) for x in seen]
                both = zip(before, after, strict=True)
                seen = [t.op("Concat", parts, {"axis": 2}) for parts in both]
            attributes = {"num_heads": heads, "scale": scale}
            return t.op("MultiHeadAttention", [q, *seen], attributes, domain=MICROSOFT)

        def full_and_cache(t: Tape) -> list[ir.Value]:
            place = constant(t, prefix_tokens)
            presents = [
                t.op("TensorScatter", [p, cached(t, heads_first(t, x)), place], {"axis": 2})
                for p, x in zip(past, (k, v), strict=True)
            ]
            return [full(t), *presents]

        def causal_and_cache(t: Tape) -> list[ir.Value]:
            out, *presents = t.op_multi_out(
                "GroupQueryAttention",
                [*(cached(t, x) for x in (q, k, v)), *past, last_index, total_length],
                {"num_heads": heads, "kv_num_heads": heads, "scale": scale},
                num_outputs=3,
                domain=MICROSOFT,
            )
            return [restored(t, out), *presents]

        if half:
            causal, *present = causal_and_cache(tape)
            chosen = tape.op("Where", [bidirectional, full(tape), causal])
        else:
            chosen, *present = tape.op_multi_out(
                "If",
                [bidirectional],
                {
                    "then_branch": _branch(f"{prefix}.full", full_and_cache),
                    "else_branch": _branch(f"{prefix}.causal", causal_and_cache),
                },
                num_outputs=3,
            )
        for part, value in zip(("key", "value"), present, strict=True):
            value.name = f"present_{part}_{layer}"
            value.type, value.shape = ir.TensorType(kind), ir.Shape(cache_shape)
            presents.append(value)
        return weights.linear(chosen, f"{prefix}.dense")

    def mlp(x: ir.Value, layer: int) -> ir.Value:
        prefix = f"layers.{layer}.mlp"
        wide = weights.linear(x, f"{prefix}.dense_h_to_4h")
        wide = tape.op("Gelu", [wide], {"approximate": "tanh"})
        return weights.linear(wide, f"{prefix}.dense_4h_to_h")

    for i in range(config.num_layers):
        x = residual(norm(x, f"layers.{i}.input_layernorm"), lambda x, i=i: attention(x, i))
        x = residual(norm(x, f"layers.{i}.post_attention_layernorm"), lambda x, i=i: mlp(x, i))
        x.name, x.type, x.shape = hidden_name(i + 1), embeds.type, embeds.shape

    batch = tape.initializer(ir.tensor(np.array([0]), name="batch"))
    rows = tape.op("Gather", [tape.op("Squeeze", [x, batch]), logit_rows], {"axis": 0})
    x = norm(rows, "final_layernorm")  # [r, hidden]
    logits = weights.linear(x, "lm_head", bias=False)
    if half:
        logits = tape.op("Cast", [logits], {"to": ir.DataType.FLOAT})
    logits.name = "logits"
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["r", config.vocab_size])
    graph.outputs.extend([logits, *presents])
    return ir.Model(graph, ir_version=10, producer_name="seechat-lite")


def _branch(name: str, build: Callable[[Tape], list[ir.Value]]) -> ir.Graph:
    """One branch of an If. Names are shared with the outer graph: the branch's bear its own."""
    graph = ir.Graph((), (), nodes=(), name=name)
    graph.outputs.extend(build(Tape(graph)))
    values = (value for node in graph for value in node.outputs)
    for i, value in enumerate(values):
        value.name = f"{name}.{i}"
    return graph
