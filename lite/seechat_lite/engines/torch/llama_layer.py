"""A layer of a LLaMA as the torch engine runs it."""

from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.engines.torch.linears import Linear
from seechat_lite.engines.torch.ops import StepOps
from seechat_weights.config import LMConfig


class LlamaLayer(nn.Module):
    """See decoder.Layer."""

    def __init__(self, config: LMConfig, head: int) -> None:
        super().__init__()
        hidden, inner, width = config.hidden_size, config.inner_size, config.num_heads * head
        fused = width + 2 * config.kv_heads * head
        self.head = head
        self.scale = config.head_size**-0.5
        self.input_layernorm = self.norm(config)
        self.attention = nn.ModuleDict(
            {
                "query_key_value": Linear(hidden, fused, bias=False),
                "dense": Linear(width, hidden, bias=False),
            }
        )
        self.post_attention_layernorm = self.norm(config)
        self.mlp = nn.ModuleDict(
            {
                "gate_up": Linear(hidden, 2 * inner, bias=False),
                "down": Linear(inner, hidden, bias=False),
            }
        )

    @staticmethod
    def norm(config: LMConfig) -> nn.RMSNorm:
        return nn.RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def begin(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        return embeds, self.input_layernorm(embeds)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        rotary: Tensor,
        ops: StepOps,
        keys: Tensor,
        values: Tensor,
        next_norm: nn.RMSNorm,
    ) -> tuple[Tensor, Tensor]:
        branch = self.attention["dense"](self._attended(normed, rotary, ops, keys, values))
        x, normed = ops.add_rms_norm(branch, x, self.post_attention_layernorm)
        return ops.add_rms_norm(self._mlp(normed), x, next_norm)

    def _attended(
        self, x: Tensor, rotary: Tensor, ops: StepOps, keys: Tensor, values: Tensor
    ) -> Tensor:
        # a method of its own, so that nothing of a long prompt's attention is held during its MLP
        qkv = self.attention["query_key_value"](x).unflatten(-1, (-1, self.head))
        queries = ops.append(qkv, rotary, keys, values)
        del qkv
        return ops.attend(queries, keys, values, self.scale).flatten(1)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.mlp["gate_up"](x).chunk(2, dim=-1)
        return self.mlp["down"](F.silu(gate).mul_(up))
