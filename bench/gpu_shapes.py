"""What bench/gpu.py measures: its stages, shapes and precisions, and random weights for them.

Weights are made on the GPU when they are asked for, and keep the scale of what they take, so that
activations stay near unit scale. Nothing of them is written to a disk.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from seechat_lite.engines.torch.weights import LoadedTensor, Weights
from seechat_lite.nn.block_quantization import quantize_blocks
from seechat_weights.bundle.layout import decoder_layout
from seechat_weights.bundle.manifest import Decoder, Manifest, TokenizerConfig
from seechat_weights.bundle.precisions import PRECISIONS
from seechat_weights.config import LMConfig, PixelSpec, VisionConfig, VisionNetwork
from seechat_weights.vision.network import PUBLISHED_VISION, parameters
from seechat_weights.vision.weights import VisionWeights

ROOT = Path(__file__).resolve().parent.parent
FULL = LMConfig()
TINY = LMConfig(
    vocab_size=512,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    inner_size=256,
    pad_id=3,
    mask_id=496,
    gmask_id=497,
    bos_id=498,
    eos_id=499,
)
# of a stage of precisions: what it measures
FORMS_OF = {
    "int4": ("int4", "int4 of fp16", "bitsandbytes nf4"),
    "fp16": ("fp16",),
    "int8": ("int8", "bitsandbytes int8"),
}
# stored precision, what it is quantized to when it is loaded, and the most GB at a context of 2048,
# with vision
FORMS = {
    "fp16": ("fp16", None, 14.5),
    "int8": ("int8", None, 8.5),
    "int4": ("int4", None, 5.5),
    "int4 of fp16": ("fp16", "int4", 5.5),
    "bitsandbytes int8": ("fp16", "int8", 8.5),
    "bitsandbytes nf4": ("fp16", "nf4", 5.5),
}
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """What is measured, at full size or tiny."""

    config: LMConfig
    context: int
    prefills: tuple[int, ...]
    decodes: tuple[int, ...]
    question: int  # tokens of a question with a picture
    copied: int  # bytes that are copied to know the bandwidth
    turns: int  # over which memory must not grow
    side: int  # of the square matrices whose product tells the GPU's rate
    vision: dict[str, VisionConfig]  # the first goes with the language model


SHAPES = {
    False: Shape(
        FULL,
        2048,
        (128, 512, 1024),
        (32, 512, 1920),
        300,
        1 << 30,
        50,
        8192,
        {
            "CLIP ViT-L/14, linear": PUBLISHED_VISION["clip"],
            "EVA ViT-g, Q-Former": PUBLISHED_VISION["eva"],
        },
    ),
    True: Shape(
        TINY,
        64,
        (16, 32),
        (8, 40),
        30,
        1 << 22,
        6,
        256,
        {
            "CLIP, linear": VisionConfig(
                "",
                16,
                "clip",
                "linear",
                PixelSpec(image_size=56),
                network=VisionNetwork(14, 64, 128, 2, 2, "quick_gelu", 1e-5),
            ),
            "EVA, Q-Former": VisionConfig(
                "",
                8,
                "eva",
                "qformer",
                PixelSpec(image_size=56),
                network=VisionNetwork(
                    14,
                    64,
                    128,
                    2,
                    2,
                    query_width=32,
                    query_inner_size=64,
                    query_layers=2,
                    query_heads=2,
                ),
            ),
        },
    ),
}


@dataclass(frozen=True)
class RandomWeights:
    """Weights that keep the scale of what they take, made on the device as they are asked for."""

    config: LMConfig
    precision: str
    device: torch.device
    prefix: np.ndarray | None = None

    @property
    def head(self) -> int:
        return self.config.padded_head_size

    @cached_property
    def words(self) -> np.ndarray:
        draw = np.random.default_rng(0).standard_normal((512, self.config.hidden_size))
        return draw.astype(np.float16)  # as a bundle's

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        return self.words[np.asarray(ids) % 512]

    def tensors(self) -> Iterator[LoadedTensor]:
        on = {"device": self.device}
        for item in decoder_layout(
            self.config, PRECISIONS[self.precision], block_of(self.precision)
        ):
            if item.kind == "vector":
                one = "norm" in item.key and item.key.endswith("weight")
                yield LoadedTensor(item.key, [torch.full(item.shape, float(one), **on)])
            elif item.bits:
                shape, scales = (s.shape for s in item.stored)
                codes = torch.randint(0, 256, shape, dtype=torch.uint8, **on)
                spread = 2**item.bits / 12**0.5 * item.shape[1] ** 0.5
                yield LoadedTensor(
                    item.key, [codes, torch.full(scales, 1 / spread, **on)], item.bits
                )
            else:
                kind = torch.float16 if self.device.type == "cuda" else torch.float32
                weight = torch.randn(item.shape, dtype=kind, **on)
                yield LoadedTensor(item.key, [weight.mul_(item.shape[1] ** -0.5)])


def random_vision(config: VisionConfig, outputs: int, device: torch.device) -> VisionWeights:
    """Unit layer norms, no biases, matrices that keep the scale of what they take.

    They are made on the device, and lie in the machine's memory as a published file's pages do.
    """
    sizes = parameters(config, outputs)

    def read(name: str) -> np.ndarray:
        shape = sizes[name]
        if len(shape) == 1 and not name.endswith("embedding"):
            return np.full(shape, float("norm" in name.lower() and name.endswith("weight")))
        made = torch.randn(shape, device=device).mul_(math.prod(shape[1:]) ** -0.5)
        return made.half().cpu().numpy()

    return VisionWeights(config, outputs, sizes, cache(read))


@cache
def picture(config: VisionConfig) -> np.ndarray:
    size = config.pixels.image_size
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


@dataclass(frozen=True)
class Blocks:
    """Another source's linears in blocks of 32, as an export would store them."""

    weights: Weights
    bits: int

    @property
    def head(self) -> int:
        return self.weights.head

    @property
    def prefix(self) -> np.ndarray | None:
        return self.weights.prefix

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        return self.weights.rows(ids)

    def tensors(self) -> Iterator[LoadedTensor]:
        for given in self.weights.tensors():
            array = np.array(given.arrays[0], np.float32)
            if array.ndim < 2:
                yield given
                continue
            stored = quantize_blocks(torch.from_numpy(array), bits=self.bits, block_size=32)
            yield replace(given, arrays=stored, bits=self.bits)


def manifest_of(config: LMConfig, precision: str) -> Manifest:
    decoder = Decoder("decoder.onnx", "e", precision=precision, block_size=block_of(precision))
    return Manifest("random", config, decoder, TokenizerConfig(), "chatglm")


def block_of(precision: str) -> int:
    return BLOCK if PRECISIONS[precision].block else 0


def parameter_bytes(module: nn.Module) -> int:
    """What a step reads of the weights, the scales of bitsandbytes aside."""
    tensors = [*module.parameters(), *(b for n, b in module.named_buffers() if n != "rotary")]
    return sum(t.numel() * t.element_size() for t in tensors)


def cache_bytes(config: LMConfig) -> int:
    """Of a token, in half precision."""
    return 2 * 2 * config.num_layers * config.hidden_size
