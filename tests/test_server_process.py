"""The command `seechat serve` as a process: starting, logging, signals, tools that talk to it."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from reference import data
from serving import IMAGES, PATIENCE, asking, data_url, serving, wait_until

pytestmark = pytest.mark.slow  # each starts a process
posix = pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
SEECHAT = [sys.executable, "-m", "seechat_lite", "serve"]


def serve(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """For what ends by itself."""
    return subprocess.run(
        [*SEECHAT, *options],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
    )


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE, **options)


def ask(url: str, **fields: Any) -> httpx.Response:
    body = asking("你好", **fields)
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)


def begin_stream(url: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    connection.request("POST", "/v1/chat/completions", json.dumps(asking("你好", stream=True)))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return connection, response


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "-1"], "--port"),
        (["--port", "70000"], "--port"),
        (["--queue", "-1"], "--queue"),
        (["--format", "x"], "--format"),
        (["--media-path", "/no/such/folder"], "--media-path"),
        (["--api-key", "a\nb"], "API key"),
        (["--api-key", ""], "API key"),
        (["--context", "3"], "--context"),
        (["--engine", "steam"], "--engine"),
        (["--max-memory", "much"], "--max-memory"),
    ],
)
def test_wrong_usage(options: list[str], message: str) -> None:
    done = serve(*options)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_what_cannot_be_served(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve("--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "cannot listen" in done.stderr
    done = serve("--port", "0", "--model", str(tmp_path))
    assert done.returncode == 1 and "seechat.json" in done.stderr and not done.stdout
    done = serve("--port", "0", "--max-memory", "1MB")
    assert done.returncode == 1 and "1 MB" in done.stderr.splitlines()[-1]
    done = serve("--port", "0", "--device", "abacus")  # known when the model is loaded
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("seechat: device 'aba")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.modules['starlette'] = None\nfrom seechat_lite.cli.main import main\n"
    script += "sys.exit(main(['serve', '--port', '0']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert 'pip install "seechat-lite[server]"' in done.stderr


@pytest.mark.torch
def test_published_weights_are_served() -> None:
    tiny = str(data("chatglm_tiny"))
    with serving("--engine", "torch", "--device", "cpu", "--model", tiny) as (_, url):
        (model,) = get(f"{url}/v1/models").json()["data"]
        assert (model["id"], model["vision"]) == ("chatglm_tiny", None)
        assert ask(url, max_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEECHAT_API_KEY", "sk-1")
    with serving() as (_, url):
        assert get(f"{url}/v1/models").status_code == 401
        key = {"Authorization": "Bearer sk-1"}
        assert get(f"{url}/v1/models", headers=key).status_code == 200


@posix
def test_logs_in_json(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving("--log-json", "--max-body", "0.1", log=log) as (process, url):
        assert ask(url).status_code == 200
        assert httpx.post(f"{url}/", content=b"{", timeout=PATIENCE).status_code == 400
        too_large = b"x" * 200_000
        assert httpx.post(f"{url}/", content=too_large, timeout=PATIENCE).status_code == 413
        process.send_signal(signal.SIGTERM)
        process.wait()
    err = log.read_text("utf-8")
    lines = [json.loads(line) for line in err.splitlines()[1:]]
    answered = next(line for line in lines if line.get("path") == "/v1/chat/completions")
    assert answered["status"] == 200 and answered["new_tokens"] > 0
    assert answered["finish_reason"] == "stop" and answered["level"] == "info"
    assert any(line.get("status") == 413 for line in lines)
    assert any(line.get("error") == "invalid_json" for line in lines)
    assert "你好" not in err and "\\u4f60" not in err  # what is asked is nobody's business


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_idle(number: int, code: int) -> None:
    with serving() as (process, url), httpx.Client() as kept_alive:
        kept_alive.get(f"{url}/health", timeout=PATIENCE)
        process.send_signal(number)
        assert process.wait() == code


@posix
def test_sigterm_amid_answers(tmp_path: Path) -> None:
    """A running stream ends as streams end, waiting ones are refused."""
    with (
        serving(step_seconds=0.01, log=tmp_path / "log") as (process, url),
        ThreadPoolExecutor(3) as pool,
    ):
        connection, response = begin_stream(url)
        waiting = [pool.submit(ask, url) for _ in range(3)]
        wait_until(lambda: get(f"{url}/health").json()["waiting"] == 3)
        process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        connection.close()
        refused = [answer.result().status_code for answer in waiting]
        assert process.wait() == 0
    assert "Traceback" not in (tmp_path / "log").read_text("utf-8")
    *_, last, done, nothing = rest.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert refused == [503] * 3


@posix
def test_sigterm_lets_a_short_answer_finish() -> None:
    with serving(step_seconds=0.02) as (process, url), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, url, max_tokens=10)
        wait_until(lambda: get(f"{url}/health").json()["answering"] or answer.done())
        process.send_signal(signal.SIGTERM)
        assert answer.result().json()["usage"]["completion_tokens"] == 10
        assert process.wait() == 0


@posix
def test_sigterm_while_nothing_can_be_interrupted() -> None:
    """The model's thread does not come back for minutes: the server goes all the same."""
    with serving(step_seconds=10_000) as (process, url), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, url)
        wait_until(lambda: get(f"{url}/health").json()["answering"])
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert answer.result().status_code == 503


@posix
def test_memory_and_queue_after_a_crowd() -> None:
    """Answers, pictures, cancels and bad bodies leave nothing behind."""
    with serving() as (process, url):

        def crowd() -> None:
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                for n in range(12):
                    if n % 4 == 3:
                        connection, _ = begin_stream(url)
                        connection.close()
                        continue
                    body = b"{" if n % 4 == 2 else None
                    done = client.post(
                        "/v1/chat/completions",
                        content=body or json.dumps(asking("这是什么？", data_url())),
                    )
                    assert done.status_code == (400 if body else 200)

        def round() -> int:
            threads = [threading.Thread(target=crowd) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_until(lambda: not get(f"{url}/health").json()["answering"])
            assert get(f"{url}/health").json()["waiting"] == 0
            return psutil.Process(process.pid).memory_info().rss

        sizes = [round(), round()]
        while sizes[-1] > sizes[-2] + 1_000_000:  # what leaks, leaks in every round
            assert len(sizes) < 8, sizes
            sizes.append(round())


def test_llm_talks_to_it(tmp_path: Path) -> None:
    """The `llm` command with nothing but its own configuration file."""
    with serving() as (_, url):
        (tmp_path / "extra-openai-models.yaml").write_text(
            f"- model_id: house\n  model_name: seechat-lite-builtin\n"
            f"  api_base: {url}/v1\n  vision: true\n",
            "utf-8",
        )
        for stream in ([], ["--no-stream"]):
            done = subprocess.run(
                [sys.executable, "-m", "llm", "-m", "house", "-a", str(IMAGES / "panda.png"),
                 "--key", "none", *stream, "这是什么？"],
                capture_output=True, text=True, encoding="utf-8",
                env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
            )  # fmt: skip
            assert done.stdout == "这是熊猫。\n", done.stderr


def test_an_old_demo_client(tmp_path: Path) -> None:
    """What people wrote against VisualGLM-6B's api.py."""
    picture = base64.b64encode((IMAGES / "panda.png").read_bytes()).decode()
    with serving() as (_, url):
        body = {"image": picture, "text": "描述这张图片。", "history": []}
        done = httpx.post(url, json=body, timeout=PATIENCE)
        assert done.json()["result"] and done.json()["status"] == 200
