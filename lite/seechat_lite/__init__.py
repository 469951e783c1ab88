"""Chinese and English dialogue about images with the SEEChat family of models.

import seechat_lite as sl

with sl.load() as model:                       # or sl.load("path/to/bundle")
    chat = model.chat()
    for piece in chat.stream("这是什么?", image="cat.png"):
        print(piece, end="", flush=True)
    print(chat.ask("它能吃吗?"))                # remembers the picture and the first answer
"""

from seechat_lite.chat import Chat, Model, Stats, load
from seechat_lite.errors import (
    BundleError,
    CheckpointError,
    ContextError,
    EngineError,
    ImageError,
    MemoryPlanError,
    SeechatError,
)
from seechat_lite.prompt import Prompt

__all__ = [
    "BundleError",
    "Chat",
    "CheckpointError",
    "ContextError",
    "EngineError",
    "ImageError",
    "MemoryPlanError",
    "Model",
    "Prompt",
    "SeechatError",
    "Stats",
    "load",
]
