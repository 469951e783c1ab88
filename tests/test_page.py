"""The page in a real browser; skipped where Chromium or playwright is not installed."""

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seechat_lite.server.settings import Settings
from serving import IMAGES, PATIENCE, Running, running, slow_load, wait_until

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed"),
]

PANDA_FILE = str(IMAGES / "panda.png")
DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 375, "height": 667}

# hand files to the page as the browser does, when they are dropped and when they are pasted
_TRANSFER = """([content, name, type]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
    transfer.items.add(new File([bytes], name, {type}));
    %s
}"""
DROP = (
    _TRANSFER
    % """for (const kind of ['dragenter', 'dragover', 'drop'])
        document.body.dispatchEvent(new DragEvent(kind,
            {dataTransfer: transfer, bubbles: true, cancelable: true}));"""
)
PASTE = (
    _TRANSFER
    % """document.body.dispatchEvent(new ClipboardEvent('paste',
        {clipboardData: transfer, bubbles: true, cancelable: true}));"""
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE * 1000
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    with running(load=slow_load(0.01)) as server:
        yield server


class Tab:
    """A page that must neither complain nor speak to any other host."""

    def __init__(self, context: Any, server: Running) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on(
            "request",
            lambda r: self.hosts.add(re.sub(r"^(\w+:/*[^/,;]*).*", r"\1", r.url, flags=re.S)),
        )
        self.page.goto(server.url)
        wait_until(lambda: bool(self.page.locator("#model").inner_text()))
        self.url = server.url

    def ask(self, question: str) -> None:
        self.page.get_by_role("textbox").fill(question)
        self.page.keyboard.press("Enter")

    def answers(self) -> list[str]:
        return self.page.locator(".answer:not(.waiting)").all_text_contents()

    def answered(self, count: int) -> str:
        """The text of the `count`-th answer, once it is complete."""
        wait_until(lambda: len(self.answers()) == count and self.page.locator("#send").is_visible())
        return self.answers()[-1]

    def check(self) -> None:
        assert self.complaints == []
        assert {h for h in self.hosts if h.startswith("http")} == {self.url}


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Any]:
    """Opens a Tab with options of a browser context; all are checked at the end."""
    contexts: list[Any] = []
    tabs: list[Tab] = []

    def open_(server: Running, context: Any = None, **options: Any) -> Tab:
        if context is None:
            options = {"viewport": DESKTOP, "locale": "zh-CN"} | options
            context = browser.new_context(**options)
            context.set_default_timeout(PATIENCE * 1000)
            contexts.append(context)
        tabs.append(Tab(context, server))
        return tabs[-1]

    yield open_
    for tab in tabs:
        tab.check()
    for context in contexts:
        context.close()


def test_choose_ask_and_go_on(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    tab.page.set_input_files("#file", PANDA_FILE)
    tab.page.wait_for_selector("#pictures img")
    tab.ask("这是什么？")
    assert tab.answered(1) == "这是熊猫。"
    assert re.search(r"3 个词元 · [\d.]+ 词元/秒", tab.page.locator(".numbers").inner_text())
    tab.ask("它能吃吗？")
    followed = tab.answered(2)
    assert followed and tab.page.locator(".shown img").count() == 1
    wait_until(
        lambda: re.search(r"内存 \d+ MB", tab.page.locator("#status").inner_text()) is not None
    )
    assert "seechat-lite-builtin · int8" in tab.page.locator("#model").inner_text()
    tab.page.get_by_role("button", name="新对话").click()
    assert tab.answers() == [] and tab.page.locator("#welcome").is_visible()
    tab.ask("它能吃吗？")
    assert tab.answered(1) != followed


@pytest.mark.parametrize("script", [DROP, PASTE], ids=["drop", "paste"])
def test_drop_and_paste(server: Running, open_tab: Any, script: str) -> None:
    """Two pictures, one of them taken back again, and a file that is none."""
    tab = open_tab(server)
    for n, name in enumerate(("banana", "panda"), 1):
        content = base64.b64encode((IMAGES / f"{name}.png").read_bytes()).decode()
        tab.page.evaluate(script, [content, f"{name}.png", "image/png"])
        wait_until(lambda n=n: tab.page.locator("#pictures img").count() == n)
    assert tab.page.locator("#drop").is_hidden()
    tab.page.get_by_role("button", name="移除图片 1").click()
    tab.page.evaluate(script, ["AAAA", "words.txt", "text/plain"])
    wait_until(lambda: "words.txt" in tab.page.locator("#status").inner_text())
    tab.ask("这是什么？")
    assert tab.answered(1) == "这是熊猫。"


def test_a_large_photo_is_scaled_down(server: Running, open_tab: Any, tmp_path: Path) -> None:
    Image.open(PANDA_FILE).convert("RGB").resize((4000, 3000)).save(tmp_path / "photo.jpg")
    tab = open_tab(server)
    tab.page.set_input_files("#file", tmp_path / "photo.jpg")
    image = tab.page.wait_for_selector("#pictures img")
    size = image.evaluate(
        "async i => { await i.decode(); return [i.naturalWidth, i.naturalHeight]; }"
    )
    assert size == [1600, 1200]
    tab.ask("这是什么？")
    assert tab.answered(1) == "这是熊猫。"


def test_stop(slow: Running, open_tab: Any) -> None:
    """By button and by key; what was said stays, and the conversation goes on."""
    tab = open_tab(slow)
    for count, stop in enumerate(("click", "Escape"), 1):
        tab.ask("你好")
        wait_until(lambda: len(tab.page.locator(".answer").last.inner_text()) > 2)
        if stop == "click":
            tab.page.get_by_role("button", name="停止").click()
        else:
            tab.page.keyboard.press(stop)
        said = tab.answered(count)
        assert len(said) > 2 and tab.page.locator(".numbers").last.inner_text() == "已停止"
        wait_until(lambda: slow.desk.idle)
    tab.page.reload()
    assert tab.page.locator(".answer").count() == 2


def test_reload_keeps_the_conversation(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    tab.page.set_input_files("#file", PANDA_FILE)
    tab.page.wait_for_selector("#pictures img")
    tab.ask("这是什么？")
    tab.answered(1)
    tab.page.reload()
    assert tab.answers() == ["这是熊猫。"] and tab.page.locator(".shown img").count() == 1
    tab.ask("用英文怎么说？")
    assert "panda" in tab.answered(2).lower()


def test_two_tabs_at_once(slow: Running, open_tab: Any) -> None:
    """The second waits until the first has stopped; neither sees the other's conversation."""
    first = open_tab(slow)
    second = open_tab(slow, first.page.context)
    first.ask("你好")
    wait_until(lambda: slow.desk.answering)
    second.ask("你是谁？")
    wait_until(lambda: slow.desk.waiting == 1)
    assert second.page.locator("#status").inner_text() == "正在等待…"
    first.page.get_by_role("button", name="停止").click()
    wait_until(lambda: second.page.locator("#status").inner_text() == "正在回答…")
    second.page.get_by_role("button", name="停止").click()
    assert [first.page.locator(".question").inner_text()] == ["你好"]
    assert [second.page.locator(".question").inner_text()] == ["你是谁？"]


def test_closing_a_tab_frees_the_model(slow: Running, open_tab: Any) -> None:
    tab = open_tab(slow)
    tab.ask("你好")
    wait_until(lambda: slow.desk.answering)
    tab.page.close()
    wait_until(lambda: slow.desk.idle)


def test_errors_are_shown_and_the_question_comes_back(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    tab.ask("长" * 5000)
    wait_until(lambda: tab.page.locator(".wrong").count() == 1)
    assert "问题太长" in tab.page.locator(".wrong").inner_text()
    assert len(tab.page.get_by_role("textbox").input_value()) == 5000
    tab.ask("你好")
    assert tab.answered(2) and tab.page.locator(".wrong").count() == 1
    tab.complaints = [c for c in tab.complaints if "400 (Bad Request)" not in c]  # the browser's


def test_what_was_said_before_the_server_went_stays(open_tab: Any) -> None:
    with running(load=slow_load(0.01)) as server:
        tab = open_tab(server)
        tab.ask("你好")
        wait_until(lambda: len(tab.page.locator(".answer").inner_text()) > 2)
    said = tab.answered(1)
    assert len(said) > 2 and tab.page.locator(".numbers").inner_text() == "连不上服务器"
    assert tab.page.get_by_role("textbox").input_value() == ""
    tab.complaints = [c for c in tab.complaints if "net::ERR" not in c]  # the browser's


def test_a_key_is_asked_for(browser: Any) -> None:
    with running(Settings(api_keys=("sk-1",))) as server:
        context = browser.new_context(locale="en-US")
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        page.goto(server.url)
        for key, title in (("wrong", "asks for a key"), ("sk-1", "key is wrong")):
            wait_until(lambda title=title: title in page.locator("#key-title").inner_text())
            page.locator("#key").fill(key)
            page.get_by_role("button", name="OK").click()
        wait_until(lambda: bool(page.locator("#model").inner_text()))
        page.get_by_role("textbox").fill("Hello!")
        page.keyboard.press("Enter")
        wait_until(lambda: bool(page.locator(".numbers").all_inner_texts()))
        context.close()


def test_by_keyboard_alone(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    tab.page.keyboard.type("你好")  # the question has the focus
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("你是谁？")
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.id") == "send"
    tab.page.keyboard.press("Enter")
    tab.answered(1)
    assert tab.page.locator(".question").inner_text() == "你好\n你是谁？"
    focused = set()
    for _ in range(8):
        tab.page.keyboard.press("Tab")
        focused.add(tab.page.evaluate("document.activeElement.id"))
    assert {"language", "new", "log", "add", "question"} <= focused


def test_languages(server: Running, open_tab: Any) -> None:
    tab = open_tab(server, locale="en-GB")
    assert tab.page.locator("html").get_attribute("lang") == "en"
    assert tab.page.get_by_role("button", name="New chat").is_visible()
    tab.page.get_by_label("Language").select_option("zh")
    assert tab.page.locator("html").get_attribute("lang") == "zh-CN"
    tab.page.reload()
    assert tab.page.get_by_role("button", name="新对话").is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_looks(server: Running, open_tab: Any, theme: str, size: Any, tmp_path: Path) -> None:
    """No serious finding of axe, nothing wider than the window; screenshots for people's eyes."""
    tab = open_tab(server, viewport=size, color_scheme=theme)
    for step in ("empty", "talk"):
        if step == "talk":
            tab.page.set_input_files("#file", PANDA_FILE)
            tab.page.wait_for_selector("#pictures img")
            tab.ask("这是什么？")
            tab.answered(1)
            tab.ask("它能吃吗？")
            tab.answered(2)
            tab.page.set_input_files("#file", [str(IMAGES / f"{n}.png") for n in ("owl", "frog")])
            wait_until(lambda: tab.page.locator("#pictures img").count() == 2)
            tab.page.get_by_role("textbox").fill("哪一个会飞？")
        tab.page.screenshot(path=tmp_path / f"{step}.png")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        found = axe.Axe().run(tab.page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


def test_headers_of_the_page(server: Running) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
    ):
        status, headers, content = server.request("GET", path)
        assert status == 200 and headers["Content-Type"].startswith(kind)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert b"http://" not in content.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in content
