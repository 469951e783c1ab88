"""Gives the transformers library's vision networks their sizes and an exportable attention.

The attention becomes one operator in an export.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_weights.config import VisionNetwork


def vit_settings(sizes: VisionNetwork, image_size: int) -> dict[str, Any]:
    """The sizes of a ViT, under the names of transformers' vision configurations.

    sizes: the network's sizes.
    image_size: pixels a side.
    """
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "image_size": image_size,
        "patch_size": sizes.patch_size,
        "hidden_act": sizes.activation,
        "layer_norm_eps": sizes.layernorm_epsilon,
    }


def register_attention() -> str:
    """Make `_attend` known to transformers; returns the name to give as attn_implementation."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("seechat", _attend)
    return "seechat"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Full attention: [n, heads, tokens, size] each, to [n, tokens, heads, size].

    The exported graph holds ONNX Runtime's MultiHeadAttention instead. It takes the heads side by
    side, so its products need no transposed copies.
    """
    if not torch.onnx.is_in_onnx_export():
        attended = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        return attended.transpose(1, 2), None
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
    attended = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q, k, v),
        {"num_heads": query.shape[1], "scale": float(scaling)},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )
    return attended.unflatten(2, (query.shape[1], -1)), None
