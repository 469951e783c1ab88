"""A server with several slots: answers run side by side, and everything else is as with one."""

import http.client
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import seechat_lite as sl
from seechat_lite.server.settings import Settings
from serving import IMAGES, PATIENCE, Running, asking, data_url, running, wait_until

QUESTIONS = ("你好", "你是谁?", "谢谢", "你会做什么?", "再见")
PICTURES = ("panda", "owl", "frog", "banana", "cat")


def endless() -> sl.Model:
    """The built-in model, which always says the same and ends only at a limit."""
    model = sl.load()
    engine = model.engine
    prefill, extend, step_slots = engine.prefill, engine.extend, engine.step_slots
    (*_, said) = model.tokenizer.encode("好")

    def only(logits: np.ndarray) -> np.ndarray:
        logits[...] = -1e9
        logits[..., said] = 0
        return logits

    engine.prefill = lambda prompt: only(prefill(prompt))
    engine.extend = lambda tokens: only(extend(tokens))
    engine.step_slots = lambda tokens: {k: only(v) for k, v in step_slots(tokens).items()}
    return model


def begun(server: Running) -> http.client.HTTPConnection:
    """A connection on which a long answer has begun to come."""
    connection = server.connect()
    body = asking("你好", stream=True, max_tokens=1900)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200
    while "好" not in (line := response.readline().decode()):
        assert line
    return connection


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Settings(slots=3, queue=64)) as server:
        yield server


@pytest.fixture
def two() -> Iterator[Running]:
    with running(Settings(slots=2), load=endless) as server:
        yield server


def text(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


def test_answers_side_by_side_are_those_of_one_alone(server: Running) -> None:
    bodies = [asking(q) for q in QUESTIONS]
    for name in PICTURES:
        if (path := IMAGES / f"{name}.png").exists():
            bodies.append(asking("这是什么?", data_url(path.read_bytes())))
    alone = [text(server.post(body)) for body in bodies]
    drawn = random.Random(0)
    asked = [drawn.randrange(len(bodies)) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: text(server.post(bodies[i])), asked))
    assert found == [alone[i] for i in asked]
    wait_until(lambda: server.scheduler.idle)


def test_nobody_waits_for_a_long_answer(two: Running) -> None:
    long = begun(two)
    assert two.post(asking("谢谢", max_tokens=3))["choices"]
    assert two.scheduler.answering
    long.close()
    wait_until(lambda: two.scheduler.idle)


def test_no_more_answers_than_slots(two: Running) -> None:
    first, second = begun(two), begun(two)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(two.post, asking("你好", max_tokens=2))
        wait_until(lambda: two.scheduler.waiting == 1)
        first.close()
        assert third.result(PATIENCE)["choices"]
    assert two.scheduler.answering
    second.close()
    wait_until(lambda: two.scheduler.idle)


def test_clients_that_come_and_go(server: Running) -> None:
    """Whoever stays gets the whole answer, whatever others do meanwhile."""
    alone = text(server.post(asking("你会做什么?")))

    def go(n: int) -> None:
        connection = server.connect()
        body = asking(QUESTIONS[n % len(QUESTIONS)], stream=bool(n % 2))
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        if n % 3:
            connection.getresponse().read(n)
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(go, n) for n in range(24)]
        staying = [pool.submit(server.post, asking("你会做什么?")) for _ in range(8)]
        assert [text(s.result(PATIENCE)) for s in staying] == [alone] * 8
        for left in leaving:
            left.result(PATIENCE)
    wait_until(lambda: server.scheduler.idle and server.scheduler.waiting == 0)


def test_a_failure_is_its_own(two: Running) -> None:
    long = begun(two)
    answer = two.post(asking("字" * 5000))  # too long for the context
    assert answer["status"] == 400
    assert two.scheduler.answering
    assert two.post(asking("你好", max_tokens=2))["choices"]
    long.close()
    wait_until(lambda: two.scheduler.idle)


def test_shutting_down_ends_all() -> None:
    with running(Settings(slots=3, grace=0.0), load=endless) as server:
        connections = [begun(server) for _ in range(3)]
        assert server.scheduler.answering
    for connection in connections:
        connection.close()


def test_it_unloads_and_loads_again() -> None:
    loaded = threading.Semaphore(0)

    def load() -> sl.Model:
        loaded.release()
        return sl.load()

    with running(Settings(slots=2, keep_alive=0.0), load=load) as server:
        for _ in range(2):
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(server.post, [asking("你好")] * 4))
            assert len({text(f) for f in found}) == 1
            wait_until(lambda: server.scheduler.status == "unloaded")
        for _ in range(3):
            assert loaded.acquire(timeout=PATIENCE)
