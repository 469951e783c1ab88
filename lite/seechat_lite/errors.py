"""The public home of the exceptions, which are defined where every room can raise them."""

from seechat_weights.errors import (
    BundleError,
    CheckpointError,
    ContextError,
    EngineError,
    ImageError,
    MemoryPlanError,
    OptionError,
    SeechatError,
)

__all__ = [
    "BundleError",
    "CheckpointError",
    "ContextError",
    "EngineError",
    "ImageError",
    "MemoryPlanError",
    "OptionError",
    "SeechatError",
]
