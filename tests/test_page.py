"""The page in a real browser; skipped where Chromium or playwright is not installed."""

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import seechat_lite as sl
from browsing import DESKTOP, MARKS, PHONE, refuse, say
from seechat_lite.server import page
from seechat_lite.server.settings import Settings
from serving import IMAGES, PATIENCE, Running, running, slow_load, wait_until

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
pytestmark = MARKS

PAGE = Path(page.__file__).parent
PANDA_FILE = str(IMAGES / "panda.png")

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
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    with running(load=slow_load(0.01)) as server:
        yield server


def test_choose_ask_and_go_on(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    tab.page.set_input_files("#file", PANDA_FILE)
    tab.page.wait_for_selector("#pictures img")
    tab.ask("这是什么？")
    assert tab.answered(1) == "这是熊猫。"
    assert re.fullmatch(r"[\d.]+ 秒", tab.page.locator(".numbers").inner_text())
    tab.page.locator(".numbers summary").click()
    assert re.search(r"3 个词元 · [\d.]+ 词元/秒", tab.page.locator(".numbers").inner_text())
    tab.ask("它能吃吗？")
    followed = tab.answered(2)
    assert followed and tab.page.locator(".shown img").count() == 1
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
    wait_until(lambda: "words.txt" in tab.page.locator("#notice").inner_text())
    tab.ask("这是什么？")
    assert tab.answered(1) == "这是熊猫。"


def test_words_that_are_dropped_or_pasted_stay_words(server: Running, open_tab: Any) -> None:
    """Also those of a spreadsheet, which come with a picture of themselves."""
    tab = open_tab(server)
    prevented = tab.page.evaluate(
        """() => ['paste', 'drop'].map((kind) => {
            const transfer = new DataTransfer();
            transfer.setData('text/plain', 'a\\tb');
            if (kind === 'paste') transfer.items.add(new File(['x'], 'x.png', {type: 'image/png'}));
            const options = {bubbles: true, cancelable: true};
            const event = kind === 'paste'
                ? new ClipboardEvent(kind, {clipboardData: transfer, ...options})
                : new DragEvent(kind, {dataTransfer: transfer, ...options});
            document.getElementById('question').dispatchEvent(event);
            return event.defaultPrevented;
        })"""
    )
    assert prevented == [False, False]
    assert tab.page.locator("#notice").is_hidden()


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
        wait_until(lambda: slow.scheduler.idle)
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
    wait_until(lambda: slow.scheduler.answering)
    second.ask("你是谁？")
    wait_until(lambda: slow.scheduler.waiting == 1)
    assert second.page.locator("#status").inner_text() == "正在等待…"
    first.page.get_by_role("button", name="停止").click()
    wait_until(lambda: second.page.locator("#status").inner_text() == "正在回答…")
    second.page.get_by_role("button", name="停止").click()
    assert [first.page.locator(".question").inner_text()] == ["你好"]
    assert [second.page.locator(".question").inner_text()] == ["你是谁？"]


def test_closing_a_tab_frees_the_model(slow: Running, open_tab: Any) -> None:
    tab = open_tab(slow)
    tab.ask("你好")
    wait_until(lambda: slow.scheduler.answering)
    tab.page.close()
    wait_until(lambda: slow.scheduler.idle)


def test_errors_are_shown_and_the_question_comes_back(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    tab.ask("长" * 5000)
    wait_until(lambda: tab.page.locator(".wrong").count() == 1)
    assert "问题太长" in tab.page.locator(".wrong").inner_text()
    assert len(tab.page.locator("#question").input_value()) == 5000
    tab.ask("你好")
    assert tab.answered(2) and tab.page.locator(".wrong").count() == 1
    tab.allow("400 (Bad Request)")  # the browser's words


def test_what_was_said_before_the_server_went_stays(open_tab: Any) -> None:
    with running(load=slow_load(0.01)) as server:
        tab = open_tab(server)
        tab.ask("你好")
        wait_until(lambda: len(tab.page.locator(".answer").inner_text()) > 2)
    said = tab.answered(1)
    assert len(said) > 2 and tab.page.locator(".numbers").inner_text() == "连不上服务器"
    assert tab.page.locator("#announce").text_content() == "连不上服务器"
    assert tab.page.locator("#question").input_value() == ""
    tab.allow("net::ERR")  # the browser's words


def test_a_key_is_asked_for(browser: Any) -> None:
    with running(Settings(api_keys=("sk-1",))) as server:
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.goto(server.url)
        for key, title in (("wrong", "asks for a key"), ("sk-1", "key is wrong")):
            wait_until(lambda title=title: title in page.locator("#key-title").inner_text())
            page.locator("#key").fill(key)
            if key == "wrong":  # whoever closes it is asked again with the next question
                page.keyboard.press("Escape")
                wait_until(lambda: "asks for a key" in page.locator("#status").inner_text())
                page.locator("#question").fill("Hello?")
                page.keyboard.press("Enter")
                wait_until(page.locator("#key-dialog").is_visible)
                page.locator("#key").fill(key)
            page.get_by_role("button", name="OK").click()
        wait_until(lambda: bool(page.locator("#model").inner_text()))
        page.locator("#question").fill("Hello!")
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
    for _ in range(25):
        tab.page.keyboard.press("Tab")
        focused.add(tab.page.evaluate("document.activeElement.id"))
    assert {"model", "language", "settings", "new", "search", "log", "add", "question"} <= focused


def test_languages(server: Running, open_tab: Any) -> None:
    tab = open_tab(server, locale="en-GB")
    assert tab.page.locator("html").get_attribute("lang") == "en"
    assert tab.page.get_by_role("button", name="New chat").is_visible()
    tab.page.get_by_label("Language").select_option("zh")
    assert tab.page.locator("html").get_attribute("lang") == "zh-CN"
    tab.page.reload()
    assert tab.page.get_by_role("button", name="新对话").is_visible()


def test_a_camera_where_there_is_one(server: Running, open_tab: Any) -> None:
    assert open_tab(server).page.locator("#camera").is_hidden()
    phone = open_tab(server, viewport=PHONE, has_touch=True, is_mobile=True)
    assert phone.page.locator("#camera").is_visible()
    assert phone.page.locator("#camera-file").get_attribute("capture") == "environment"
    phone.page.set_input_files("#camera-file", PANDA_FILE)
    phone.page.wait_for_selector("#pictures img")
    phone.page.locator("#send").click()
    assert phone.answered(1) == "这是熊猫。"


@pytest.mark.parametrize(
    ("locale", "count", "question"),
    [("zh-CN", 1, "描述这张图片。"), ("en-US", 2, "Describe these pictures.")],
)
def test_a_picture_alone_is_described(
    server: Running, open_tab: Any, locale: str, count: int, question: str
) -> None:
    tab = open_tab(server, locale=locale)
    assert tab.page.locator("#send").is_disabled()
    tab.choose(*[PANDA_FILE] * count)
    tab.page.locator("#send").click()
    assert "熊猫" in tab.answered(1) or "panda" in tab.answered(1)
    assert tab.page.locator(".question").inner_text() == question


def test_the_limit_of_pictures_is_said(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    most = Settings().max_images
    assert str(most) in (tab.page.locator("#add").get_attribute("title") or "")
    tab.page.set_input_files("#file", [PANDA_FILE] * (most + 2))
    wait_until(lambda: "有 2 张没有添加" in tab.page.locator("#notice").inner_text())
    assert tab.page.locator("#pictures img").count() == most
    assert tab.page.locator("#chosen").inner_text() == f"{most} / {most} 张图片"
    bodies = say(tab, "好")
    tab.ask("这些是什么？")
    tab.answered(1)
    tab.choose(PANDA_FILE)  # sixteen and one are more than the server takes
    tab.ask("这个呢？")
    tab.answered(2)
    assert [len(b["messages"]) for b in bodies] == [1, 1]
    assert "没有重读较早的 1 轮" in tab.page.locator(".numbers").last.inner_text()
    tab.ask("它呢？")
    tab.answered(3)
    assert len(bodies[2]["messages"]) == 3


def test_a_picture_is_enlarged(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    tab.choose(PANDA_FILE)
    dialog = tab.page.get_by_role("dialog", name="图片 1")
    for close in ("Escape", "button"):
        tab.page.get_by_role("button", name="放大图片 1").click()
        assert dialog.is_visible()
        wait_until(lambda: tab.page.evaluate("document.getElementById('large-picture').complete"))
        if close == "button":
            dialog.get_by_role("button", name="关闭").click()
        else:
            tab.page.keyboard.press("Escape")
        wait_until(dialog.is_hidden)
    assert tab.page.locator("#pictures img").count() == 1


def test_what_pictures_become(server: Running, open_tab: Any, tmp_path: Path) -> None:
    """Small files stay as they are; large ones become JPEG; what is clear is white."""
    small = tmp_path / "small.png"
    Image.new("RGB", (40, 20), "red").save(small)
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (3000, 30), (0, 0, 0, 0)).save(clear)
    drawing = tmp_path / "drawing.svg"
    drawing.write_text("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'/>")
    tab = open_tab(server)
    tab.choose(small, clear, drawing)
    bodies = say(tab, "好")
    tab.ask("这是什么？")
    tab.answered(1)
    urls = [p["image_url"]["url"] for p in bodies[0]["messages"][0]["content"][:-1]]
    assert urls[0] == "data:image/png;base64," + base64.b64encode(small.read_bytes()).decode()
    assert all(u.startswith("data:image/jpeg;base64,") for u in urls[1:])
    opened = Image.open(io.BytesIO(base64.b64decode(urls[1].partition(",")[2])))
    assert opened.size == (1600, 16) and opened.getpixel((8, 8)) == (255, 255, 255)


def test_progress_of_an_upload(slow: Running, open_tab: Any, tmp_path: Path) -> None:
    """What is sent is counted; then the model looks; then it answers."""
    noise = Image.effect_noise((1500, 1500), 90)
    noise.save(tmp_path / "noise.jpg", quality=90)
    tab = open_tab(slow)
    tab.choose(tmp_path / "noise.jpg")
    tab.page.evaluate(
        """() => {
            window.seen = new Set();
            const note = () => seen.add(document.getElementById('status').textContent
                .replace(/\\d+/, 'N') + document.getElementById('progress').hidden);
            new MutationObserver(note).observe(document.getElementById('below'),
                {subtree: true, childList: true, characterData: true, attributes: true});
        }"""
    )
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Network.enable")
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2e6}
    session.send("Network.emulateNetworkConditions", limits)
    tab.ask("这是什么？")
    wait_until(lambda: len(tab.page.locator(".answer").inner_text()) > 2)
    tab.page.get_by_role("button", name="停止").click()
    tab.answered(1)
    seen = set(tab.page.evaluate("[...window.seen]"))
    assert {"正在上传图片… N%false", "正在看图片…false", "正在回答…true"} <= seen


def test_copy_answer_again_and_edit(server: Running, open_tab: Any) -> None:
    tab = open_tab(server, permissions=["clipboard-read", "clipboard-write"])
    tab.choose(PANDA_FILE)
    tab.ask("这是什么？")
    tab.answered(1)
    tab.page.locator(".foot").get_by_role("button", name="复制").click()
    wait_until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == "这是熊猫。")
    tab.ask("它能吃吗？")
    tab.answered(2)
    bodies = say(tab, "另一个", "回答")
    again = tab.page.get_by_role("button", name="换一种说法再答一次")
    assert again.count() == 1  # of the last turn alone
    again.click()
    wait_until(lambda: tab.answers()[-1] == "另一个回答")
    assert bodies[0]["temperature"] >= 0.5 and len(bodies[0]["messages"]) == 3
    # editing the first question asks it anew, with its picture; what followed goes, as is said
    tab.page.get_by_role("button", name="编辑").first.click()
    assert "后面的 1 轮会被删除" in tab.page.locator(".edit").inner_text()
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".edit").count() == 0 and len(tab.answers()) == 2
    tab.page.get_by_role("button", name="编辑").first.click()
    tab.page.get_by_label("编辑问题").fill("它是什么颜色的？")
    tab.page.keyboard.press("Enter")
    assert tab.answered(1) == "另一个回答"
    assert [p["type"] for p in bodies[1]["messages"][0]["content"]] == ["image_url", "text"]
    assert bodies[1]["messages"][0]["content"][1]["text"] == "它是什么颜色的？"
    assert "temperature" not in bodies[1]
    tab.reload()
    assert tab.page.locator(".question").all_inner_texts() == ["它是什么颜色的？"]


def test_turns_that_had_no_room_are_told(server: Running, open_tab: Any) -> None:
    tab = open_tab(server, locale="en")
    say(tab, "So.", dropped=2)
    tab.ask("a")
    tab.answered(1)
    wait_until(lambda: "the oldest 2 turns were not read again" in tab.page.inner_text("main"))
    tab.page.unroute_all()
    say(tab, "So.")
    tab.ask("b")
    tab.answered(2)
    assert tab.page.inner_text("main").count("not read again") == 1


def test_an_answer_stays_where_another_cannot_be_had(open_tab: Any) -> None:
    with running() as server:
        tab = open_tab(server)
        tab.ask("你好")
        said = tab.answered(1)
    tab.page.get_by_role("button", name="换一种说法再答一次").click()
    wait_until(lambda: "连不上服务器" in tab.page.locator("#notice").inner_text())
    assert tab.answered(1) == said
    tab.allow("net::ERR")


def test_settings_are_sent_and_kept(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    bodies = say(tab, "好")
    tab.ask("一")
    tab.answered(1)
    assert bodies[0].keys() == {"messages", "stream", "stream_options"}
    tab.page.get_by_role("button", name="设置").click()
    tab.page.get_by_label("温度").fill("0.8")
    tab.page.get_by_label("回答长度上限").fill("20")
    tab.page.get_by_label("系统提示").fill("用英文回答。")
    tab.page.get_by_label("对话格式").select_option("chatglm")
    tab.page.get_by_label("外观").select_option("dark")
    tab.page.keyboard.press("Escape")
    tab.reload()
    assert tab.page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    tab.ask("二")
    tab.answered(2)
    assert bodies[1]["temperature"] == 0.8 and bodies[1]["max_tokens"] == 20
    assert bodies[1]["conversation_format"] == "chatglm"
    assert bodies[1]["messages"][0] == {"role": "system", "content": "用英文回答。"}
    tab.page.get_by_role("button", name="设置").click()
    tab.page.get_by_role("button", name="恢复默认").click()
    tab.page.keyboard.press("Escape")
    tab.ask("三")
    tab.answered(3)
    assert bodies[2].keys() == {"messages", "stream", "stream_options"}
    assert bodies[2]["messages"][0]["role"] == "user"


def test_a_reader_who_scrolled_up_stays_there(slow: Running, open_tab: Any) -> None:
    tab = open_tab(slow, viewport={"width": 600, "height": 360})
    say(tab, *["一行\n\n"] * 40)
    tab.ask("你好")
    tab.answered(1)
    where = "document.getElementById('log').scrollTop"
    end = "(e => e.scrollHeight - e.clientHeight - e.scrollTop)(document.getElementById('log'))"
    assert tab.page.evaluate(end) < 2 and tab.page.locator("#newest").is_hidden()
    tab.page.unroute("**/v1/chat/completions")
    tab.ask("再说")
    wait_until(lambda: slow.scheduler.answering)
    tab.page.mouse.move(300, 150)
    tab.page.mouse.wheel(0, -400)
    wait_until(tab.page.locator("#newest").is_visible)
    before = tab.page.evaluate(where)
    wait_until(lambda: len(tab.page.locator(".answer").last.inner_text()) > 8)
    assert tab.page.evaluate(where) == before
    tab.page.get_by_role("button", name="跳到最新").click()
    assert tab.page.evaluate(end) < 2 and tab.page.locator("#newest").is_hidden()
    tab.page.get_by_role("button", name="停止").click()
    tab.answered(2)
    assert tab.page.evaluate(end) < 2


def test_a_model_without_vision(server: Running, open_tab: Any) -> None:
    context = open_tab(server).page.context
    models = json.loads(server.request("GET", "/v1/models")[2])
    models["data"][0] |= {"vision": None, "id": "words"}
    context.route("**/v1/models", lambda route: route.fulfill(json=models))
    tab = open_tab(server, context)
    assert tab.page.locator("#add").is_hidden() and tab.page.locator("#sample-box").is_hidden()
    assert "只能读文字" in tab.page.locator("#welcome").inner_text()
    content = base64.b64encode(Path(PANDA_FILE).read_bytes()).decode()
    tab.page.evaluate(DROP, [content, "panda.png", "image/png"])
    wait_until(lambda: "图片没有添加" in tab.page.locator("#notice").inner_text())


def test_the_samples(server: Running, open_tab: Any) -> None:
    """Each is asked with one click; the built-in model is right about all of them."""
    tab = open_tab(server)
    cards = tab.page.locator("#samples button")
    assert cards.count() == 6
    tab.question.fill("写到一半")
    cards.nth(1).click()
    assert tab.answered(1).startswith("能吃")
    assert tab.question.input_value() == "写到一半"
    assert tab.page.locator(".shown img").count() == 1
    rights = {
        "panda.png": ("熊猫", "panda"),
        "hamburger.png": ("能吃。", "Yes"),
        "frog.png": ("绿色", "green"),
        "panda-bicycle.png": ("熊猫和自行车", "panda and a bicycle"),
        "banana-rocket.png": ("右边是火箭", "rocket"),
        "four-things.png": ("四个", "four"),
    }
    rows = re.findall(
        r'file: "(.+?)", zh: "(.+?)", en: "(.+?)"', (PAGE / "welcome.js").read_text("utf-8")
    )
    assert {file for file, *_ in rows} == rights.keys()
    with sl.load() as model:
        for file, *questions in rows:
            for question, right in zip(questions, rights[file], strict=True):
                answer = model.chat().ask(question, image=PAGE / "samples" / file)
                assert right in answer and not answer.startswith("不"), (file, question)


def test_facts_of_the_model_in_words(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    assert tab.page.locator("#model").inner_text() == "内置演示模型"
    tab.page.locator("#model").click()
    dialog = tab.page.get_by_role("dialog", name="关于这个模型")
    for words in ("seechat-lite-builtin", "8 位整数", "2,048 个词元", "MB", "就绪", "几百种"):
        assert words in dialog.inner_text(), words
    dialog.get_by_role("button", name="关闭").click()
    assert dialog.is_hidden()


def test_both_languages_say_the_same_things(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    shapes = tab.page.evaluate(
        """async () => {
            const {TEXTS} = await import('/texts.js');
            const shape = (value) => typeof value === 'object'
                ? Object.fromEntries(Object.keys(value).sort().map((k) => [k, shape(value[k])]))
                : typeof value === 'function' ? value.length : 'text';
            return [shape(TEXTS.zh), shape(TEXTS.en)];
        }"""
    )
    assert shapes[0] == shapes[1]
    scripts = "".join(p.read_text("utf-8") for p in PAGE.glob("*.js"))
    used = set(re.findall(r'(?<![\w.])text\(\s*"(\w+)"', scripts))
    used |= set(re.findall(r'data-(?:text|label|hint)="(\w+)"', (PAGE / "index.html").read_text()))
    assert used <= shapes[0].keys()


def test_errors_in_the_language_of_the_page(server: Running, open_tab: Any) -> None:
    """What the server refuses is said in words of the language; its own are there on demand."""
    tab = open_tab(server)
    refused = {
        "queue_full": "排队的人太多",
        "invalid_image": "读不了这张图片",
        "odd": "拒绝了这个问题",
    }
    for count, (code, words) in enumerate(refused.items(), 1):
        refuse(tab, code, f"details of {code}")
        tab.ask("你好")
        wait_until(lambda count=count: tab.page.locator(".wrong").count() == count)
        wrong = tab.page.locator(".wrong").last
        assert words in wrong.inner_text() and "details" not in wrong.inner_text()
        wrong.locator("summary").click()
        assert f"details of {code}" in wrong.inner_text()
    assert tab.question.input_value() == "你好"
    # what was written meanwhile is not lost for it: the question stays in its place, to send again
    held: list[Any] = []
    tab.page.route("**/v1/chat/completions", lambda route: held.append(route))
    tab.ask("第一")
    wait_until(lambda: tab.page.locator("#stop").is_visible() and held)
    tab.question.fill("第二")
    held[0].fulfill(status=503, json={"error": {"message": "m", "code": "queue_full"}})
    wait_until(tab.page.get_by_role("button", name="重新发送").is_visible)
    assert tab.question.input_value() == "第二"
    say(tab, "好")
    tab.page.get_by_role("button", name="重新发送").click()
    wait_until(lambda: tab.answers()[-1] == "好")
    tab.allow("Failed to load resource")


def test_what_a_screen_reader_hears(slow: Running, open_tab: Any) -> None:
    """That an answer is awaited, and the whole answer once, not every piece of it."""
    tab = open_tab(slow)
    tab.page.evaluate(
        """() => {
            window.heard = [];
            const element = document.getElementById('announce');
            new MutationObserver(() => heard.push(element.textContent)).observe(
                element, {childList: true, characterData: true, subtree: true});
        }"""
    )
    say(tab, *"一二三四五六")
    tab.ask("你好")
    tab.answered(1)
    assert tab.page.evaluate("heard") == ["正在等待…", "一二三四五六"]
    live = tab.page.evaluate(
        """[...document.querySelectorAll('[role=status], [role=alert], [aria-live], [role=log]')]
            .filter(e => e.getAttribute('aria-live') !== 'off').map(e => e.id)"""
    )
    assert sorted(live) == ["announce", "notice-words"]
    assert tab.page.locator("#announce").inner_text() == "一二三四五六"
    assert tab.page.get_by_role("heading", name="模型").count() == 1


def test_the_answer_is_read_out_as_words(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    say(tab, "## 标题\n\n```\nx = 1\n```\n\n| a |\n|---|\n| **b** |")
    tab.ask("你好")
    tab.answered(1)
    assert re.sub(r"\s+", " ", tab.page.locator("#announce").inner_text()) == "标题 x = 1 a b"


def test_what_is_marked_in_a_growing_answer_stays_marked(slow: Running, open_tab: Any) -> None:
    tab = open_tab(slow)
    marked = tab.page.evaluate(
        """async () => {
            const {TurnView} = await import('/view.js');
            const turn = {question: '', pictures: [], state: 'running', answer: 'eins\\n\\nzwei'};
            const view = new TurnView(turn, {});
            document.getElementById('log').append(view.element);
            getSelection().selectAllChildren(view.element.querySelector('.answer p'));
            for (const more of [' drei', '\\n\\n- vier', ' fünf']) {
                turn.answer += more;
                view.draw();
            }
            return [getSelection().toString(), view.element.querySelector('.answer').textContent];
        }"""
    )
    assert marked[0] == "eins" and marked[1].split() == ["eins", "zwei", "drei", "vier", "fünf"]


def test_while_the_model_loads(open_tab: Any) -> None:
    """That is said; a question asked meanwhile is answered."""
    ready = threading.Event()

    def load(*args: Any, **options: Any) -> sl.Model:
        ready.wait(PATIENCE)
        return sl.load(*args, **options)

    with running(load=load, loading=True) as server:
        tab = open_tab(server)
        wait_until(lambda: tab.page.locator("#status").inner_text() == "模型正在加载…")
        tab.ask("你好")
        ready.set()
        assert tab.answered(1)
        wait_until(lambda: tab.page.locator("#status").inner_text() == "")
    tab.allow("503", "net::ERR")


def test_over_plain_http_from_another_machine(browser: Any) -> None:
    """There a browser gives pages neither random UUIDs, nor the clipboard, nor locks."""
    with running(Settings(hosts=("page.test",))) as server:
        page = browser.new_page(locale="zh-CN")
        errors: list[str] = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(f"http://page.test:{server.port}")
        assert not page.evaluate("isSecureContext")
        page.set_input_files("#file", PANDA_FILE)
        page.wait_for_selector("#pictures img")
        page.locator("#send").click()
        wait_until(lambda: page.locator(".foot .act").count() > 1)
        page.locator(".foot").get_by_role("button", name="复制").click()
        wait_until(lambda: page.locator("#announce").text_content() == "已复制")
        page.reload()
        wait_until(lambda: page.locator(".shown img").count() == 1)
        assert page.locator("#notice").is_hidden() and errors == []
        page.close()


ANSWER = """## 一个标题

| 名称 | 颜色 |
|---|---|
| 熊猫 | 黑白 |

1. 第一
2. 第二

```python
print("你好" * 100)
```
> 引用 **粗** `code` [一个网页](https://example.org/a)
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_looks(server: Running, open_tab: Any, theme: str, size: Any, tmp_path: Path) -> None:
    """No serious finding of axe, nothing wider than the window; screenshots for people's eyes."""
    locale = "zh-CN" if theme == "light" else "en-US"
    tab = open_tab(server, viewport=size, color_scheme=theme, locale=locale)
    zh = locale == "zh-CN"

    def look(name: str) -> None:
        tab.page.screenshot(path=tmp_path / f"{name}-{size['width']}-{theme}.png")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= size["width"], name
        found = axe.Axe().run(tab.page).response["violations"]
        serious = [v for v in found if v["impact"] in ("serious", "critical")]
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in serious] == [], name

    look("welcome")
    tab.choose(PANDA_FILE)
    tab.ask("这是什么？" if zh else "What is this?")
    tab.answered(1)
    say(tab, ANSWER)
    tab.ask("给我一个表格和一段很长很长的代码" if zh else "A table and some code, please")
    tab.answered(2)
    tab.choose(IMAGES / "owl.png", IMAGES / "frog.png")
    tab.question.fill("哪一个会飞？" if zh else "Which one can fly?")
    look("talk")
    tab.page.locator(".act").nth(1).click()
    tab.page.locator("#log").evaluate("e => e.scrollTop = 0")
    look("edit")
    tab.page.keyboard.press("Escape")
    tab.page.locator("#settings").click()
    look("settings")
    tab.page.keyboard.press("Escape")
    tab.page.locator("#model").click()
    look("about")
    tab.page.keyboard.press("Escape")
    tab.page.locator("#pictures .thumbnail").first.click()
    look("picture")
    tab.page.keyboard.press("Escape")
    if size is PHONE:
        tab.page.locator("#open-list").click()
        assert tab.page.locator("#form").evaluate("e => e.inert")
    tab.page.locator("#conversations .more").click()
    tab.page.wait_for_selector("#conversations .actions")
    look("list")
    tab.page.locator("[data-role=delete]").click()
    look("delete")
    tab.page.keyboard.press("Escape")
    tab.page.locator("[data-role=rename]").click()
    look("rename")
    tab.page.keyboard.press("Escape")
    tab.page.locator("#search").fill("zebra")
    wait_until(lambda: tab.titles() == [])
    look("search")
    tab.page.locator("#search").fill("")
    if size is PHONE:
        tab.page.locator("#search").press("Escape")
        assert tab.page.evaluate("document.activeElement.id") == "open-list"
    refuse(tab, "x")
    tab.page.set_input_files(
        "#file", {"name": "words.txt", "mimeType": "text/plain", "buffer": b"-"}
    )
    wait_until(tab.page.locator("#notice").is_visible)
    look("notice")
    tab.page.locator("#send").click()
    tab.page.wait_for_selector(".wrong")
    look("wrong")
    tab.page.unroute_all()
    held: list[Any] = []
    tab.page.route("**/v1/chat/completions", lambda route: held.append(route))
    tab.page.locator("#send").click()
    wait_until(lambda: tab.page.locator("#stop").is_visible() and held)
    look("running")
    refused = {"error": {"message": "m", "code": "invalid_api_key"}}
    tab.page.route("**/v1/models", lambda route: route.fulfill(status=401, json=refused))
    tab.page.locator("#stop").click()  # and after every answer the page looks how the server is
    wait_until(tab.page.locator("#key-dialog").is_visible)
    look("key")
    tab.allow("503", "401")


def test_every_file_of_the_page_is_served(server: Running) -> None:
    """With its kind and a strict policy; what is ours names no other host."""
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    kinds |= {".mjs": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png"}
    files = [p for p in PAGE.rglob("*") if p.suffix in kinds]
    assert {
        f"/{p.relative_to(PAGE).as_posix()}".replace("/index.html", "/") for p in files
    } == page.PATHS
    for file in files:
        path = f"/{file.relative_to(PAGE).as_posix()}".replace("/index.html", "/")
        status, headers, content = server.request("GET", path)
        assert status == 200 and content == file.read_bytes()
        assert headers["Content-Type"].startswith(kinds[file.suffix])
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        if file.parent == PAGE and file.suffix != ".svg":
            assert b"http://" not in content.replace(b"http://www.w3.org/2000/svg", b"")
            assert b"https://" not in content


def test_the_libraries_are_those_of_their_authors() -> None:
    text = (PAGE / "vendor/README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(.+?)` .*`(.+?\.LICENSE)` \| `(\w{64})` \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == {p.name for p in (PAGE / "vendor").glob("*.*js")}
    for name, licence, digest in rows:
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest
        assert (PAGE / "vendor" / licence).is_file()
