"""A Chromium for the tests of the page, and tabs in it that are watched."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serving import PATIENCE, Running, wait_until

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed"),
]
DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 375, "height": 667}


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            # page.test: a name that is not this machine's own, to browsers
            args=["--no-sandbox", "--host-resolver-rules=MAP page.test 127.0.0.1"],
            timeout=PATIENCE * 1000,
        )
        yield browser
        browser.close()


class Tab:
    """A page that must neither complain nor speak to any other host."""

    def __init__(self, context: Any, server: Running) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", self._dialog)
        self.page.on(
            "request",
            lambda r: self.hosts.add(re.sub(r"^(\w+:/*[^/,;]*).*", r"\1", r.url, flags=re.S)),
        )
        self.url = server.url
        self.page.goto(server.url)
        self.ready()

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def ready(self) -> None:
        wait_until(lambda: bool(self.page.locator("#model").inner_text()))

    def reload(self) -> None:
        self.page.reload()
        self.ready()

    @property
    def question(self) -> Any:
        return self.page.locator("#question")

    def ask(self, question: str) -> None:
        self.question.fill(question)
        self.question.press("Enter")

    def choose(self, *files: Any) -> None:
        """Pictures for the next question, once they are all shown."""
        before = self.page.locator("#pictures img").count()
        self.page.set_input_files("#file", [str(f) for f in files])
        wait_until(
            lambda: (
                self.page.locator("#pictures img").count() == before + len(files)
                and not self.page.locator("#pictures .preparing").count()
            )
        )

    def answers(self) -> list[str]:
        return self.page.locator(".answer:not(.waiting)").all_text_contents()

    def answered(self, count: int) -> str:
        """The text of the `count`-th answer, once it is complete."""
        wait_until(lambda: len(self.answers()) == count and self.page.locator("#send").is_visible())
        return self.answers()[-1]

    def titles(self) -> list[str]:
        return self.page.locator("#conversations .title").all_text_contents()

    def allow(self, *words: str) -> None:
        """Forgives complaints of the browser that have one of these words in them."""
        self.complaints = [c for c in self.complaints if not any(w in c for w in words)]

    def check(self) -> None:
        assert self.complaints == []
        # a picture made in the page is no host: blob: addresses have the page's own in them
        assert {h for h in self.hosts if h.startswith("http")} == {self.url}


@contextmanager
def tabs(browser: Any) -> Iterator[Any]:
    """Opens a Tab with options of a browser context; all are checked at the end."""
    contexts: list[Any] = []
    opened: list[Tab] = []

    def open_(server: Running, context: Any = None, **options: Any) -> Tab:
        if context is None:
            options = {"viewport": DESKTOP, "locale": "zh-CN"} | options
            context = browser.new_context(**options)
            context.set_default_timeout(PATIENCE * 1000)
            contexts.append(context)
        opened.append(Tab(context, server))
        return opened[-1]

    yield open_
    for tab in opened:
        tab.check()
    for context in contexts:
        context.close()


def events_of(*pieces: str, dropped: int = 0) -> str:
    """A stream of the server that says these pieces; dropped: turns that had no room."""
    chunks = [{"choices": [{"delta": {"content": p}, "finish_reason": None}]} for p in pieces]
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    timings = {"first_token_seconds": 0.1, "seconds": 0.5, "tokens_per_second": 10.0}
    usage = {"choices": [], "usage": {"completion_tokens": len(pieces), "dropped_turns": dropped}}
    chunks += [end | {"timings": timings}, usage]
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"


def say(tab: Tab, *pieces: str, dropped: int = 0) -> list[Any]:
    """From now on every question is answered so; returns the list of requests' bodies."""
    bodies: list[Any] = []

    def answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        route.fulfill(
            status=200, content_type="text/event-stream", body=events_of(*pieces, dropped=dropped)
        )

    tab.page.route("**/v1/chat/completions", answer)
    return bodies


def refuse(tab: Tab, code: str, message: str = "m") -> None:
    """From now on every question is refused so."""

    def answer(route: Any) -> None:
        error = {"message": message, "type": "t", "param": None, "code": code}
        route.fulfill(status=503, json={"error": error})

    tab.page.unroute_all()
    tab.page.route("**/v1/chat/completions", answer)
