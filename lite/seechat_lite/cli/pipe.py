"""The command `seechat pipe`: requests and answers as JSON lines on stdin and stdout.

It serves programs in any language that start seechat as a child process; docs/embedding.md
describes the lines. Questions are answered in the order in which they came. A `stop` works while a
question is being answered.
"""

import argparse
import dataclasses
import io
import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from seechat_lite.cli.options import (
    add_format_option,
    add_load_options,
    add_model_option,
    load_options,
)
from seechat_lite.generation import DEFAULTS
from seechat_lite.interrupts import OUTPUT_GONE
from seechat_lite.json_structure import too_complex
from seechat_lite.pictures.written import from_base64, from_data_url, is_data_url
from seechat_lite.text_lines import Bytes, LineError, text_lines
from seechat_weights.errors import ImageError, SeechatError
from seechat_weights.plain_text import json_line

if TYPE_CHECKING:
    from seechat_lite.chat import Chat, Model

log = logging.getLogger(__name__)

MAX_WAITING = 64  # questions; more are refused
MAX_WAITING_BYTES = 128 << 20  # bytes of their lines
MAX_LINE = 64 << 20  # bytes: several pictures
MAX_CHATS = 256  # conversations that are remembered at once
MAX_NAME = 200  # characters of an id or of a conversation's name
MAX_INTEGER = 2**63 - 1
_ID = re.compile(r'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?[0-9]{1,18}(?![0-9.eE]))')


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `pipe` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "pipe",
        parents=[common],
        usage="%(prog)s [options]",
        help="JSON lines on stdin and stdout, for other programs",
        description="Answer JSON lines on stdin with JSON lines on stdout: docs/embedding.md.",
    )
    add_model_option(parser)
    add_load_options(parser)
    add_format_option(parser)
    parser.set_defaults(run=lambda args: _run(args, load_options(args, parser.error)))


def _run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from seechat_lite.loading import load

    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(encoding="utf-8")  # whatever the system's own encoding is

    def write(message: dict[str, Any]) -> None:
        try:
            out.write(json_line(message) + "\n")
            out.flush()
        except (OSError, ValueError):  # ValueError: closed
            raise OutputGoneError from None

    def progress(stage: str, done: int, total: int) -> None:
        write({"progress": stage, "done": done, "total": total})

    try:
        with load(args.model, progress=progress, **options) as model:
            model.chat(args.format)  # an unknown format is reported before anybody asks
            about = {"model": model.manifest.name, "precision": model.manifest.decoder.precision}
            write({"ready": True, "vision": model.manifest.vision is not None} | about)
            lines = sys.stdin.buffer if sys.stdin else io.BytesIO()
            pipe = Pipe(model, write, format=args.format)
            pipe.talk(text_lines(cast(Bytes, lines), most=MAX_LINE))
            return 1 if pipe.failed else 0
    except OutputGoneError:
        return OUTPUT_GONE


class OutputGoneError(Exception):
    """Nobody reads the answers any more. Not an OSError, lest it is taken for a file's."""


class RequestError(SeechatError):
    """A line that is not a request.

    message: what is wrong.
    id: the request's id, if it can be read.
    """

    def __init__(self, message: str, id: str | int | None = None) -> None:
        super().__init__(message)
        self.id = id


@dataclass(frozen=True)
class _Request:
    """A question. `chat` names its conversation; None for a conversation of its own."""

    id: str | int
    question: str
    images: tuple[str | bytes, ...] = ()
    chat: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 0  # characters of its line


class Pipe:
    """Answers lines.

    model: answers the questions.
    write: takes every answer, an object; called from two threads in turn; raises OutputGoneError.
    format: the conversation format; None for the bundle's.
    failed: whether something went wrong that no line caused.
    """

    def __init__(
        self, model: "Model", write: Callable[[dict[str, Any]], None], *, format: str | None = None
    ) -> None:
        self._model = model
        self._format = format
        self._write_now = write
        self._writing = threading.Lock()
        self._chats: dict[str, Chat] = {}
        self._requests: queue.Queue[_Request | str | None] = queue.Queue()
        self._state = threading.Lock()  # guards the next two
        self._waiting: dict[str | int, bool] = {}  # ids not yet answered; whether to stop them
        self._running: tuple[str | int, Chat] | None = None
        self._size = 0  # characters of the lines of all that wait
        self._gone = False
        self.failed = False

    def talk(self, lines: Iterable[str | LineError]) -> None:
        """Answer until the lines end and everything is answered.

        lines: the requests.

        Raises OutputGoneError.
        """
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        while (request := self._requests.get()) is not None:
            if isinstance(request, str):
                self._chats.pop(request, None)
                continue
            try:
                end = self._answer(request)
            except SeechatError as e:
                end = _error(request.id, e)
            except (OutputGoneError, KeyboardInterrupt):
                raise
            except Exception as e:
                end = self._our_mistake(request.id, e)
            with self._state:  # before its end is reported: after that the id may be used again
                self._running = None
                del self._waiting[request.id]
                self._size -= request.size
            self._write(end)
        if self._gone:
            raise OutputGoneError

    def _read(self, lines: Iterable[str | LineError]) -> None:
        """Put requests into the queue, and stop answers, as lines come."""
        try:
            for line in lines:
                try:
                    if isinstance(line, LineError):
                        raise RequestError(str(line), _id_in(line.guess))
                    if line.strip():
                        self._take(line)
                except RequestError as e:
                    self._write(_error(e.id, e))
                except (OutputGoneError, OSError):
                    raise
                except Exception as e:
                    self._write(self._our_mistake(None, e))
        except OutputGoneError:
            self._gone = True
        except Exception as e:  # stdin cannot be read; earlier questions are still answered
            self.failed = True
            log.error("standard input cannot be read any more: %s", e)
        finally:
            self._requests.put(None)

    def _our_mistake(self, id: str | int | None, error: Exception) -> dict[str, Any]:
        self.failed = True
        log.error("a line could not be answered", exc_info=error)
        name = type(error).__name__
        return {"id": id, "error": f"{name}: {error!s:.200} (please report it)", "type": name}

    def _take(self, line: str) -> None:
        """Carry out one line. Raises RequestError."""
        request = _parse(line)
        match request:
            case {"stop": str() | int() as id}:
                self._stop(id)
            case {"end": str(chat)}:
                self._requests.put(chat)
            case _:
                asked = _question(request, size=len(line))
                with self._state:
                    used = asked.id in self._waiting or len(self._waiting) >= MAX_WAITING
                    full = self._size + asked.size > MAX_WAITING_BYTES
                    if not (used or full):
                        self._waiting[asked.id] = False
                        self._size += asked.size
                if used:
                    text = f"{MAX_WAITING} questions wait already, or one with this id"
                    raise RequestError(
                        f"{text}; expected its answer first: wait for that", asked.id
                    )
                if full:
                    text = f"more than {MAX_WAITING_BYTES} characters of questions wait already"
                    raise RequestError(
                        f"{text}; expected their answers first: wait for one", asked.id
                    )
                self._requests.put(asked)

    def _stop(self, id: str | int) -> None:
        """End the answer with this id, or make it end before it begins."""
        with self._state:
            if self._running and self._running[0] == id:
                self._running[1].stop()
            elif id in self._waiting:
                self._waiting[id] = True

    def _answer(self, request: _Request) -> dict[str, Any]:
        chat = self._model.chat(self._format)
        if request.chat is not None:
            if request.chat not in self._chats and len(self._chats) >= MAX_CHATS:
                text = f"{MAX_CHATS} conversations are remembered already"
                raise RequestError(f'{text}; expected the end of one: {{"end": NAME}}')
            chat = self._chats.setdefault(request.chat, chat)
        pieces = chat.stream(request.question, request.images, **request.options)
        with self._state:
            if self._waiting[request.id]:
                chat.stop()
            self._running = request.id, chat
        answer = ""
        for piece in pieces:
            answer += piece
            self._write({"id": request.id, "text": piece})
        stats = dataclasses.asdict(chat.stats) if chat.stats else None
        return {"id": request.id, "done": True, "answer": answer, "stats": stats}

    def _write(self, message: dict[str, Any]) -> None:
        with self._writing:
            self._write_now(message)


def _error(id: str | int | None, error: SeechatError) -> dict[str, Any]:
    return {"id": id, "error": str(error), "type": type(error).__name__}


def _id_in(text: str) -> str | int | None:
    """The id in a line that cannot be parsed as a whole."""
    if found := _ID.search(text, 0, 1 << 20):
        with suppress(ValueError):
            return json.loads(found[1])
    return None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _parse(line: str) -> dict[str, Any]:
    """The object in a line. Raises RequestError."""
    if why := too_complex(line.encode("utf-8", "replace")):
        raise RequestError(
            f"not JSON that is read here; {why}: send a simpler object", _id_in(line)
        )
    try:
        request = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as e:
        message = f"not JSON ({e!s:.200}); expected an object a line"
        raise RequestError(message, _id_in(line)) from None
    if not isinstance(request, dict):
        raise RequestError("not an object; expected an object a line: put it into one")
    return request


def _shown(value: object) -> str:
    """A value for an error, always short."""
    match value:
        case str():
            return repr(value[:80])
        case int() if abs(value) > MAX_INTEGER:
            return "a number of very many digits"
        case list() | dict() if value:
            return f"a {type(value).__name__} of {len(value)}"
    return repr(value)


def _question(request: dict[str, Any], *, size: int) -> _Request:
    """Check a question's fields. Raises RequestError."""
    given = dict(request)
    id = given.pop("id", None)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise RequestError(
            f"id is {_shown(id)}; expected a text or a whole number: name the question"
        )
    if (len(id) > MAX_NAME) if isinstance(id, str) else abs(id) > MAX_INTEGER:
        raise RequestError(
            f"id is too long; expected at most {MAX_NAME} characters: take a shorter name"
        )

    def take(name: str, kinds: type | tuple[type, ...], expected: str) -> Any:
        value = given.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise RequestError(f"{name} is {_shown(value)}; expected {expected}: send that", id)
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise RequestError(
                f"{name} is {_shown(value)}; expected at most {MAX_INTEGER}: send a smaller one", id
            )
        return value

    question = (
        take("question", str, "a text") if "image" not in given or "question" in given else ""
    )
    chat = take("chat", str, "a text") if "chat" in given else None
    if chat is not None and len(chat) > MAX_NAME:
        raise RequestError(
            f"chat is too long; expected at most {MAX_NAME} characters: take a shorter name", id
        )
    images = given.pop("image", None)
    options = {}
    for name, default in DEFAULTS.items():
        if name not in given or name == "stop":  # here `stop` ends an answer by its id
            continue
        kind = type(default)
        if name == "schema":
            options[name] = take(name, dict, "a JSON schema, an object")
        elif kind is bool:
            options[name] = given.pop(name)
            if not isinstance(options[name], bool):
                raise RequestError(
                    f"{name} is {_shown(options[name])}; expected true or false: send that", id
                )
        else:
            value = take(name, (int, float) if kind is float else int, f"a {kind.__name__}")
            options[name] = kind(value)
    if given:
        unknown = ", ".join(_shown(name) for name in sorted(given)[:5])
        raise RequestError(
            f"unknown fields {unknown}; expected those of docs/embedding.md: leave others out", id
        )
    pictures = images if isinstance(images, list) else [] if images is None else [images]
    return _Request(id, question, tuple(_picture(p, id) for p in pictures), chat, options, size)


def _picture(given: object, id: str | int) -> str | bytes:
    match given:
        case str():
            return given
        case {"base64": str(text)}:
            try:
                if is_data_url(text):
                    return from_data_url(text, limit=MAX_LINE)
                return from_base64(text, limit=MAX_LINE)
            except ImageError as e:
                raise RequestError(
                    f"image: {e}; expected a path or {{base64: …}}: send that", id
                ) from None
    raise RequestError(f"image is {_shown(given)}; expected a path or {{base64: …}}: send that", id)
