"""The vision networks in torch, from pixels to embeddings for the LM.

CLIP's vision transformer is that of the transformers library, up to the layer that the bridge was
trained on: usually without the last one (LLaVA's hidden_states[-2]), and always without the final
layer norm.
"""

import torch
from torch import Tensor, nn

from seechat_lite.nn.attention import register_attention, vit_settings
from seechat_lite.nn.blip import EvaTower, JoinedBridge, QFormerBridge, QuestionBridge
from seechat_lite.nn.bridges import BRIDGES
from seechat_lite.nn.layer_streaming import Streamed
from seechat_weights.config import VisionConfig, VisionNetwork
from seechat_weights.errors import CheckpointError, EngineError
from seechat_weights.vision.network import JOINED, NETWORKS, QUESTION_QFORMER
from seechat_weights.vision.weights import VisionWeights


class ClipTower(nn.Module):
    """CLIP ViT: pixels [n, 3, S, S] to patch tokens [n, (S / patch)**2, width].

    The class token comes before them only if the network's sizes say so.
    """

    def __init__(self, sizes: VisionNetwork, image_size: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        model = CLIPVisionModel(CLIPVisionConfig(**vit_settings(sizes, image_size)))
        model.set_attn_implementation(register_attention())
        # the first releases of transformers 5 keep the network one level deeper
        clip = getattr(model, "vision_model", model)
        # only the pooled class token goes through the final layer norm, and it is not used
        clip.register_module("post_layernorm", nn.Identity())
        # the content of this one buffer matters: it is real even in a network built without weights
        positions = torch.arange((image_size // sizes.patch_size) ** 2 + 1, device="cpu")
        clip.embeddings.register_buffer("position_ids", positions[None], persistent=False)
        self.clip = clip
        self.first = 0 if sizes.class_token else 1

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.clip(pixel_values=pixel_values).last_hidden_state[:, self.first :]


class Vision(nn.Module):
    """Tower and bridge: pixels float32 [n, 3, S, S] to embeddings [n, tokens, hidden].

    A bridge that reads the question takes its pieces as well, int64 [n, pieces].
    """

    def __init__(self, tower: nn.Module, bridge: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.bridge = bridge

    def forward(self, pixel_values: Tensor, question_ids: Tensor | None = None) -> Tensor:
        others = () if question_ids is None else (question_ids,)
        return self.bridge(self.tower(pixel_values), *others)


def vision_network(config: VisionConfig, outputs: int) -> Vision:
    """Build a vision network without weights.

    config: describes the network.
    outputs: the language model's hidden size.

    Raises EngineError.
    """
    sizes, side = config.network, config.pixels.image_size
    with torch.device("meta"):
        if sizes and config.tower == "eva" and config.bridge in NETWORKS["eva"]:
            bridge: nn.Module
            if config.bridge == JOINED:
                bridge = JoinedBridge(sizes, outputs)
            elif config.bridge == QUESTION_QFORMER:
                bridge = QuestionBridge(sizes, config.tokens, outputs)
            else:
                bridge = QFormerBridge(sizes, config.tokens, outputs)
            return Vision(EvaTower(sizes, side), bridge)
        if sizes and config.tower == "clip" and config.bridge in BRIDGES:
            return Vision(ClipTower(sizes, side), BRIDGES[config.bridge](sizes.width, outputs))
    raise EngineError(
        f"vision of {config.tower} and {config.bridge}; expected clip with "
        f"{' or '.join(BRIDGES)}, or eva with {' or '.join(NETWORKS['eva'])}: upgrade seechat-lite"
    )


def streamed(
    weights: VisionWeights, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Streamed:
    """Build a vision network that reads its weights when it runs.

    weights: its description and weights.
    device: where it runs; None for the CPU.
    dtype: what it computes in.

    Raises EngineError, CheckpointError.
    """
    network = vision_network(weights.config, weights.outputs)
    found = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if found != weights.sizes:
        differing = (k for k in found | weights.sizes if found.get(k) != weights.sizes.get(k))
        raise CheckpointError(
            f"the vision network has other parameters than expected ({sorted(differing)[:4]}): "
            "install a transformers version that seechat-lite was tested with"
        )
    where = ", ".join(map(str, weights.files)) or "vision"
    return Streamed(network, weights.read, device=device, dtype=dtype, where=where)
