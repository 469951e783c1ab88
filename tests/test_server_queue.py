"""The queue of `seechat serve`: bounded, fair between clients, and freed by those who leave.

Here the model waits for the test, and the test for the server: nothing depends on time.
"""

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import seechat_lite as sl
from seechat_lite.chat import Stats
from seechat_lite.engines.base import Cancelled
from seechat_lite.server.errors import ApiError
from seechat_lite.server.fair_queue import FairQueue
from seechat_lite.server.scheduler import GenerationRequest, Scheduler, Turn
from seechat_lite.server.settings import Settings
from serving import IMAGES, PATIENCE, Running, asking, data_url, running, wait_until

# --- by itself


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert queue.put(item[0], item) is None
    served = ["a0"]  # a client that is being served comes last
    while item := queue.get(after=served[-1][0]):
        served.append(item)
    assert served == ["a0", "b1", "c1", "a1", "b2", "a2", "a3"]


def test_a_full_queue_makes_room_at_the_cost_of_the_greediest() -> None:
    queue: FairQueue[str] = FairQueue(4)
    for item in ("a1", "a2", "a3", "a4"):
        assert queue.put("a", item) is None
    assert queue.put("a", "a5") == "a5"
    assert queue.put("b", "b1") == "a4"
    assert queue.put("b", "b2") == "a3"
    assert queue.put("b", "b3") == "b3"  # as many as a has, not more
    assert queue.put("c", "c1") in ("a2", "b2")
    assert len(queue) == 4


def test_a_queue_without_room() -> None:
    queue: FairQueue[str] = FairQueue(0)
    assert queue.put("a", "a1") == "a1" and len(queue) == 0


CLIENTS = st.sampled_from("abcd")


@given(
    limit=st.integers(0, 6),
    events=st.lists(st.tuples(st.sampled_from(("put", "put", "get", "leave")), CLIENTS)),
)
def test_whatever_comes_and_goes(limit: int, events: list[tuple[str, str]]) -> None:
    """Nothing is lost or served twice; no client overtakes itself, nor another one twice."""
    queue: FairQueue[tuple[str, int]] = FairQueue(limit)
    waiting: list[tuple[str, int]] = []
    overtaken: dict[str, Counter[str]] = {}  # who was served since a client began to wait
    last = ""
    for n, (event, client) in enumerate(events):
        mine = [item for item in waiting if item[0] == client]
        if event == "put":
            if not mine:
                overtaken[client] = Counter()
            waiting.append((client, n))
            if refused := queue.put(client, (client, n)):
                waiting.remove(refused)
        elif event == "leave" and mine:
            assert queue.remove(client, mine[0]) and not queue.remove(client, mine[0])
            waiting.remove(mine[0])
        elif event == "get":
            item = queue.get(after=last)
            assert (item is None) == (not waiting)
            if item is None:
                continue
            last = item[0]
            assert item == min(i for i in waiting if i[0] == last)
            waiting.remove(item)
            overtaken[last] = Counter()
            for other in {c for c, _ in waiting} - {last}:
                overtaken[other][last] += 1
                assert overtaken[other][last] == 1
        assert len(queue) == len(waiting) <= limit


# --- in the server


class Held:
    """The built-in model; it looks at nothing and reads nothing before `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.read: list[str] = []  # the prompts, as they came
        self.seen = 0  # pictures

    def __call__(self) -> sl.Model:
        model = sl.load()
        engine = model.engine
        prefill, encode, cancel = engine.prefill, engine.encode_image, engine.cancel
        cancelled = threading.Event()

        def held_prefill(prompt: sl.Prompt) -> Any:
            self.read.append(model.tokenizer.decode(prompt.ids))
            cancelled.clear()
            while not self.go.wait(0.01):
                if cancelled.is_set():
                    raise Cancelled
            return prefill(prompt)

        def held_encode(pixels: Any) -> Any:
            self.seen += 1
            assert self.go.wait(PATIENCE)
            return encode(pixels)

        def note_cancel() -> None:
            cancelled.set()
            cancel()

        engine.prefill, engine.encode_image, engine.cancel = held_prefill, held_encode, note_cancel
        return model


class Asking:
    """Sends requests that come in one after the other."""

    def __init__(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(32)
        self._came = 0
        answer = server.scheduler.answer

        def counting(ask: GenerationRequest) -> AsyncGenerator[str | Stats, None]:
            self._came += 1
            return answer(ask)

        monkeypatch.setattr(server.scheduler, "answer", counting)

    def __call__(self, question: str, *, key: str) -> Future[Any]:
        """Returns once the request has come: it is being answered, waits, or is refused."""
        before = self._came
        body = asking(question, max_tokens=1)
        answer = self._pool.submit(self._server.post, body, Authorization=f"Bearer {key}")
        wait_until(lambda: self._came > before)
        return answer


@pytest.fixture
def held() -> Iterator[tuple[Running, Held]]:
    """A server in whose queue there is room for four."""
    load = Held()
    keys = ("", "greedy", "modest", *"01234")
    with running(Settings(queue=4, api_keys=keys), load=load) as server:
        yield server, load
        load.go.set()


def order(load: Held) -> str:
    return "".join(prompt.split("Q")[1][:1] for prompt in load.read)


def test_one_client_does_not_hold_up_the_others(
    held: tuple[Running, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, load = held
    ask = Asking(server, monkeypatch)
    answers = [ask(f"Q{n}", key="greedy") for n in range(4)] + [ask("Q7", key="modest")]
    load.go.set()
    assert all(a.result(PATIENCE)["choices"] for a in answers)
    assert order(load) == "07123"


def test_a_client_that_fills_the_queue_makes_room_for_others(
    held: tuple[Running, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, load = held
    ask = Asking(server, monkeypatch)
    greedy = [ask(f"Q{n}", key="greedy") for n in range(6)]  # one runs, four wait
    assert greedy[5].result(PATIENCE)["error"]["code"] == "queue_full"
    modest = ask("Q7", key="modest")
    assert greedy[4].result(PATIENCE)["status"] == 503
    load.go.set()
    assert modest.result(PATIENCE)["choices"] and all(a.result(60)["choices"] for a in greedy[:4])
    assert order(load) == "07123"


def test_a_full_queue_refuses(held: tuple[Running, Held], monkeypatch: pytest.MonkeyPatch) -> None:
    server, load = held
    ask = Asking(server, monkeypatch)
    answers = [ask(f"Q{n}", key=str(n)) for n in range(5)]
    status, headers, content = server.request("POST", "/v1/chat/completions", asking("Q5"))
    assert (status, json.loads(content)["error"]["code"]) == (503, "queue_full")
    assert 1 <= int(headers["Retry-After"]) <= 600  # as long as the queue will take
    load.go.set()
    assert all(a.result(PATIENCE)["choices"] for a in answers)
    assert order(load) == "01234"


# --- those who leave


def gone(server: Running) -> float:
    """How many clients the server has seen go before their answers."""
    numbers = server.request("GET", "/metrics")[2].decode()
    found = re.search(r'seechat_requests_total{method="POST",status="499"} (\S+)', numbers)
    return float(found[1]) if found else 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_its_prompt_is_read(
    held: tuple[Running, Held], stream: bool
) -> None:
    server, load = held
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(asking("Q1", stream=stream)))
    wait_until(lambda: len(load.read) == 1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, asking("Q2", max_tokens=1))
        wait_until(lambda: server.scheduler.waiting == 1)
        connection.close()
        wait_until(lambda: len(load.read) == 2)  # though nothing lets the first go on
        load.go.set()
        assert answer.result(PATIENCE)["choices"]


@pytest.mark.parametrize("past", [False, True])
def test_a_client_that_goes_while_its_pictures_are_read(
    held: tuple[Running, Held], past: bool
) -> None:
    """The picture at hand is the last, be it of the question or of an earlier one."""
    server, load = held
    pictures = [data_url((IMAGES / f"{name}.png").read_bytes()) for name in ("owl", "frog")]
    body = asking("Q1", *pictures)
    if past:
        body["messages"] += [{"role": "assistant", "content": "A"}, *asking("Q2")["messages"]]
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    wait_until(lambda: load.seen == 1)
    connection.close()
    wait_until(lambda: gone(server) == 1)
    load.go.set()
    assert server.post(asking("Q3", max_tokens=1))["choices"]
    assert load.seen == 1 and order(load) == "3"


def test_shutting_down_while_a_prompt_is_read() -> None:
    """It ends, and who waits for the first word is told to come again."""
    load = Held()

    async def shut_down() -> None:
        scheduler = Scheduler(load, format=None, queue=1, keep_alive=None, observe=lambda _: None)
        await scheduler.open()
        answer = asyncio.create_task(scheduler.whole_answer(GenerationRequest("me", Turn("Q1"))))
        while not load.read:
            await asyncio.sleep(0.01)
        await scheduler.stop(0)
        with pytest.raises(ApiError, match="shutting down"):
            await answer
        while not scheduler.idle:
            await asyncio.sleep(0.01)
        scheduler.close()

    asyncio.run(asyncio.wait_for(shut_down(), PATIENCE))
