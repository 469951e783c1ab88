"""The shapes of networks, as manifests and checkpoints state them."""

import math
from dataclasses import dataclass

MAX_LAYERS = 1024  # of any network; more would fill the memory with names before it is refused


# the residual of ChatGLM's layers is scaled by it; the published code uses 28 layers, however many
# there are
ALPHA = math.sqrt(2 * 28)


@dataclass(frozen=True)
class LMConfig:
    """Shape of a decoder; the defaults are those of the published ChatGLM-6B.

    family: a name of lm_families.LM_FAMILIES, which says how the decoder computes. pad_id, mask_id
    and gmask_id are ChatGLM's; num_kv_heads, rope_theta and rope_factor are LLaMA's.
    """

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_heads: int = 32
    inner_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    pad_id: int = 3
    mask_id: int = 130000
    gmask_id: int = 130001
    bos_id: int = 130004  # <sop>: the first token of an answer
    eos_id: int = 130005  # <eop>: ends an answer
    family: str = "chatglm"
    num_kv_heads: int = 0  # heads of keys and values; 0: as many as of queries
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # positions are divided by it

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; each serves as many heads of queries as the others."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_head_size(self) -> int:
        """Size of a head in a bundle and its cache: the next multiple of 8, as runtimes want it."""
        return -(-self.head_size // 8) * 8


@dataclass(frozen=True)
class PixelSpec:
    """How a picture becomes the vision graph's input, float32 [n, 3, image_size, image_size].

    resize: "squash" ignores the aspect ratio; "crop" resizes the shorter side and cuts the centre;
    "pad" fits the longer side and fills the rest with `background`.
    exact: do what the published code does, its oddities included (EXIF orientation ignored, alpha
    dropped, 16-bit grey saturated, conversion to RGB before the resize if `rgb_first`, else
    after it); otherwise turn the picture upright, lay alpha over `background`, scale 16 bits.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "squash"
    interpolation: str = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    exact: bool = False
    rgb_first: bool = True


@dataclass(frozen=True)
class VisionNetwork:
    """What nn.vision builds tower and bridge with, beside what VisionConfig itself says."""

    patch_size: int
    width: int
    inner_size: int
    layers: int  # that run, which for CLIP is one less than published
    heads: int
    activation: str = "gelu"  # the exact one; or "quick_gelu"
    layernorm_epsilon: float = 1e-6
    query_width: int = 0  # a Q-Former's, as the rest
    query_inner_size: int = 0
    query_layers: int = 0
    query_heads: int = 0


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, bridge and projector, together one graph: pixels to embeddings.

    With a `network`, the graph's weights lie beside it in a safetensors file, under the names of
    the network's parameters (see vision.network).
    """

    graph: str  # ONNX file: pixel_values f32 [n, 3, S, S] -> image_embeds f32 [n, tokens, hidden]
    tokens: int  # embeddings of one picture
    tower: str  # "clip", ...: what was exported, for people
    bridge: str  # "linear", "mlp2x_gelu", ...
    pixels: PixelSpec = PixelSpec()
    precision: str = "fp32"
    network: VisionNetwork | None = None  # None: the graph alone knows

    @property
    def weights(self) -> str:
        """The file of the graph's weights, where they are not in the graph itself."""
        return f"{self.graph}.data"

    @property
    def half(self) -> str:
        """The same in float16, as Decoder.half."""
        return half_graph(self.graph)


def half_graph(graph: str) -> str:
    """Name of the graph in float16 that may lie beside `graph`."""
    return f"{graph.removesuffix('.onnx')}.fp16.onnx"
