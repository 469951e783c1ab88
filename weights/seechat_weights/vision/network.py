"""Lists the vision networks: their parameters, and the sizes of the published ones.

Parameters have the names of nn.vision's networks in seechat_lite. Every reader of weights, and
every maker of random ones, takes names and shapes from here.
"""

from seechat_weights.config import VisionConfig, VisionNetwork
from seechat_weights.files.accounting import Shape

ACTIVATIONS = ("quick_gelu", "gelu")
TOWER, BRIDGE = "tower.clip.", "bridge."  # prefixes of CLIP and its bridge

# the tensors of each bridge and their sizes: o(utputs), i(nputs)
BRIDGE_TENSORS = {
    "linear": {"weight": "oi", "bias": "o"},
    "mlp2x_gelu": {"0.weight": "oi", "0.bias": "o", "2.weight": "oo", "2.bias": "o"},
}
QFORMER = "qformer"
QUESTION_QFORMER = "qformer_question"  # InstructBLIP's, which reads the question too
JOINED = "joined4"  # MiniGPT-4's for Llama 2: a linear of four neighbouring patches
JOINED_PATCHES = 4
QFORMERS = (QFORMER, QUESTION_QFORMER)
NETWORKS = {
    "clip": tuple(BRIDGE_TENSORS),
    "eva": (*QFORMERS, JOINED),
}  # each tower with the bridges that fit it


def parameters(config: VisionConfig, outputs: int) -> dict[str, Shape]:
    """All parameters of a network, and their shapes.

    config: describes the network.
    outputs: the language model's hidden size.
    """
    network, image_size = config.network, config.pixels.image_size
    assert network
    if config.bridge in NETWORKS["eva"]:
        return blip_parameters(network, image_size, config.bridge, config.tokens, outputs)
    tower = clip_parameters(network, image_size)
    bridge = bridge_parameters(config.bridge, network.width, outputs)
    return {TOWER + k: s for k, s in tower.items()} | {BRIDGE + k: s for k, s in bridge.items()}


def bridge_parameters(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    """The parameters of a bridge and their shapes; the names lack the prefix BRIDGE.

    name: a key of BRIDGE_TENSORS.
    inputs: width of the tower.
    outputs: the language model's hidden size.
    """
    lengths = {"o": outputs, "i": inputs}
    return {k: tuple(lengths[axis] for axis in axes) for k, axes in BRIDGE_TENSORS[name].items()}


def clip_parameters(network: VisionNetwork, image_size: int) -> dict[str, Shape]:
    """The parameters of a CLIP tower and their shapes; the names lack the prefix TOWER.

    network: the tower's sizes.
    image_size: pixels a side.
    """
    width, inner, patch = network.width, network.inner_size, network.patch_size
    positions = 1 + (image_size // patch) ** 2
    layer: dict[str, Shape] = {
        "layer_norm1.weight": (width,),
        "layer_norm1.bias": (width,),
        "layer_norm2.weight": (width,),
        "layer_norm2.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer[f"self_attn.{name}.weight"] = (width, width)
        layer[f"self_attn.{name}.bias"] = (width,)
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.position_embedding.weight": (positions, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "pre_layrnorm.weight": (width,),  # the published spelling
        "pre_layrnorm.bias": (width,),
        **{f"encoder.layers.{i}.{k}": s for i in range(network.layers) for k, s in layer.items()},
    }


def blip_parameters(
    network: VisionNetwork, image_size: int, bridge: str, queries: int, outputs: int
) -> dict[str, Shape]:
    """The parameters of EVA ViT and its bridge, and their shapes.

    network: their sizes.
    image_size: pixels a side.
    bridge: one of NETWORKS["eva"].
    queries: how many a Q-Former has.
    outputs: the language model's hidden size.
    """
    width, inner, patch = network.width, network.inner_size, network.patch_size
    query_width, query_inner = network.query_width, network.query_inner_size
    positions = 1 + (image_size // patch) ** 2
    sizes: dict[str, Shape] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        sizes[f"{name}.weight"], sizes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, size: int) -> None:
        sizes[f"{name}.weight"] = sizes[f"{name}.bias"] = (size,)

    sizes["tower.vit.embeddings.class_embedding"] = (1, 1, width)
    sizes["tower.vit.embeddings.position_embedding"] = (1, positions, width)
    sizes["tower.vit.embeddings.patch_embedding.weight"] = (width, 3, patch, patch)
    sizes["tower.vit.embeddings.patch_embedding.bias"] = (width,)
    for i in range(network.layers):
        at = f"tower.vit.encoder.layers.{i}"
        norm(f"{at}.layer_norm1", width)
        linear(f"{at}.self_attn.qkv", 3 * width, width)
        linear(f"{at}.self_attn.projection", width, width)
        norm(f"{at}.layer_norm2", width)
        linear(f"{at}.mlp.fc1", inner, width)
        linear(f"{at}.mlp.fc2", width, inner)
    norm("tower.vit.post_layernorm", width)
    if bridge == JOINED:
        linear("bridge.projection", outputs, JOINED_PATCHES * width)
        return sizes
    sizes["bridge.query_tokens"] = (1, queries, query_width)
    reads = bridge == QUESTION_QFORMER
    if reads:
        at = "bridge.qformer.embeddings"
        sizes[f"{at}.word_embeddings.weight"] = (network.query_words, query_width)
        sizes[f"{at}.position_embeddings.weight"] = (network.query_positions, query_width)
        norm(f"{at}.layernorm", query_width)
    else:
        norm("bridge.qformer.layernorm", query_width)
    for i in range(network.query_layers):
        at = f"bridge.qformer.encoder.layer.{i}"
        for name in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            source = width if name == "crossattention" else query_width
            linear(f"{at}.{name}.attention.query", query_width, query_width)
            linear(f"{at}.{name}.attention.key", query_width, source)
            linear(f"{at}.{name}.attention.value", query_width, source)
            linear(f"{at}.{name}.output.dense", query_width, query_width)
            norm(f"{at}.{name}.output.LayerNorm", query_width)
        for kind in ("_query", "") if reads else ("_query",):  # of queries, and of the question
            linear(f"{at}.intermediate{kind}.dense", query_inner, query_width)
            linear(f"{at}.output{kind}.dense", query_width, query_inner)
            norm(f"{at}.output{kind}.LayerNorm", query_width)
    linear("bridge.projection", outputs, query_width)
    return sizes


# as in a bundle's manifest, without the graph's name and further preparation of pictures
PUBLISHED_VISION = {
    "clip": VisionConfig(  # CLIP ViT-L/14 without its last layer, and a linear projector
        graph="",
        tokens=256,
        tower="clip",
        bridge="linear",
        network=VisionNetwork(
            patch_size=14,
            width=1024,
            inner_size=4096,
            layers=23,
            heads=16,
            activation="quick_gelu",
            layernorm_epsilon=1e-5,
        ),
    ),
    "eva": VisionConfig(  # SEEChat's and VisualGLM-6B's EVA ViT-g and Q-Former
        graph="",
        tokens=32,
        tower="eva",
        bridge="qformer",
        network=VisionNetwork(
            patch_size=14,
            width=1408,
            inner_size=6144,
            layers=39,
            heads=16,
            query_width=768,
            query_inner_size=3072,
            query_layers=12,
            query_heads=12,
        ),
    ),
}
