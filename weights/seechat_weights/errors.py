"""Defines the exceptions of seechat-lite, in the package that all others import.

    SeechatError
    ├── BundleError        an exported folder cannot be used as it is
    ├── CheckpointError    published weights are missing, damaged or of another shape
    ├── ImageError         a picture cannot be read
    ├── MemoryPlanError    the model would not fit
    ├── EngineError        the execution engine cannot do what was asked
    ├── ContextError       a conversation does not fit the context, or a prompt is malformed
    └── OptionError        an argument is out of its range (a ValueError too)

Every message has three parts: what was read, what was expected, what to do.
"""

from seechat_weights.plain_text import one_line


class SeechatError(Exception):
    """Base of all errors raised on purpose. Its text is one line, whatever a file contained."""

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
