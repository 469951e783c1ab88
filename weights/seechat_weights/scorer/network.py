"""Lists the parameters of a scorer's two towers, and the sizes of the five published ones.

Parameters have the names of nn.scorer's networks in seechat_lite.
"""

from dataclasses import dataclass

from seechat_weights.config import VisionNetwork
from seechat_weights.files.accounting import Shape
from seechat_weights.vision.network import clip_parameters

CONTEXT = 52  # tokens that a text may have, with [CLS] and [SEP]; the rest is cut off
PLANES = 4  # a bottleneck's outputs, in multiples of its planes
STEM = 3  # convolutions before the stages
STRIDE = 32  # pixels a side of one position of a ResNet's last stage


@dataclass(frozen=True)
class ResNetSizes:
    """A ResNet with attention as its last layer.

    width: channels of the stem.
    stages: blocks of each stage.
    """

    width: int
    stages: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """Channels of the last stage."""
        return self.width * 2 ** (len(self.stages) - 1) * PLANES

    @property
    def heads(self) -> int:
        """Heads of the last layer's attention."""
        return self.outputs // 64


@dataclass(frozen=True)
class TextSizes:
    """A BERT: its exact GELU and the epsilon of its norms are the same in all published sizes."""

    vocab_size: int
    width: int
    inner_size: int
    layers: int
    heads: int
    positions: int
    types: int = 2
    layernorm_epsilon: float = 1e-12


ImageSizes = VisionNetwork | ResNetSizes


@dataclass(frozen=True)
class PublishedSize:
    """What tells a published size, and what its tensors do not tell.

    name: as its authors write it.
    tower: width, layers, patch size and pixels a side; of a ResNet width, blocks, 0 and pixels.
    text: width and layers.
    heads: of the image tower; a ResNet's follow from its width.
    """

    name: str
    tower: tuple[int, int, int, int]
    text: tuple[int, int]
    heads: int


# https://github.com/OFA-Sys/Chinese-CLIP, cn_clip/clip/model_configs; text towers have heads of 64
PUBLISHED = (
    PublishedSize("RN50", (64, 16, 0, 224), (768, 3), 0),
    PublishedSize("ViT-B-16", (768, 12, 16, 224), (768, 12), 12),
    PublishedSize("ViT-L-14", (1024, 24, 14, 224), (768, 12), 16),
    PublishedSize("ViT-L-14-336", (1024, 24, 14, 336), (768, 12), 16),
    PublishedSize("ViT-H-14", (1280, 32, 14, 224), (1024, 24), 16),
)
TEXT_HEAD = 64


def image_parameters(sizes: ImageSizes, image_size: int, features: int) -> dict[str, Shape]:
    """The parameters of an image tower and their shapes.

    sizes: the tower's sizes.
    image_size: pixels a side.
    features: numbers that the tower makes of a picture.
    """
    if isinstance(sizes, ResNetSizes):
        return resnet_parameters(sizes, image_size, features)
    width = sizes.width
    tower = clip_parameters(sizes, image_size)
    return {f"tower.clip.{name}": shape for name, shape in tower.items()} | {
        "norm.weight": (width,),
        "norm.bias": (width,),
        "projection.weight": (features, width),
    }


def resnet_parameters(sizes: ResNetSizes, image_size: int, features: int) -> dict[str, Shape]:
    """The parameters of a ResNet and their shapes; its batch norms are part of its convolutions.

    sizes: the ResNet's sizes.
    image_size: pixels a side.
    features: numbers that the tower makes of a picture.
    """
    found: dict[str, Shape] = {}

    def convolution(name: str, inputs: int, outputs: int, side: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs, side, side), (outputs,)

    width, inputs = sizes.width, sizes.width
    for i in range(1, STEM + 1):
        outputs = width if i == STEM else width // 2
        convolution(f"conv{i}", 3 if i == 1 else width // 2, outputs, 3)
    for stage, blocks in enumerate(sizes.stages):
        planes = width * 2**stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            convolution(f"{at}.conv1", inputs, planes, 1)
            convolution(f"{at}.conv2", planes, planes, 3)
            convolution(f"{at}.conv3", planes, planes * PLANES, 1)
            if block == 0:  # its result is smaller or wider than what comes in
                convolution(f"{at}.downsample", inputs, planes * PLANES, 1)
            inputs = planes * PLANES
    found["attnpool.positional_embedding"] = ((image_size // STRIDE) ** 2 + 1, inputs)
    for name in ("k_proj", "q_proj", "v_proj", "c_proj"):
        outputs = features if name == "c_proj" else inputs
        found[f"attnpool.{name}.weight"] = (outputs, inputs)
        found[f"attnpool.{name}.bias"] = (outputs,)
    return found


def text_parameters(sizes: TextSizes, features: int) -> dict[str, Shape]:
    """The parameters of a text tower and their shapes.

    sizes: the tower's sizes.
    features: numbers that the tower makes of a text.
    """
    width, inner = sizes.width, sizes.inner_size
    found: dict[str, Shape] = {
        "bert.embeddings.word_embeddings.weight": (sizes.vocab_size, width),
        "bert.embeddings.position_embeddings.weight": (sizes.positions, width),
        "bert.embeddings.token_type_embeddings.weight": (sizes.types, width),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    norm("bert.embeddings.LayerNorm")
    for i in range(sizes.layers):
        at = f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{at}.attention.self.{name}", width, width)
        linear(f"{at}.attention.output.dense", width, width)
        norm(f"{at}.attention.output.LayerNorm")
        linear(f"{at}.intermediate.dense", inner, width)
        linear(f"{at}.output.dense", width, inner)
        norm(f"{at}.output.LayerNorm")
    found["projection.weight"] = (features, width)
    return found
