"""The sizes of the published vision parts, for weights made up in their shapes."""

from seechat_weights.bundle import VisionConfig, VisionNetwork

# as in a bundle's manifest, but for the graph's name and how else pictures are prepared
PUBLISHED_VISION = {
    "clip": VisionConfig(  # CLIP ViT-L/14, whose last layer does not run, and a linear projector
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
