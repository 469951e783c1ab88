"""Builds ChatGLM-6B's decoder graph.

    inputs_embeds [b, s, hidden]
      └─ per layer: LayerNorm ─ qkv ─ rotary(q, k) ─ If bidirectional:
                        │           then MultiHeadAttention, TensorScatter into the cache
                        │           else GroupQueryAttention: causal, appends to the cache
                        ├─ * ALPHA ─── + ── dense ──┘
                        └─ LayerNorm ─ MLP, the same way
      └─ chosen rows ─ LayerNorm ─ lm_head ─ logits [r, vocab]

The `half` graph has no If. There GroupQueryAttention fills the cache in every call, and a Where
takes either its output or that of MultiHeadAttention. For one token this costs almost nothing.
"""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.tape import Tape

from seechat_export.decoder_graph import MICROSOFT, DecoderGraph, branch
from seechat_weights.config import ALPHA


class ChatGLMGraph(DecoderGraph):
    """A DecoderGraph with one more input, `bidirectional`, bool [].

    A bidirectional call is of one sequence, and must start with a cache that holds only the prefix.
    """

    def extra_inputs(self) -> None:
        self.bidirectional = self.declare("bidirectional", ir.DataType.BOOL, [])

    def constants(self) -> None:
        super().constants()
        alpha = ir.tensor(self.dtype.numpy().type(ALPHA), name="alpha")
        self._alpha = self.tape.initializer(alpha)

    def layer(self, x: ir.Value, index: int) -> ir.Value:
        prefix = f"layers.{index}"
        normed = self.norm(x, f"{prefix}.input_layernorm")
        x = self._residual(normed, self._attention(normed, index))
        normed = self.norm(x, f"{prefix}.post_attention_layernorm")
        return self._residual(normed, self._mlp(normed, f"{prefix}.mlp"))

    def norm(self, x: ir.Value, key: str) -> ir.Value:
        parameters = [self.weights.vector(f"{key}.{part}") for part in ("weight", "bias")]
        attributes = {"axis": -1, "epsilon": self.config.layernorm_epsilon}
        return self.tape.op("LayerNormalization", [x, *parameters], attributes)

    def _residual(self, x: ir.Value, branch: ir.Value) -> ir.Value:
        return self.tape.op("Add", [self.tape.op("Mul", [x, self._alpha]), branch])

    def _mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        wide = self.weights.linear(x, f"{prefix}.dense_h_to_4h")
        wide = self.tape.op("Gelu", [wide], {"approximate": "tanh"})
        return self.weights.linear(wide, f"{prefix}.dense_4h_to_h")

    def _attention(self, x: ir.Value, layer: int) -> ir.Value:
        tape, prefix = self.tape, f"layers.{layer}.attention"
        fused = self.weights.linear(x, f"{prefix}.query_key_value")
        q, k, v = tape.op_multi_out("Split", [fused], {"axis": -1, "num_outputs": 3}, num_outputs=3)
        q, k = (self.rotated(t, self.heads) for t in (q, k))
        past = self.declare_past(layer)
        full = self._full_attention(q, k, v, past)
        if self.half:
            causal, *present = self.causal(tape, q, k, v, past)
            chosen = tape.op("Where", [self.bidirectional, full(tape), causal])
        else:
            branches = {
                "then_branch": lambda t: [full(t), *self._scattered(t, k, v, past)],
                "else_branch": lambda t: self.causal(t, q, k, v, past),
            }
            names = {"then_branch": f"{prefix}.full", "else_branch": f"{prefix}.causal"}
            attributes = {which: branch(names[which], build) for which, build in branches.items()}
            chosen, *present = tape.op_multi_out(
                "If", [self.bidirectional], attributes, num_outputs=3
            )
        self.give_present(layer, present)
        return self.weights.linear(chosen, f"{prefix}.dense")

    def _full_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past: list[ir.Value]
    ) -> Callable[[Tape], ir.Value]:
        """Attention of a prompt's context, in which all new tokens see each other.

        It needs no cache except for a prefix. MultiHeadAttention never holds all the scores.
        """

        def full(t: Tape) -> ir.Value:
            seen = [k, v]
            if self.prefix_tokens:
                places = [_constant(t, place) for place in (0, self.prefix_tokens, 2)]
                before = [self.restored(t, t.op("Slice", [p, *places])) for p in past]
                after = [self._heads_first(t, x) for x in seen]
                both = zip(before, after, strict=True)
                seen = [t.op("Concat", parts, {"axis": 2}) for parts in both]
            attributes = {"num_heads": self.heads, "scale": self.config.head_size**-0.5}
            return t.op("MultiHeadAttention", [q, *seen], attributes, domain=MICROSOFT)

        return full

    def _scattered(self, t: Tape, k: ir.Value, v: ir.Value, past: list[ir.Value]) -> list[ir.Value]:
        """The cache with the new keys and values behind the prefix."""
        place = _constant(t, self.prefix_tokens)
        return [
            t.op("TensorScatter", [p, self.cached(t, self._heads_first(t, x)), place], {"axis": 2})
            for p, x in zip(past, (k, v), strict=True)
        ]

    def _heads_first(self, t: Tape, x: ir.Value) -> ir.Value:  # [1, heads, s, head]
        shape = _constant(t, 1, -1, self.heads, self.head)
        return t.op("Transpose", [t.op("Reshape", [x, shape])], {"perm": (0, 2, 1, 3)})


def _constant(tape: Tape, *numbers: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": numbers})
