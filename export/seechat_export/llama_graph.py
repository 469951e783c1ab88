"""LLaMA's decoder graph.

    inputs_embeds [b, s, hidden]
      └─ per layer: RMSNorm ─ qkv ─ rotary(q, k) ─ GroupQueryAttention: causal, appends to the cache
                    ├─ + ── dense ──┘
                    └─ RMSNorm ─ gate and up ─ silu(gate) * up ─ down, added the same way
      └─ chosen rows ─ RMSNorm ─ lm_head ─ logits [r, vocab]

Everything is causal, prompts too, so that nothing has to be chosen while the graph runs.
"""

import onnx_ir as ir

from seechat_export.decoder_graph import MICROSOFT, DecoderGraph


class LlamaGraph(DecoderGraph):
    """See DecoderGraph."""

    def layer(self, x: ir.Value, index: int) -> ir.Value:
        prefix = f"layers.{index}"
        attended = self._attention(self.norm(x, f"{prefix}.input_layernorm"), index)
        x = self.tape.op("Add", [x, attended])
        wide = self._mlp(self.norm(x, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp")
        return self.tape.op("Add", [x, wide])

    def norm(self, x: ir.Value, key: str) -> ir.Value:
        # ONNX Runtime's name for RMSNorm, under ONNX's own domain; of it devices have kernels
        attributes = {"axis": -1, "epsilon": self.config.layernorm_epsilon, "stash_type": 1}
        weight = self.weights.vector(f"{key}.weight")
        return self.tape.op("SimplifiedLayerNormalization", [x, weight], attributes)

    def _attention(self, x: ir.Value, layer: int) -> ir.Value:
        prefix, heads, kv_heads = f"layers.{layer}.attention", self.heads, self.kv_heads
        fused = self.weights.linear(x, f"{prefix}.query_key_value", bias=False)
        sizes = self.tape.op(
            "Constant", [], {"value_ints": [n * self.head for n in (heads, kv_heads, kv_heads)]}
        )
        q, k, v = self.tape.op_multi_out("Split", [fused, sizes], {"axis": -1}, num_outputs=3)
        q, k = self.rotated(q, heads), self.rotated(k, kv_heads)
        out, *present = self.causal(self.tape, q, k, v, self.declare_past(layer))
        self.give_present(layer, present)
        return self.weights.linear(out, f"{prefix}.dense", bias=False)

    def _mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        both = self.weights.linear(x, f"{prefix}.gate_up", bias=False)
        parts = {"axis": -1, "num_outputs": 2}
        gate, up = self.tape.op_multi_out("Split", [both], parts, num_outputs=2)
        # x * sigmoid(alpha * x), which is SiLU where alpha is 1
        gate = self.tape.op("QuickGelu", [gate], {"alpha": 1.0}, domain=MICROSOFT)
        return self.weights.linear(self.tape.op("Mul", [gate, up]), f"{prefix}.down", bias=False)
