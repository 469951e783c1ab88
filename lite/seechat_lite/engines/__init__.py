"""Chooses an engine by name. Engines execute a bundle; each is one class.

A new engine needs a class with the methods of base.Engine, a row in ENGINES and its name in the
contract test. Its module is imported only when it is asked for.
"""

from collections.abc import Iterable
from importlib import import_module

from seechat_lite.engines.base import Engine, EngineOptions
from seechat_lite.source import Source
from seechat_weights.arguments import check_choice
from seechat_weights.errors import EngineError
from seechat_weights.libraries import import_error

ENGINES = {
    "onnx": ("seechat_lite.engines.onnx.engine", "OnnxEngine"),
    "torch": ("seechat_lite.engines.torch.engine", "TorchEngine"),
}
DEFAULT = "onnx"


def engine_class(name: str) -> type[Engine]:
    """The class of an engine.

    name: a name of ENGINES; "auto" takes the default.

    Raises OptionError for an unknown engine, EngineError for one whose libraries are not installed.
    """
    check_choice("engine", name, ("auto", *ENGINES))
    name = DEFAULT if name == "auto" else name
    module, cls = ENGINES[name]
    try:
        return getattr(import_module(module), cls)
    except (ImportError, OSError) as e:
        needed = f"expected it for the engine {name!r}"
        install = "seechat-lite" if name == DEFAULT else f'"seechat-lite[{name}]"'
        raise import_error(EngineError, e, needed=needed, install=install) from None


def not_for(name: str, given: Iterable[str]) -> list[str]:
    """The given options that an engine does not have.

    name: the engine.
    given: names of base.OPTIONAL.
    """
    given = list(given)  # usually none; then nothing is imported
    return [option for option in given if option not in engine_class(name).own_options]


def create(
    name: str, source: Source, *, context: int, options: EngineOptions | None = None
) -> Engine:
    """Load a model with an engine, if there is room for it.

    name: the engine.
    source: the model.
    context: tokens that the cache has room for.
    options: where and how to run.

    Raises OptionError for an unknown engine, EngineError for a device that is not there or if the
    graphs cannot be loaded, and MemoryPlanError.
    """
    engine, options = engine_class(name), options or EngineOptions()
    plan = engine.plan(source, context=context, options=options)
    engine.check(plan, source, options=options)
    return engine(source, context=context, options=options, plan=plan)


__all__ = ["ENGINES", "Engine", "EngineOptions", "create", "engine_class", "not_for"]
