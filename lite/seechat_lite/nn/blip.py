"""BLIP-2's vision half in torch, and InstructBLIP's: EVA ViT-g and Q-Former, or what replaces it.

All are networks of the transformers library. This module adds what they lack. SEEChat's ViT has no
final norm of its own but ln_vision, with another epsilon; and there are the query tokens and the
projector to the LM.
"""

from typing import Any

import torch
from torch import Tensor, nn

from seechat_lite.nn.attention import register_attention, vit_settings
from seechat_weights.config import VisionNetwork
from seechat_weights.vision.network import JOINED_PATCHES


class EvaTower(nn.Module):
    """EVA ViT and ln_vision: pixels [n, 3, S, S] to [n, 1 + (S / patch)**2, width]."""

    def __init__(self, sizes: VisionNetwork, image_size: int) -> None:
        super().__init__()
        from transformers import Blip2VisionConfig, Blip2VisionModel

        self.vit = Blip2VisionModel(Blip2VisionConfig(**vit_settings(sizes, image_size)))
        self.vit.set_attn_implementation(register_attention())
        self.vit.post_layernorm = nn.LayerNorm(sizes.width, eps=1e-5)  # ln_vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vit(pixel_values=pixel_values).last_hidden_state


class JoinedBridge(nn.Module):
    """Joins neighbouring patches of [n, 1 + patches, width] and projects them: MiniGPT-4, Llama 2.

    Each four in the order of the patches become one: [n, patches / 4, hidden].
    """

    def __init__(self, sizes: VisionNetwork, outputs: int) -> None:
        super().__init__()
        self.projection = nn.Linear(JOINED_PATCHES * sizes.width, outputs)

    def forward(self, seen: Tensor) -> Tensor:
        n, tokens, width = seen.shape
        joined = seen[:, 1:].reshape(n, (tokens - 1) // JOINED_PATCHES, JOINED_PATCHES * width)
        return self.projection(joined)


class QFormerBridge(nn.Module):
    """Q-Former and projector: the tower's output [n, tokens, width] to [n, queries, hidden]."""

    def __init__(self, sizes: VisionNetwork, queries: int, outputs: int) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.query_tokens = nn.Parameter(torch.empty(1, queries, sizes.query_width))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                **_settings(sizes),
                use_qformer_text_input=False,
            )
        )
        self.qformer.set_attn_implementation(register_attention())
        self.projection = nn.Linear(sizes.query_width, outputs)

    def forward(self, seen: Tensor) -> Tensor:
        queries = self.query_tokens.expand(seen.shape[0], -1, -1)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=seen)
        return self.projection(found.last_hidden_state)


class QuestionBridge(nn.Module):
    """InstructBLIP's Q-Former and projector, which read the picture with the question in mind.

    From the tower's output [n, tokens, width] and the question's pieces, int64 [n, pieces], to
    [n, queries, hidden].
    """

    def __init__(self, sizes: VisionNetwork, queries: int, outputs: int) -> None:
        super().__init__()
        from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

        self.query_tokens = nn.Parameter(torch.empty(1, queries, sizes.query_width))
        self.qformer = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                vocab_size=sizes.query_words,
                max_position_embeddings=sizes.query_positions,
                **_settings(sizes),
            )
        )
        self.qformer.set_attn_implementation(register_attention())
        # its content matters: it is real even in a network built without weights
        positions = torch.arange(sizes.query_positions, device="cpu")[None]
        self.qformer.embeddings.register_buffer("position_ids", positions, persistent=False)
        self.projection = nn.Linear(sizes.query_width, outputs)

    def forward(self, seen: Tensor, question_ids: Tensor) -> Tensor:
        queries = self.query_tokens.expand(seen.shape[0], -1, -1)
        found = self.qformer(question_ids, query_embeds=queries, encoder_hidden_states=seen)
        return self.projection(found.last_hidden_state[:, : self.query_tokens.shape[1]])


def _settings(sizes: VisionNetwork) -> dict[str, Any]:
    """What the configurations of both Q-Formers say."""
    return {
        "hidden_size": sizes.query_width,
        "num_hidden_layers": sizes.query_layers,
        "num_attention_heads": sizes.query_heads,
        "intermediate_size": sizes.query_inner_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": sizes.width,
    }
