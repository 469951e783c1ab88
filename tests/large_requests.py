"""Requests of up to 32 MB whose parts are few and long, or many and short, in every place.

`python tests/large_requests.py 500` sends so many drawn by chance to a server of its own and says
for each how it was answered, what it took, and how late /health was meanwhile. The tests send a
sample.
"""

import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from serving import PATIENCE, serving

LARGEST = (32 * 1000 - 1) * 1000  # bytes; just below what `serve` takes

# What a place is filled with, to so many bytes of JSON
FILLINGS: dict[str, Callable[[int], str]] = {
    "one text": lambda n: '"' + "x" * n + '"',
    "one text of words": lambda n: '"' + "hello world, " * (n // 13) + '"',
    "one text of Chinese": lambda n: '"' + "你好世界" * (n // 12) + '"',
    "one text with an emoji": lambda n: '"' + "x" * n + '😀"',
    "one text of blanks": lambda n: '"' + " " * n + '"',
    "one text of line breaks": lambda n: '"' + "\\n" * (n // 2) + '"',
    "one text of NULs": lambda n: '"' + "\\u0000" * (n // 6) + '"',
    "one text of escapes": lambda n: '"' + "\\ud83d\\ude00" * (n // 12) + '"',
    "one text of quotes": lambda n: '"' + '\\"' * (n // 2) + '"',
    "one text of specials": lambda n: '"' + "<sop>[gMASK]<|blank_80|>" * (n // 24) + '"',
    "base64": lambda n: '"data:image/png;base64,' + "A" * (n // 4 * 4) + '"',
    "base64 with blanks": lambda n: '"data:image/png;base64,' + "A\\n" * (n // 3) + '"',
    "percent": lambda n: '"data:image/png,' + "%41" * (n // 3) + '"',
    "colons": lambda n: '"' + "::::" * (n // 4) + '"',
    "ones": lambda n: "[" + "1," * (n // 2) + "1]",
    "texts": lambda n: "[" + '"",' * (n // 3) + '""]',
    "nulls": lambda n: "[" + "null," * (n // 5) + "null]",
    "lists": lambda n: "[" + "[]," * (n // 3) + "[]]",
    "objects": lambda n: "[" + "{}," * (n // 3) + "{}]",
    "parts": lambda n: "[" + '{"type":"text","text":""},' * (n // 26) + "{}]",
    "wrong parts": lambda n: "[" + '{"type":"x"},' * (n // 13) + "{}]",
    "long parts": lambda n: (
        "[" + ",".join(['{"type":"text","text":"' + "长" * 300 + '"}'] * (n // 950)) + "]"
    ),
    "one long kind of part": lambda n: '[{"type":"' + "x" * n + '"}]',
    "messages": lambda n: "[" + '{"role":"user","content":"a"},' * (n // 30) + "{}]",
    "deep lists": lambda n: "[" * n,
    "deep objects": lambda n: '{"a":' * (n // 5),
    "deep and closed": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "keys": lambda n: "{" + ",".join(f'"{i}":1' for i in range(n // 12)) + "}",
    "equal keys": lambda n: "{" + '"a":1,' * (n // 6) + '"a":1}',
    "a long key": lambda n: '{"' + "k" * n + '":1}',
    "a huge number": lambda n: "1" * n,
    "a long fraction": lambda n: "0." + "1" * n,
    "a huge exponent": lambda n: "1e" + "9" * n,
    "white space": lambda n: " " * n + "1",
    "cut off": lambda n: '"' + "\\n" * (n // 2),
    "nonsense": lambda n: "x" * n,
}
_USER = '{"role":"user","content":%s}'
# Where it stands: what precedes and what follows
PLACES: dict[str, tuple[str, str, str]] = {
    "content": ("/v1/chat/completions", '{"messages":[{"role":"user","content":', "}]}"),
    "role": ("/v1/chat/completions", '{"messages":[{"content":"a","role":', "}]}"),
    "picture": (
        "/v1/chat/completions",
        '{"messages":[{"role":"user","content":[{"type":"text","text":"a"},'
        '{"type":"image_url","image_url":{"url":',
        "}}]}]}",
    ),
    "past": (
        "/v1/chat/completions",
        '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":',
        '},{"role":"user","content":"a"}]}',
    ),
    "system": (
        "/v1/chat/completions",
        '{"messages":[{"role":"system","content":',
        '},{"role":"user","content":"a"}]}',
    ),
    "messages": ("/v1/chat/completions", '{"messages":', "}"),
    "pictures of a message": (
        "/v1/chat/completions",
        '{"messages":[{"role":"user","content":"a","images":[',
        "]}]}",
    ),
    "result of a tool": (
        "/v1/chat/completions",
        '{"messages":[{"role":"user","content":"a"},{"role":"tool","content":',
        "}]}",
    ),
    **{
        name: (
            "/v1/chat/completions",
            '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,"' + name + '":',
            "}",
        )
        for name in (
            "stop",
            "model",
            "tools",
            "logit_bias",
            "temperature",
            "seed",
            "max_completion_tokens",
            "stream_options",
            "response_format",
            "tool_choice",
            "function_call",
            "images",
            "image_data",
            "unknown",
        )
    },
    "body": ("/v1/chat/completions", "", ""),
    "old prompt": ("/v1/completions", '{"max_tokens":1,"prompt":', "}"),
    "input": ("/v1/responses", '{"max_output_tokens":1,"input":', "}"),
    "input's content": (
        "/v1/responses",
        '{"max_output_tokens":1,"input":[{"role":"user","content":',
        "}]}",
    ),
    "result of a call": (
        "/v1/responses",
        '{"max_output_tokens":1,"input":[{"role":"user","content":"a"},'
        '{"type":"function_call_output","output":',
        "}]}",
    ),
    "instructions": ("/v1/responses", '{"max_output_tokens":1,"input":"a","instructions":', "}"),
    "text format": ("/v1/responses", '{"max_output_tokens":1,"input":"a","text":', "}"),
    "Ollama's messages": ("/api/chat", '{"stream":false,"messages":', "}"),
    "Ollama's pictures": (
        "/api/chat",
        '{"stream":false,"messages":[{"role":"user","content":"a","images":',
        "}]}",
    ),
    "Ollama's options": ("/api/generate", '{"prompt":"a","stream":false,"options":', "}"),
    "Ollama's prompt": (
        "/api/generate",
        '{"stream":false,"options":{"num_predict":1},"prompt":',
        "}",
    ),
    "Ollama's system": (
        "/api/generate",
        '{"stream":false,"options":{"num_predict":1},"prompt":"a","system":',
        "}",
    ),
    "Ollama's model": ("/api/show", '{"model":', "}"),
    "prompt": ("/", '{"prompt":', "}"),
    "image": ("/", '{"text":"a","image":', "}"),
    "history": ("/", '{"prompt":"a","history":', "}"),
    "pair": ("/", '{"prompt":"a","history":[[', ',"a"]]}'),
    "many pairs": ("/", '{"prompt":"a","history":[' + '["a","b"],' * 1000 + "[", ',"a"]]}'),
    "many turns": (
        "/v1/chat/completions",
        '{"messages":['
        + '{"role":"user","content":"a"},{"role":"assistant","content":"b"},' * 1000
        + '{"role":"user","content":"a"},{"role":"assistant","content":',
        '},{"role":"user","content":"a"}]}',
    ),
}


def history(size: int) -> bytes:
    """A whole conversation as a program sends it again with every question."""
    turns = [("user", "讲个故事" * 1000), ("assistant", "从前有一只熊猫。" * 900)]
    messages = [{"role": r, "content": t} for r, t in turns] * (size // 40_000)
    return json.dumps(
        {"messages": [*messages, {"role": "user", "content": "完了吗？"}], "max_tokens": 1},
        ensure_ascii=False,
    ).encode()


class Watched:
    """A server's process: what it holds at most, and how late it answers /health."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.url = url.removeprefix("http://")
        self._status = Path(f"/proc/{process.pid}/status")
        self.post("/v1/chat/completions", b'{"messages":[{"role":"user","content":"a"}]}')
        self.start = self._peak()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.url, timeout=PATIENCE)
        try:
            connection.request("POST", path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    @property
    def took(self) -> int:
        """Bytes at most, so far, beyond what it held before it was asked anything large."""
        return self._peak() - self.start

    @contextmanager
    def watching_health(self) -> Iterator[list[float]]:
        """Asks for /health again and again; the list holds how long each answer took."""
        late, done = [0.0], threading.Event()

        def ask() -> None:
            while not done.wait(0.02):
                begun = time.monotonic()
                connection = http.client.HTTPConnection(self.url, timeout=PATIENCE)
                connection.request("GET", "/health")
                connection.getresponse().read()
                connection.close()
                late.append(time.monotonic() - begun)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield late
        finally:
            done.set()
            thread.join()

    def _peak(self) -> int:
        return int(self._status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


@contextmanager
def watched(*options: str) -> Iterator[Watched]:
    with serving(*options) as (process, url):
        yield Watched(process, url)


def request(place: str, filling: str, size: int) -> tuple[str, bytes]:
    """Path and body."""
    path, before, after = PLACES[place]
    room = max(size - len(before) - len(after) - 30, 0)
    return path, (before + FILLINGS[filling](room) + after).encode()


def main(count: int) -> int:
    chance = random.Random(0)
    worst = 0.0
    with watched() as server:
        for _ in range(count):
            place, filling = chance.choice(list(PLACES)), chance.choice(list(FILLINGS))
            size = int(LARGEST ** chance.uniform(0.7, 1))
            path, body = request(place, filling, size)
            with server.watching_health() as late:
                begun = time.monotonic()
                status, answer = server.post(path, body)
            worst = max(worst, max(late))
            print(
                f"{place}: {filling}, {len(body) / 1e6:.1f} MB: {status}, "
                f"{time.monotonic() - begun:.2f} s, health {max(late):.2f} s, "
                f"+{server.took / 1e6:.0f} MB {answer[:100].decode('utf-8', 'replace')}",
                flush=True,
            )
        print(f"peak +{server.took / 1e6:.0f} MB, /health at most {worst:.2f} s late")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
