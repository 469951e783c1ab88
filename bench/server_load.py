"""A crowd for `seechat serve`: 16 clients, 500 requests of every kind, then the memory it took.

    python bench/server_load.py                # starts a server with the built-in model
    python bench/server_load.py --model DIR --clients 16 --requests 500

Texts, pictures (of a few, and one never seen before), conversations, streams, streams that are
abandoned, answers held to a JSON schema, and bad bodies of several kinds. Every good request must
be answered, every bad one refused with its status; afterwards nothing waits, and the memory is what
it was after warming up. Before that, on the idle server, it measures how long after the engine's
first logits the first words reach a client; both processes read the system's monotonic clock.
"""

import argparse
import base64
import io
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

IMAGES = Path(__file__).parent.parent / "docs/images"
FLAT = 0.02  # of the memory after warming up: what allocators keep from one moment to the next
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["panda", "frog"]}, "legs": {"enum": [2, 4]}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
# the server, noting in a file when the engine has the first logits of an answer
NOTING = """
import sys, time
from seechat_lite import loading
load, clock = loading.load, open(sys.argv.pop(1), "w", buffering=1)
def noting(*args, **options):
    model = load(*args, **options)
    prefill = model.engine.prefill
    def timed(prompt):
        logits = prefill(prompt)
        clock.write(f"{time.monotonic_ns()}\\n")
        return logits
    model.engine.prefill = timed
    return model
loading.load = noting
from seechat_lite.__main__ import main
sys.exit(main())
"""
_WORDS = re.compile(rb'"content": "[^"]')


def picture(n: int) -> str:
    """A data: URL; of numbers below 8 always the same, of others one that nobody has seen."""
    files = sorted(IMAGES.glob("*.png"))
    data = files[n % len(files)].read_bytes()
    if n >= 8:
        changed = Image.open(io.BytesIO(data)).convert("RGB")
        changed.putpixel((0, 0), (n % 256, n // 256 % 256, 7))
        file = io.BytesIO()
        changed.save(file, "PNG")
        data = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def asking(question: str, *urls: str, **fields: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return {
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        **fields,
    }


class Crowd:
    """Sends requests and counts what came of them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []

    def run(self, *, clients: int, requests: int) -> float:
        """Seconds for all requests."""
        numbers = iter(range(requests))
        lock = threading.Lock()

        def client() -> None:
            with httpx.Client(base_url=self.url, timeout=120) as http:
                while True:
                    with lock:
                        n = next(numbers, None)
                    if n is None:
                        return
                    kind, send = self._request(n)
                    start = time.perf_counter()
                    problem = send(http)
                    with lock:
                        self.seconds.append(time.perf_counter() - start)
                        self.counts[kind] += 1
                        if problem:
                            self.wrong.append(f"{kind} {n}: {problem}")

        start = time.perf_counter()
        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def _request(self, n: int) -> tuple[str, Callable[[httpx.Client], str | None]]:
        draw = random.Random(n)
        kind = draw.choice(
            ("text", "picture", "new picture", "dialogue", "stream", "cancel", "json", "bad")
        )
        match kind:
            case "text":
                return kind, lambda http: expect(http, asking("你好", seed=n, temperature=1.0), 200)
            case "picture":
                body = asking("这是什么？", *(picture(draw.randrange(8)) for _ in range(2)))
                return kind, lambda http: expect(http, body, 200)
            case "new picture":
                body = asking("What is it?", picture(8 + n))
                return kind, lambda http: expect(http, body, 200)
            case "dialogue":
                body = asking("这是什么？", picture(n % 8))
                body["messages"] += [
                    {"role": "assistant", "content": "这是熊猫。"},
                    {"role": "user", "content": "它能吃吗？"},
                ]
                return kind, lambda http: expect(http, body, 200)
            case "stream" | "cancel":
                body = asking("这是什么？", picture(n % 8), stream=True)
                return kind, lambda http: stream(http, body, whole=kind == "stream")
            case "json":
                form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
                body = asking("这是什么？", picture(n % 8), response_format=form)
                return kind, lambda http: expect(http, body, 200)
        bad: list[tuple[Any, int]] = [
            (b"{", 400),
            ({"messages": "x"}, 422),
            (asking("x", "data:image/png;base64,AAAA"), 400),
            (asking("x", "http://127.0.0.1/a.png"), 400),
            (asking("x", model="another"), 404),
            (asking("长" * 9000), 400),
            (b" " * (33 << 20), 413),
        ]
        body, status = draw.choice(bad)
        return f"bad {status}", lambda http: expect(http, body, status)


def expect(http: httpx.Client, body: Any, status: int) -> str | None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    done = http.post("/v1/chat/completions", content=content)
    if done.status_code != status:
        return f"{done.status_code} instead of {status}: {done.text[:200]}"
    if status == 200 and not done.json()["choices"][0]["message"]["content"].strip():
        return "an empty answer"
    return None


def stream(http: httpx.Client, body: Any, *, whole: bool) -> str | None:
    with http.stream("POST", "/v1/chat/completions", json=body) as done:
        if done.status_code != 200:
            return f"{done.status_code}"
        lines = done.iter_lines()
        if not whole:
            next(lines)
            return None
        return None if [line for line in lines if line][-1] == "data: [DONE]" else "no end"


def first_words(url: str, count: int) -> list[int]:
    """When the first words of so many streamed answers came, by the monotonic clock, in ns."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    times = []
    for n in range(count):
        body = json.dumps(asking("这是什么？", picture(n % 8), stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        with socket.create_connection((host, int(port)), 60) as s:
            s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            received = b""
            while part := s.recv(65536):
                now = time.monotonic_ns()
                had = _WORDS.search(received)
                received += part
                if not had and _WORDS.search(received):
                    times.append(now)
        if len(times) != n + 1:
            raise SystemExit(f"no words came: {received[:500]!r}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--first-words", type=int, default=100, help="streams to measure")
    args = parser.parse_args()
    clock = Path(tempfile.mkdtemp()) / "clock"
    command = [sys.executable, "-c", NOTING, str(clock), "serve", "--port", "0"]
    if args.model:
        command += ["--model", str(args.model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout
        url = server.stdout.readline().strip()
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.1)
        first_words(url, 20)  # pictures are read and remembered
        begun = len(clock.read_text().splitlines())
        came = first_words(url, args.first_words)
        had = [int(line) for line in clock.read_text().splitlines()[begun:]]
        late = sorted((c - h) / 1e6 for c, h in zip(came, had, strict=True))  # ms
        process = psutil.Process(server.pid)
        Crowd(url).run(clients=args.clients, requests=args.requests)  # caches and pools fill
        before = process.memory_info().rss
        crowd = Crowd(url)
        seconds = crowd.run(clients=args.clients, requests=args.requests)
        time.sleep(1)
        after = process.memory_info().rss
        health = httpx.get(f"{url}/health").json()
        start = time.perf_counter()
        server.terminate()
        code = server.wait(20)
        stopped = time.perf_counter() - start
    crowd.seconds.sort()
    print(
        f"first words {late[len(late) // 2]:.2f} ms after the engine's first logits (median of "
        f"{len(late)}), {late[int(len(late) * 0.95)]:.2f} ms (95 %), {late[-1]:.2f} ms at most"
    )
    print(f"{args.requests} requests of {args.clients} clients in {seconds:.1f} s:", end=" ")
    print(", ".join(f"{n} {kind}" for kind, n in sorted(crowd.counts.items())))
    median, slowest = crowd.seconds[len(crowd.seconds) // 2], crowd.seconds[-1]
    print(f"a request took {median:.3f} s (median), {slowest:.3f} s at most")
    print(f"memory {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB ({after / before - 1:+.2%})")
    print(f"waiting {health['waiting']}, answering {health['answering']}")
    print(f"SIGTERM: exit {code} after {stopped:.1f} s")
    for problem in crowd.wrong:
        print(problem)
    grown = after > before * (1 + FLAT)
    sys.exit(bool(crowd.wrong) or grown or health["waiting"] or health["answering"] or code)


if __name__ == "__main__":
    main()
