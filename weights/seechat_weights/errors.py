"""Defines the exceptions of seechat-lite, in the package that all others import.

    SeechatError
    ├── BundleError        an exported folder cannot be used as it is
    ├── CheckpointError    published weights are missing, damaged or of another shape
    ├── ImageError         a picture cannot be read
    ├── MemoryPlanError    the model would not fit
    ├── EngineError        the execution engine cannot do what was asked
    ├── ContextError       a conversation does not fit the context, or a prompt is malformed
    └── OptionError        an argument is out of its range (a ValueError too)

Every message has three parts: what was read, what was expected, what to do. The last one speaks to
whoever calls the library; the command line says besides what is to be typed (cli/hints.py).
"""

from collections.abc import Mapping
from typing import Any

from seechat_weights.plain_text import one_line


class SeechatError(Exception):
    """Base of all errors raised on purpose. Its text is one line, whatever a file contained.

    options: the arguments of the failed call that the advice is about, with values that would do;
        None for a value that the caller has to find.
    calls: other calls that the advice is about, each with its arguments: "load", "export" (make a
        bundle) or "identify" (ask what a path holds).
    """

    def __init__(
        self,
        *args: object,
        options: Mapping[str, Any] | None = None,
        calls: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(*args)
        self.options = dict(options or {})
        self.calls = dict(calls or {})

    def __str__(self) -> str:
        return one_line(super().__str__())


class BundleError(SeechatError):
    """An exported folder is missing, damaged, changed or of a newer version."""


class CheckpointError(SeechatError):
    """A published checkpoint is missing a tensor, holds one too many, or is damaged."""


class ImageError(SeechatError):
    """A picture is missing, damaged or too large, or the file is not a picture."""


class MemoryPlanError(SeechatError):
    """The model, its cache and its workspace would not fit the memory there is."""


class EngineError(SeechatError):
    """An engine or device is unknown, not installed or in use."""


class ContextError(SeechatError):
    """A prompt is malformed or longer than the context the model was loaded with."""


class OptionError(SeechatError, ValueError):
    """An argument of a call, or an option of a command, has a value that is not allowed."""
