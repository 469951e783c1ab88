"""Engines execute a bundle: one class each, chosen by name.

A new engine is a class with the methods of base.Engine, a row in ENGINES and its name in the
contract test. Its module is imported only when it is asked for.
"""

from importlib import import_module

from seechat_lite.engines.base import Engine, EngineOptions
from seechat_lite.errors import EngineError
from seechat_lite.source import Source

ENGINES = {
    "onnx": ("seechat_lite.engines.onnx", "OnnxEngine"),
    "torch": ("seechat_lite.engines.torch", "TorchEngine"),
}
DEFAULT = "onnx"


def create(
    name: str,
    source: Source,
    *,
    context: int,
    options: EngineOptions | None = None,
) -> Engine:
    """Load what `source` is with the engine called `name` ("auto" takes the default).

    Raises EngineError for an unknown engine or device, or when the graphs cannot be loaded.
    """
    name = DEFAULT if name == "auto" else name
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}; expected one of: auto, {', '.join(ENGINES)}")
    module, cls = ENGINES[name]
    try:
        engine = getattr(import_module(module), cls)
    except ImportError as e:
        raise EngineError(
            f"{e.name} is not installed; the engine {name!r} needs it: "
            f'pip install "seechat-lite[{name}]"'
        ) from None
    return engine(source, context=context, options=options or EngineOptions())


__all__ = ["ENGINES", "Engine", "EngineOptions", "create"]
