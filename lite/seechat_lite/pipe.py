"""The command `seechat pipe`: requests and answers as JSON lines on stdin and stdout.

For programs in any language that start seechat as a child process; docs/embedding.md describes the
lines. Questions are answered in the order they came; `stop` is heeded while one is answered.
"""

import argparse
import base64
import binascii
import dataclasses
import io
import json
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from seechat_lite.errors import SeechatError
from seechat_lite.options import add_load_options, add_model_option, load_options
from seechat_weights.plain_text import safe_json

if TYPE_CHECKING:
    from seechat_lite.chat import Chat, Model

OPTIONS = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "seed": int,
}
MAX_WAITING = 64  # questions; more are refused


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
    parser.add_argument("--format", metavar="NAME", help="conversation format")
    parser.set_defaults(run=lambda args: _run(args, load_options(args, parser.error)))


def _run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from seechat_lite.chat import load

    out = sys.stdout
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # whatever the system's own is

    def write(message: dict[str, Any]) -> None:
        out.write(safe_json(json.dumps(message, ensure_ascii=False)) + "\n")
        out.flush()

    def progress(stage: str, done: int, total: int) -> None:
        write({"progress": stage, "done": done, "total": total})

    with load(args.model, progress=progress, **options) as model:
        model.chat(args.format)  # an unknown format is said before anybody asks
        about = {"model": model.manifest.name, "precision": model.manifest.decoder.precision}
        write({"ready": True, "vision": model.manifest.vision is not None} | about)
        Pipe(model, write, format=args.format).talk(sys.stdin)
    return 0


class RequestError(SeechatError):
    """A line that is no request."""


@dataclass(frozen=True)
class _Request:
    """A question; `chat` names the conversation it belongs to, None for one of its own."""

    id: str | int
    question: str
    images: tuple[str | bytes, ...] = ()
    chat: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Pipe:
    """Answers lines. write: takes every answer, an object; called from two threads in turn."""

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
        self._waiting: dict[str | int, bool] = {}  # not yet answered; whether to be stopped
        self._running: tuple[str | int, Chat] | None = None

    def talk(self, lines: Iterable[str]) -> None:
        """Answer until the lines end and all has been answered."""
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        while (request := self._requests.get()) is not None:
            if isinstance(request, str):
                self._chats.pop(request, None)
                continue
            try:
                end = self._answer(request)
            except SeechatError as e:
                end = _error(request.id, e)
            with self._state:  # before its end is told: the id may be used again then
                self._running = None
                del self._waiting[request.id]
            self._write(end)

    def _read(self, lines: Iterable[str]) -> None:
        """Put requests into the queue, and stop answers, as lines come."""
        try:
            for line in lines:
                if line.strip():
                    self._take(line)
        except OSError:  # stdin or stdout is gone, and with it whom we could tell
            pass
        finally:
            self._requests.put(None)

    def _take(self, line: str) -> None:
        try:
            request = _parse(line)
        except RequestError as e:
            self._fail(None, e)
            return
        match request:
            case {"stop": str() | int() as id}:
                self._stop(id)
            case {"end": str(chat)}:
                self._requests.put(chat)
            case _:
                try:
                    asked = _question(request)
                except RequestError as e:
                    self._fail(request.get("id"), e)
                    return
                with self._state:
                    used = asked.id in self._waiting or len(self._waiting) >= MAX_WAITING
                    if not used:
                        self._waiting[asked.id] = False
                if used:
                    text = f"{MAX_WAITING} questions wait already, or one with this id"
                    self._fail(asked.id, RequestError(f"{text}; expected its answer first"))
                else:
                    self._requests.put(asked)

    def _stop(self, id: str | int) -> None:
        """End the answer with this id, or have it end before it begins."""
        with self._state:
            if self._running and self._running[0] == id:
                self._running[1].stop()
            elif id in self._waiting:
                self._waiting[id] = True

    def _answer(self, request: _Request) -> dict[str, Any]:
        chat = self._model.chat(self._format)
        if request.chat is not None:
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

    def _fail(self, id: str | int | None, error: SeechatError) -> None:
        self._write(_error(id, error))

    def _write(self, message: dict[str, Any]) -> None:
        with self._writing:
            self._write_now(message)


def _error(id: str | int | None, error: SeechatError) -> dict[str, Any]:
    return {"id": id, "error": str(error), "type": type(error).__name__}


def _parse(line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"not JSON ({e}); expected an object a line") from None
    if not isinstance(request, dict):
        raise RequestError("not an object; expected an object a line")
    return request


def _question(request: dict[str, Any]) -> _Request:
    """Check a question's fields. Raises RequestError."""
    given = dict(request)

    def take(name: str, kinds: type | tuple[type, ...], expected: str) -> Any:
        value = given.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise RequestError(f"{name} is {value!r:.80}; expected {expected}")
        return value

    id = take("id", (str, int), "a text or a whole number that names the question")
    question = take("question", str, "a text")
    chat = take("chat", str, "a text") if "chat" in given else None
    images = given.pop("image", None)
    options = {}
    for name, kind in OPTIONS.items():
        if name in given:
            value = take(name, (int, float) if kind is float else int, f"a {kind.__name__}")
            options[name] = kind(value)
    if given:
        raise RequestError(f"unknown fields {sorted(given)}; see docs/embedding.md")
    pictures = images if isinstance(images, list) else [] if images is None else [images]
    return _Request(id, question, tuple(map(_picture, pictures)), chat, options)


def _picture(given: object) -> str | bytes:
    match given:
        case str():
            return given
        case {"base64": str(text)}:
            try:
                return base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                pass
    raise RequestError(f"image is {given!r:.80}; expected a path or {{base64: …}}")
