"""Engines execute a bundle: one class each, chosen by name.

A new engine is a class with the methods of base.Engine, a row in ENGINES and its name in the
contract test. Its module is imported only when it is asked for.
"""

from collections.abc import Iterable
from importlib import import_module

from seechat_lite.engines.base import Engine, EngineOptions
from seechat_lite.source import Source
from seechat_weights.errors import EngineError

ENGINES = {
    "onnx": ("seechat_lite.engines.onnx.engine", "OnnxEngine"),
    "torch": ("seechat_lite.engines.torch.engine", "TorchEngine"),
}
DEFAULT = "onnx"


def engine_class(name: str) -> type[Engine]:
    """The class of the engine called `name`; "auto" takes the default.

    Raises EngineError for an unknown engine, or one whose libraries are not installed.
    """
    name = DEFAULT if name == "auto" else name
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}; expected one of: auto, {', '.join(ENGINES)}")
    module, cls = ENGINES[name]
    try:
        return getattr(import_module(module), cls)
    except ImportError as e:
        raise EngineError(
            f"{e.name} is not installed; the engine {name!r} needs it: "
            f'pip install "seechat-lite[{name}]"'
        ) from None


def not_for(name: str, given: Iterable[str]) -> list[str]:
    """Which of these names of base.OPTIONAL the engine called `name` cannot do."""
    given = list(given)  # mostly none: then nothing is imported
    return [option for option in given if option not in engine_class(name).own_options]


def create(
    name: str, source: Source, *, context: int, options: EngineOptions | None = None
) -> Engine:
    """Load what `source` is with the engine called `name`, if there is room for it.

    Raises EngineError for an unknown engine or device, or when the graphs cannot be loaded, and
    MemoryPlanError.
    """
    engine, options = engine_class(name), options or EngineOptions()
    plan = engine.plan(source, context=context, options=options)
    engine.check(plan, source, options=options)
    return engine(source, context=context, options=options, plan=plan)


__all__ = ["ENGINES", "Engine", "EngineOptions", "create", "engine_class", "not_for"]
