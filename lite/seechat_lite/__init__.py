"""Chinese and English dialogue about images with the SEEChat family of models.

import seechat_lite as sl

with sl.load() as model:                       # or sl.load("path/to/bundle")
    chat = model.chat()
    for piece in chat.stream("这是什么?", image="cat.png"):
        print(piece, end="", flush=True)
    print(chat.ask("它能吃吗?"))                # remembers the picture and the first answer
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from seechat_lite.captions.run import Caption
    from seechat_lite.chat import Answer, AnswerStream, Chat, Model, Stats
    from seechat_lite.images import ImageSource, thumbnail
    from seechat_lite.loading import load
    from seechat_lite.prompt import Prompt
    from seechat_weights.vision.weights import VisionFiles

    EyeFiles = VisionFiles

__all__ = [
    "Answer",
    "AnswerStream",
    "BundleError",
    "Caption",
    "Chat",
    "CheckpointError",
    "ContextError",
    "EngineError",
    "EyeFiles",
    "ImageError",
    "ImageSource",
    "MemoryPlanError",
    "Model",
    "OptionError",
    "Prompt",
    "SeechatError",
    "Stats",
    "VisionFiles",
    "load",
    "thumbnail",
]

# imported when first used, so that --help and Ctrl-C work before numpy is loaded
_LATER = {
    **dict.fromkeys(("Answer", "AnswerStream", "Chat", "Model", "Stats"), "seechat_lite.chat"),
    **dict.fromkeys(("ImageSource", "thumbnail"), "seechat_lite.images"),
    "Caption": "seechat_lite.captions.run",
    "load": "seechat_lite.loading",
    "Prompt": "seechat_lite.prompt",
    "VisionFiles": "seechat_weights.vision.weights",
}


def __getattr__(name: str) -> Any:
    if name == "EyeFiles":  # its name until 0.1; each use warns
        warnings.warn("EyeFiles is now VisionFiles", DeprecationWarning, stacklevel=2)
        name = "VisionFiles"
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value
