"""Describes the shapes of networks, as manifests and checkpoints state them."""

import math
from dataclasses import dataclass

MAX_LAYERS = 1024  # of any network; the names of more layers would fill the memory
RESIZES = ("squash", "crop", "crop_floor", "pad", "square")  # see PixelSpec


# scales the residual of ChatGLM's layers; the published code computes it with 28 layers, however
# many there are
ALPHA = math.sqrt(2 * 28)


@dataclass(frozen=True)
class LMConfig:
    """Shape of a decoder; the defaults are those of the published ChatGLM-6B.

    family: a name of lm.families.LM_FAMILIES; it says how the decoder computes.
    pad_id, mask_id, gmask_id: used by ChatGLM only.
    num_kv_heads, rope_theta and the other rope_ fields, other_eos: used by LLaMA only.
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
    # LLaMA-3.1's scaling: a wave of less than rope_original / rope_high positions stays as it is,
    # one of more than rope_original / rope_low is stretched by rope_factor. 0: all are stretched
    rope_original: int = 0
    rope_low: float = 0.0
    rope_high: float = 0.0
    other_eos: tuple[int, ...] = ()  # further ids that end an answer

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values. Each serves an equal share of the query heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_heads

    @property
    def padded_head_size(self) -> int:
        """Size of a head in a bundle and its cache: the next multiple of 8, which runtimes need."""
        return -(-self.head_size // 8) * 8


@dataclass(frozen=True)
class PixelSpec:
    """How a picture becomes the vision graph's input, float32 [n, 3, image_size, image_size].

    image_size: pixels a side.
    mean, std: of red, green and blue; a value v in 0..1 becomes (v - mean) / std.
    resize: "squash" ignores the aspect ratio; "crop" resizes the shorter side and cuts the centre;
        "crop_floor" does so with halves of a pixel rounded down, as transformers does; "pad" fits
        the longer side and fills the rest with `background`; "square" first makes the picture
        square with `background`, then resizes that, as LLaVA does.
    interpolation: the name of a filter, such as "bicubic".
    background: red, green and blue, 0..255.
    exact: do what the published code does, with its oddities: EXIF orientation is ignored, alpha is
        dropped, 16-bit grey is saturated, and the conversion to RGB comes before the resize if
        `rgb_first`, else after it. Otherwise the picture is turned upright, alpha is laid over
        `background`, and 16 bits are scaled.
    rgb_first: see `exact`.
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
    """The sizes that nn.vision needs, beside those in VisionConfig, to build tower and bridge."""

    patch_size: int
    width: int
    inner_size: int
    layers: int  # that run; CLIP runs one less than published
    heads: int
    activation: str = "gelu"  # the exact one; or "quick_gelu"
    layernorm_epsilon: float = 1e-6
    class_token: bool = False  # whether CLIP's class token is among the embeddings of a picture
    query_width: int = 0  # this and the following fields: the Q-Former's
    query_inner_size: int = 0
    query_layers: int = 0
    query_heads: int = 0
    query_words: int = 0  # rows of its word embeddings, if it reads the question too
    query_positions: int = 0  # tokens of the longest question that it reads


@dataclass(frozen=True)
class QuestionConfig:
    """How a bridge reads the question beside the picture, as InstructBLIP's does.

    graph: ONNX file: seen f32 [n, positions, width] and question_ids i64 [n, pieces] ->
        image_embeds f32 [n, tokens, hidden]; `seen` is what the vision graph then gives.
    vocabulary: the file of its WordPiece vocabulary, a piece a line.
    pieces: the most that are read of a question, [CLS] and [SEP] included; the last ones count.
    """

    graph: str = "vision_question.onnx"
    vocabulary: str = "question_vocab.txt"
    pieces: int = 128

    @property
    def weights(self) -> str:
        """The file of the graph's weights."""
        return f"{self.graph}.data"

    @property
    def half(self) -> str:
        """The file of the same graph in float16, as Decoder.half."""
        return half_graph(self.graph)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, bridge and projector as one graph from pixels to embeddings.

    If there is a `network`, the graph's weights lie beside it in a safetensors file, under the
    names of the network's parameters (see vision.network).
    """

    graph: str  # ONNX file: pixel_values f32 [n, 3, S, S] -> image_embeds f32 [n, tokens, hidden],
    # or, with a `question`, what its graph takes as `seen`
    tokens: int  # embeddings of one picture
    tower: str  # "clip", ...: what was exported, for people
    bridge: str  # "linear", "mlp2x_gelu", ...
    pixels: PixelSpec = PixelSpec()
    precision: str = "fp32"
    network: VisionNetwork | None = None  # None: only the graph describes it
    marks: tuple[str, str] = ("", "")  # tokens that the LM was trained to see around a picture
    question: QuestionConfig | None = None  # if the embeddings depend on the question

    @property
    def weights(self) -> str:
        """The file of the graph's weights, if they are not in the graph itself."""
        return f"{self.graph}.data"

    @property
    def half(self) -> str:
        """The file of the same graph in float16, as Decoder.half."""
        return half_graph(self.graph)

    @property
    def output(self) -> tuple[int, int] | None:
        """Tokens and width of what the vision graph gives; None for those of the embeddings."""
        if self.question is None or self.network is None:
            return None
        return 1 + (self.pixels.image_size // self.network.patch_size) ** 2, self.network.width


def half_graph(graph: str) -> str:
    """The file name of the float16 graph that may lie beside `graph`."""
    return f"{graph.removesuffix('.onnx')}.fp16.onnx"
