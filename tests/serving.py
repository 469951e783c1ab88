"""Servers for the tests: in a thread of this process, or as the command `seechat serve`."""

import base64
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette

import seechat_lite as sl
from seechat_lite.loading import load as load_model
from seechat_lite.server.app import create_app
from seechat_lite.server.fetch import Fetcher
from seechat_lite.server.listen import configure
from seechat_lite.server.scheduler import Scheduler
from seechat_lite.server.settings import Settings
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import Manifest, read_manifest

IMAGES = Path(__file__).parent.parent / "docs/images"
PANDA = (IMAGES / "panda.png").read_bytes()
PATIENCE = 200  # seconds; ends what hangs, and is never what a test is about


def data_url(data: bytes = PANDA) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def asking(question: str, *urls: str, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": content}], **fields}


def slow_load(seconds: float) -> Callable[..., sl.Model]:
    """The built-in model, taking so long for each token and never ending by itself.

    After twenty tokens it waits until it is stopped, however long the test takes over that.
    """

    def load(*args: Any, **options: Any) -> sl.Model:
        model = load_model(*args, **options)
        engine, eos = model.engine, model.tokenizer.eos_id
        prefill, extend, cancel = engine.prefill, engine.extend, engine.cancel
        cancelled, said = threading.Event(), 0

        def begin(prompt: sl.Prompt) -> np.ndarray:
            nonlocal said
            cancelled.clear()
            said = 0
            return prefill(prompt)

        def slow_extend(tokens: Sequence[int]) -> np.ndarray:
            nonlocal said
            time.sleep(seconds * len(tokens))
            said += len(tokens)
            if said > 20:
                cancelled.wait(PATIENCE)
            logits = extend(tokens)
            logits[:, eos] = -1e9
            return logits

        def cancel_slow() -> None:
            cancelled.set()
            cancel()

        engine.prefill, engine.extend, engine.cancel = begin, slow_extend, cancel_slow
        return model

    return load


@dataclass
class Running:
    url: str
    app: Starlette
    server: uvicorn.Server

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def scheduler(self) -> Scheduler:
        return self.app.state.scheduler

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of one request on a connection of its own."""
        connection = self.connect()
        try:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Any:
        """The JSON answer, with its status as "status" where it is an error."""
        status, _, content = self.request("POST", path, body, headers)
        answer = json.loads(content)
        if status != 200:
            answer["status"] = status
        return answer

    def raw(self, sent: bytes) -> bytes:
        """What comes back for these bytes until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as s:
            s.sendall(sent)
            received = b""
            while part := s.recv(65536):
                received += part
            return received


@contextmanager
def running(
    settings: Settings | None = None,
    *,
    load: Callable[[], sl.Model] = sl.load,
    fetcher: Fetcher | None = None,
    loading: bool = False,
    manifest: Manifest | None = None,
    format: str | None = None,
) -> Iterator[Running]:
    """A server of this process, on a port of its own, once its model is loaded, or loading."""
    failures: list[Exception] = []
    app = create_app(
        load,
        manifest or read_manifest(BUILTIN),
        settings=settings or Settings(),
        format=format,
        failed=failures.append,
        fetcher=fetcher,
    )
    server = uvicorn.Server(configure(app))
    with socket.create_server(("127.0.0.1", 0), backlog=512) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            wait_until(
                lambda: (
                    server.started
                    and (loading or app.state.scheduler.status != "loading" or failures)
                )
            )
            assert not failures
            yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", app, server)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


SLOW = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from seechat_lite import loading
from serving import slow_load
loading.load = slow_load(SECONDS)
from seechat_lite.__main__ import main
sys.exit(main())
"""


def slow_command(seconds: float) -> list[str]:
    """Arguments of Python that start the command `seechat` with slow_load's model."""
    return ["-c", SLOW.replace("SECONDS", str(seconds))]


@contextmanager
def serving(
    *options: str, step_seconds: float = 0, log: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command itself: its process and its address. log: the file that takes its stderr.

    With step_seconds it has one slot, so that others wait while it answers.
    """
    start = slow_command(step_seconds) if step_seconds else ["-m", "seechat_lite"]
    options = (*(("--slots", "1") if step_seconds else ()), *options)
    with tempfile.TemporaryFile("w+") if log is None else log.open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *start, "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=errors,  # a pipe would fill up
            text=True,
            encoding="utf-8",
        )
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            if not url:
                process.wait()
                errors.seek(0)
                raise AssertionError(errors.read())
            wait_until(lambda: _healthy(url))
            yield process, url
        finally:
            process.kill()
            process.communicate()


def _healthy(url: str) -> bool:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    finally:
        connection.close()
