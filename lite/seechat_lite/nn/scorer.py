"""Chinese-CLIP's two towers in torch, each from its input to features that cosines compare.

The ViT and the BERT are those of the transformers library. The ResNet is CLIP's own kind, which the
library lacks: three convolutions come first, pooling halves what strides would, and the last layer
is an attention from the mean to all positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.nn.attention import register_attention
from seechat_lite.nn.layer_streaming import Streamed
from seechat_lite.nn.vision import ClipTower
from seechat_weights.config import VisionNetwork
from seechat_weights.errors import CheckpointError
from seechat_weights.scorer.network import PLANES, STEM, STRIDE, ResNetSizes, TextSizes
from seechat_weights.scorer.weights import ScorerWeights, Tower


class VitTower(nn.Module):
    """Pixels [n, 3, S, S] to features [n, features], by the class token."""

    def __init__(self, sizes: VisionNetwork, image_size: int, features: int) -> None:
        super().__init__()
        self.tower = ClipTower(sizes, image_size)
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.layernorm_epsilon)
        self.projection = nn.Linear(sizes.width, features, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.norm(self.tower(pixel_values)[:, 0]))


class BertTower(nn.Module):
    """Ids [n, tokens] to features [n, features], by the first token.

    There is no mask: texts of one call have the same number of tokens.
    """

    def __init__(self, sizes: TextSizes, features: int) -> None:
        super().__init__()
        from transformers import ChineseCLIPTextConfig, ChineseCLIPTextModel

        settings = ChineseCLIPTextConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            intermediate_size=sizes.inner_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=sizes.positions,
            type_vocab_size=sizes.types,
            layer_norm_eps=sizes.layernorm_epsilon,
            hidden_act="gelu",
        )
        model = ChineseCLIPTextModel(settings, add_pooling_layer=False)
        model.set_attn_implementation(register_attention())
        # the contents of these buffers matter: they are real even in a network without weights
        positions = torch.arange(sizes.positions, device="cpu")[None]
        embeddings = model.embeddings
        embeddings.register_buffer("position_ids", positions, persistent=False)
        embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
        self.bert = model
        self.projection = nn.Linear(sizes.width, features, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.projection(self.bert(input_ids=input_ids).last_hidden_state[:, 0])


class ResNetTower(nn.Module):
    """Pixels [n, 3, S, S] to features [n, features]; batch norms are part of the convolutions."""

    def __init__(self, sizes: ResNetSizes, image_size: int, features: int) -> None:
        super().__init__()
        width, inputs = sizes.width, sizes.width
        for i in range(1, STEM + 1):
            outputs = width if i == STEM else width // 2
            first = i == 1
            layer = nn.Conv2d(
                3 if first else width // 2, outputs, 3, stride=2 if first else 1, padding=1
            )
            self.add_module(f"conv{i}", layer)
        for stage, blocks in enumerate(sizes.stages):
            layers = []
            for block in range(blocks):
                stride = 2 if stage and block == 0 else 1
                layers.append(_Bottleneck(inputs, width * 2**stage, stride, widens=block == 0))
                inputs = width * 2**stage * PLANES
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(sizes.stages)
        self.attnpool = _AttentionPool(inputs, (image_size // STRIDE) ** 2, sizes.heads, features)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values
        for i in range(1, STEM + 1):
            x = F.relu(self.get_submodule(f"conv{i}")(x))
        x = F.avg_pool2d(x, 2)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.attnpool(x)


class _Bottleneck(nn.Module):
    """Three convolutions and a way around them."""

    def __init__(self, inputs: int, planes: int, stride: int, *, widens: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.conv3 = nn.Conv2d(planes, planes * PLANES, 1)
        self.downsample = nn.Conv2d(inputs, planes * PLANES, 1) if widens else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self._smaller(F.relu(self.conv2(F.relu(self.conv1(x)))))
        around = x if self.downsample is None else self.downsample(self._smaller(x))
        return F.relu(self.conv3(y) + around)

    def _smaller(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class _AttentionPool(nn.Module):
    """Attention from the mean of all positions to that mean and all positions."""

    def __init__(self, width: int, positions: int, heads: int, features: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(positions + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, features)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # [n, positions, width]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        # written out: one query a picture is too little for a kernel of its own to matter
        weights = (q @ k.transpose(2, 3) * (k.shape[-1] ** -0.5)).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2)[:, 0])


def streamed_towers(weights: ScorerWeights) -> tuple[Streamed, Streamed]:
    """The image and the text tower; they read their weights when they run.

    weights: what open_scorer found.

    Raises CheckpointError.
    """
    side, features = weights.pixels.image_size, weights.features
    with torch.device("meta"):
        if isinstance(weights.image, ResNetSizes):
            image: nn.Module = ResNetTower(weights.image, side, features)
        else:
            image = VitTower(weights.image, side, features)
        text = BertTower(weights.text, features)
    return _streamed(image, weights.image_tower), _streamed(text, weights.text_tower)


def _streamed(network: nn.Module, tower: Tower) -> Streamed:
    found = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if found != tower.sizes:
        differing = (k for k in found | tower.sizes if found.get(k) != tower.sizes.get(k))
        raise CheckpointError(
            f"a scorer's tower has other parameters than expected ({sorted(differing)[:4]}): "
            "install a transformers version that seechat-lite was tested with"
        )
    return Streamed(network, tower.read)
