"""Clients that nobody here wrote, unchanged, each in a process or page of its own.

CONTRIBUTING.md says how they are installed; a test is skipped where its client is not.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from browsing import MARKS, chromium
from seechat_lite.server.settings import Settings
from serving import IMAGES, PATIENCE, Running, data_url, running

pytestmark = [pytest.mark.clients, pytest.mark.slow]

CLIENTS = Path(__file__).parent / "clients"
MODULES = CLIENTS / "node_modules"
PANDA_FILE = str(IMAGES / "panda.png")
ANSWER = "这是熊猫。"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Settings(aliases=("llava",))) as server:
        yield server


def told(*command: str) -> Any:
    """What a client's script printed."""
    done = subprocess.run(
        command,
        capture_output=True,
        timeout=PATIENCE,
        # LiteLLM would fetch its list of prices
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"},
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return json.loads(done.stdout.decode().splitlines()[-1])


def node(script: str, url: str, *packages: str) -> Any:
    program = shutil.which("node")
    if not program or not all((MODULES / name).is_dir() for name in packages):
        pytest.skip(f"node, {', '.join(packages)}: not installed")
    return told(program, str(CLIENTS / script), url, data_url())


def python(script: str, url: str, *modules: str) -> Any:
    for name in modules:
        if find_spec(name.partition(".")[0]) is None or find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return told(sys.executable, str(CLIENTS / script), url, PANDA_FILE)


def is_animal(value: Any) -> bool:
    return value["animal"] in ("panda", "frog") and value["legs"] in (2, 4)


def test_openai_node(server: Running) -> None:
    pytest.importorskip("llguidance")
    done = node("openai_node.mjs", server.url, "openai", "zod")
    for kind in ("chat", "chat_stream", "responses", "responses_stream"):
        assert done[kind] == ANSWER, kind
    assert is_animal(done["chat_json"]) and done["responses_json"] == done["chat_json"]
    assert done["completions"]
    assert done["models"] == ["seechat-lite-builtin", "llava"]
    assert done["error"] == [404, "model_not_found", True]


def test_vercel_ai_sdk(server: Running) -> None:
    pytest.importorskip("llguidance")
    packages = ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod")
    done = node("ai_sdk.mjs", server.url, *packages)
    for kind in ("responses", "chat", "compatible"):
        asked = done[kind]
        assert (asked["text"], asked["streamed"]) == (ANSWER, ANSWER), kind
        assert asked["reasons"] == ["stop", "stop"] and asked["tokens"] == 3
        assert is_animal(asked["object"])
    assert done["completion"]


def test_llama_index(server: Running) -> None:
    done = python("llamaindex.py", server.url, "llama_index.llms.openai_like")
    assert done["chat"] == done["stream"] == ANSWER
    assert done["completion"] == done["completion_stream"] != ""


def test_litellm(server: Running) -> None:
    done = python("lite_llm.py", server.url, "litellm")
    for kind in ("chat", "stream", "ollama", "anthropic"):
        assert done[kind] == ANSWER, kind
    assert done["responses"]


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def translate_path(self, path: str) -> str:
        if path == "/":
            return str(CLIENTS / "page.html")
        return super().translate_path(path)


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The address of a page that is no page of the server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(MODULES))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.browser
@MARKS[1]
def test_a_page_of_another_origin(elsewhere: str, allowed: bool) -> None:
    pytest.importorskip("playwright.sync_api")
    if not (MODULES / "openai").is_dir():
        pytest.skip("the OpenAI SDK for JavaScript is not installed")
    origins = (elsewhere,) if allowed else ()
    with running(Settings(cors_origins=origins)) as server, chromium() as browser:
        tab = browser.new_page()
        tab.goto(elsewhere)
        tab.wait_for_function("typeof globalThis.ask === 'function'")
        ask = "([url, picture]) => ask(url, picture).catch((e) => ({ failed: e.message }))"
        done = tab.evaluate(ask, [server.url, data_url()])
    if not allowed:
        assert done == {"failed": "Connection error."}
        return
    assert done["whole"] == done["stream"] == ANSWER and done["responses"]
    assert done["error"] == [400, "unsupported", True]
