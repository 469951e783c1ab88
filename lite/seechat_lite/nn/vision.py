"""The vision networks in torch: pixels in, embeddings for the LM out.

CLIP's vision transformer is that of the transformers library, one layer short: the bridges were
trained on what enters the last layer (LLaVA's hidden_states[-2]), without the final layer norm.
"""

import torch
from torch import Tensor, nn

from seechat_lite.nn.attention import register_attention
from seechat_weights.vision_names import ClipNames


class ClipTower(nn.Module):
    """CLIP ViT: pixels [n, 3, S, S] to patch tokens [n, (S / patch)**2, width], no class token."""

    def __init__(
        self, names: ClipNames, *, heads: int, activation: str, layernorm_epsilon: float
    ) -> None:
        """activation: "quick_gelu" (OpenAI's weights) or "gelu", the exact one (LAION's)."""
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=names.width,
                intermediate_size=names.inner_size,
                num_hidden_layers=names.layers - 1,
                num_attention_heads=heads,
                image_size=names.image_size,
                patch_size=names.patch_size,
                hidden_act=activation,
                layer_norm_eps=layernorm_epsilon,
            )
        )
        model.set_attn_implementation(register_attention())
        # the first releases of transformers 5 keep the network one level deeper
        clip = getattr(model, "vision_model", model)
        # only the pooled class token goes through the final layer norm, and it is not used
        clip.register_module("post_layernorm", nn.Identity())
        # the one buffer whose content counts: real even where the network is built without weights
        positions = torch.arange((names.image_size // names.patch_size) ** 2 + 1, device="cpu")
        clip.embeddings.register_buffer("position_ids", positions[None], persistent=False)
        self.clip = clip

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.clip(pixel_values=pixel_values).last_hidden_state[:, 1:]


class Vision(nn.Module):
    """Tower and bridge: pixels float32 [n, 3, S, S] to embeddings [n, tokens, hidden]."""

    def __init__(self, tower: nn.Module, bridge: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.bridge = bridge

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.bridge(self.tower(pixel_values))
