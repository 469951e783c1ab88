"""Writes command lines for people from the facts of an error or an identity."""

import os
import re
import shlex
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_weights.errors import SeechatError

if TYPE_CHECKING:
    from seechat_weights.identify import Identity


def quoted(text: str | Path) -> str:
    """One word of a command line, quoted for sh or, on Windows, for both cmd and PowerShell.

    text: the word.
    """
    text = str(text)
    if os.name == "posix":
        return shlex.quote(text)
    return f'"{text}"' if shlex.quote(text.replace("\\", "/")) != text.replace("\\", "/") else text


def flag(name: str) -> str:
    """The option of a command for an argument of the library.

    name: the argument.
    """
    return "--" + name.replace("_", "-")


def flags(options: Mapping[str, Any]) -> str:
    """Options of a command for arguments of the library.

    options: argument -> value; None stands for a value that is not known.
    """
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words.append(flag(name) if value is None else f"{flag(name)} {quoted(str(value))}")
    return " ".join(words)


def hint(error: SeechatError, known: Container[str] = ()) -> str:
    """What to type to follow an error's advice; "" if there is nothing.

    error: the error.
    known: the names of the options that the running command has.
    """
    own = flags({name: value for name, value in error.options.items() if name in known})
    return "; ".join(filter(None, [own, *(command(*call) for call in error.calls.items())]))


def command(call: str, options: Mapping[str, Any]) -> str:
    """The command for a call of the library.

    call: "load", "export" or "identify".
    options: the arguments of the call.
    """
    options = dict(options)
    if call == "identify":
        path = options.pop("path", None)
        return f"seechat info {flags(options)}{'PATH' if path is None else quoted(path)}"
    if call == "load":
        return f"seechat chat {flags(options)}".strip()
    if "lm" in options:
        options |= {"precision": "int4"} | options | {"out": "BUNDLE"}
    elif "scorer" in options:
        options |= {"out": "SCORER"}
    return f"seechat export {flags(options)}".strip()


def told(error: SeechatError, known: Container[str] = ()) -> str:
    """An error with its hint, in one line.

    error: the error.
    known: the names of the options that the running command has.
    """
    found = hint(error, known)
    return f"{error} ({found})" if found else str(error)


def as_usage(error: SeechatError) -> str:
    """An error of wrong arguments; they are named as they were typed.

    error: the error.
    """
    text = str(error)
    for name in error.options:
        text = re.sub(rf"(?<![\w-]){name}(?![\w-])", flag(name), text)
    return text


def export_with(found: "Identity") -> str | None:
    """The command that makes a bundle of what was found; None if there is none.

    found: what was found.
    """
    if found.kind in ("bundle", "scorer") or not found.options:
        return None
    return command("export", found.options)


def chat_with(found: "Identity") -> str | None:
    """The command that runs what was found as it is; None if there is none.

    found: what was found.
    """
    if not found.runs:
        return None
    if found.kind == "bundle":
        return command("load", found.options)
    return command("load", {"engine": "torch", "model": found.options["lm"]})
