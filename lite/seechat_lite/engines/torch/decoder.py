"""A decoder as the torch engine runs it: one prompt, one answer, a cache of fixed size.

The heads have a bundle's order (see seechat_weights.bundle.layout), so a bundle's weights are used
as they lie. A family's layer is a row in LAYERS; what all layers do between their linears is in
engines.torch.ops.
"""

from collections.abc import Callable
from typing import Protocol, cast

from torch import Tensor, nn

from seechat_lite.engines.torch.chatglm_layer import ChatGLMLayer
from seechat_lite.engines.torch.linears import Linear
from seechat_lite.engines.torch.llama_layer import LlamaLayer
from seechat_lite.engines.torch.ops import Cache, StepOps
from seechat_weights.config import LMConfig


class Layer(Protocol):
    """One layer; made with the decoder's shape and the size of a head of the weights."""

    @staticmethod
    def norm(config: LMConfig) -> nn.Module:
        """A norm as the family has it, of the decoder's width.

        config: the decoder's shape.
        """
        ...

    def begin(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """The residual and the normed input of the first layer, which this must be.

        embeds: [rows, hidden].
        """
        ...

    def __call__(
        self,
        x: Tensor,
        normed: Tensor,
        rotary: Tensor,
        ops: StepOps,
        keys: Tensor,
        values: Tensor,
        next_norm: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        """The residual and the normed input of what follows.

        x: the residual, [rows, hidden].
        normed: the normed input, [rows, hidden].
        rotary: see Decoder.
        ops: how tokens go through the layer.
        keys, values: the layer's part of the cache; changed in place.
        next_norm: the norm of what follows.
        """
        ...


LAYERS = {"chatglm": ChatGLMLayer, "llama": LlamaLayer}


class Decoder(nn.Module):
    """Turns embeddings of new tokens into logits. Parameters are named as in bundle.layout."""

    def __init__(self, config: LMConfig, head: int, rotary: Tensor) -> None:
        """Build the network.

        config: its shape.
        head: size of a head of the weights.
        rotary: float32 [2, positions, head / 2 / rows of positions].
        """
        super().__init__()
        layer = LAYERS[config.family]
        self.layers = nn.ModuleList(layer(config, head) for _ in range(config.num_layers))
        self.final_layernorm = layer.norm(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary: Tensor
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(
        self,
        embeds: Tensor,
        ops: StepOps,
        cache: Cache,
        *,
        logit_rows: int = 1,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """Append tokens; returns the logits of the last ones, float32 [logit_rows, vocab].

        embeds: [rows, hidden].
        ops: how tokens go through a layer.
        cache: keys and values; it is changed.
        logit_rows: how many of the last tokens get logits.
        between_layers: called before every layer; an exception that it raises ends the call.
        """
        norms = [*(layer.input_layernorm for layer in self.layers[1:]), self.final_layernorm]
        x, normed = cast(Layer, self.layers[0]).begin(embeds)
        for layer, keys, values, norm in zip(
            self.layers, cache.keys, cache.values, norms, strict=True
        ):
            if between_layers:
                between_layers()
            x, normed = layer(x, normed, self.rotary, ops, keys, values, norm)
        return self.lm_head(normed[-logit_rows:]).float()
