"""A layer of ChatGLM-6B as the torch engine runs it."""

from torch import Tensor, nn

from seechat_lite.engines.torch.linears import Linear, with_gelu
from seechat_lite.engines.torch.ops import StepOps
from seechat_weights.config import LMConfig


class ChatGLMLayer(nn.Module):
    """See decoder.Layer; the residual is the layer-normed input."""

    def __init__(self, config: LMConfig, head: int) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.num_heads * head
        self.head = head
        self.scale = config.head_size**-0.5
        self.input_layernorm = self.norm(config)
        self.attention = nn.ModuleDict(
            {
                "query_key_value": Linear(hidden, 3 * width),
                "dense": Linear(width, hidden),
            }
        )
        self.post_attention_layernorm = self.norm(config)
        self.mlp = nn.ModuleDict(
            {
                "dense_h_to_4h": Linear(hidden, config.inner_size),
                "dense_4h_to_h": Linear(config.inner_size, hidden),
            }
        )

    @staticmethod
    def norm(config: LMConfig) -> nn.LayerNorm:
        return nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)

    def begin(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.input_layernorm(embeds)
        return normed, normed

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        rotary: Tensor,
        ops: StepOps,
        keys: Tensor,
        values: Tensor,
        next_norm: nn.LayerNorm,
    ) -> tuple[Tensor, Tensor]:
        branch = self.attention["dense"](self._attended(normed, rotary, ops, keys, values))
        x = ops.add_norm(branch, x, self.post_attention_layernorm)
        wide = with_gelu(self.mlp["dense_h_to_4h"], x)
        x = ops.add_norm(self.mlp["dense_4h_to_h"](wide), x, next_norm)
        return x, x

    def _attended(
        self, x: Tensor, rotary: Tensor, ops: StepOps, keys: Tensor, values: Tensor
    ) -> Tensor:
        # a method of its own, so that nothing of a long prompt's attention is held during its MLP
        qkv = self.attention["query_key_value"](x).unflatten(-1, (-1, self.head))
        queries = ops.append(qkv, rotary, keys, values)
        del qkv
        return ops.attend(queries, keys, values, self.scale).flatten(1)
