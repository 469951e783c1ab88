"""What the page keeps in the browser: conversations, pictures, drafts, running questions."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browsing import MARKS, PHONE, Tab, say
from serving import IMAGES, Running, running, slow_load, wait_until

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = MARKS


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    with running(load=slow_load(0.01)) as server:
        yield server


def talk(tab: Tab, *questions: str, answer: str = "好") -> None:
    """Each question in a conversation of its own."""
    say(tab, answer)
    for question in questions:
        tab.page.locator("#new").click()
        tab.ask(question)
        tab.answered(1)


def act(tab: Tab, title: str, action: str) -> None:
    """Chooses an action of a conversation in the list."""
    item = tab.page.locator("#conversations li").filter(has_text=title)
    if not item.locator(".actions").count():
        item.locator(".more").click()
    item.get_by_role("button", name=action).click()


def exported(tab: Tab, title: str, action: str) -> str:
    with tab.page.expect_download() as download:
        act(tab, title, action)
    path = download.value.path()
    return f"{download.value.suggested_filename}\n{Path(path).read_text('utf-8')}"


def test_the_list(slow: Running, open_tab: Any) -> None:
    """Opened, searched, renamed, deleted; the newest first; the same after a reload."""
    tab = open_tab(slow)
    talk(tab, "红苹果", "绿苹果", "香蕉", answer="一种水果")
    wait_until(lambda: tab.titles() == ["香蕉", "绿苹果", "红苹果"])
    tab.page.get_by_role("button", name="红苹果", exact=True).click()
    wait_until(lambda: tab.page.locator(".question").all_inner_texts() == ["红苹果"])
    assert tab.page.title() == "红苹果 · SEEChat"
    current = tab.page.locator("#conversations [aria-current=page]")
    wait_until(lambda: current.all_text_contents() == ["红苹果"])
    tab.ask("还有呢？")
    tab.answered(2)
    wait_until(lambda: tab.titles() == ["红苹果", "香蕉", "绿苹果"])
    for words, found in (
        ("苹果", ["红苹果", "绿苹果"]),
        ("苹果 还有", ["红苹果"]),
        ("一种", ["红苹果", "香蕉", "绿苹果"]),
        ("梨", []),
    ):
        tab.page.locator("#search").fill(words)
        wait_until(lambda found=found: tab.titles() == found)
    assert tab.page.locator("#none").inner_text() == "没有找到"
    tab.page.locator("#search").fill("")
    wait_until(lambda: len(tab.titles()) == 3)
    act(tab, "香蕉", "重命名")
    tab.page.get_by_label("标题").fill("黄色的")
    tab.page.keyboard.press("Enter")
    wait_until(lambda: tab.titles()[1] == "黄色的")
    act(tab, "绿苹果", "删除")
    tab.page.keyboard.press("Escape")
    assert len(tab.titles()) == 3
    act(tab, "绿苹果", "删除")
    tab.page.locator("#ask-dialog").get_by_role("button", name="删除").click()
    wait_until(lambda: tab.titles() == ["红苹果", "黄色的"])
    tab.reload()
    wait_until(lambda: tab.titles() == ["红苹果", "黄色的"])
    assert tab.answers() == ["一种水果"] * 2
    act(tab, "红苹果", "删除")  # the open one
    tab.page.locator("#ask-dialog").get_by_role("button", name="删除").click()
    wait_until(tab.page.locator("#welcome").is_visible)
    assert tab.page.title() == "SEEChat"
    tab.page.get_by_role("button", name="设置").click()
    tab.page.get_by_role("button", name="删除全部对话").click()
    tab.page.locator("#ask-ok").click()
    wait_until(lambda: tab.titles() == [])
    assert tab.page.evaluate(COUNTS) == [0, 0, 0]


COUNTS = """() => new Promise((resolve) => {
    indexedDB.open('seechat').onsuccess = ({target: {result: db}}) => {
        const names = ['conversations', 'turns', 'pictures'];
        const transaction = db.transaction(names);
        const counts = names.map((name) => transaction.objectStore(name).count());
        transaction.oncomplete = () => { db.close(); resolve(counts.map((c) => c.result)); };
    };
})"""


def test_many_large_photos_are_kept(slow: Running, open_tab: Any, tmp_path: Path) -> None:
    """Today's phones: 12 megapixels each, of which some made the page forget all."""
    files = []
    for n in range(6):
        files.append(tmp_path / f"{n}.jpg")
        noise = Image.effect_noise((1000, 750), 100).resize((4000, 3000))
        Image.merge("RGB", [noise, noise.rotate(180), noise]).save(files[-1], quality=95)
    tab = open_tab(slow)
    say(tab, "好")
    for start in (0, 3):
        tab.choose(*files[start : start + 3])
        tab.ask("这是什么？")
        tab.answered(start // 3 + 1)
    tab.choose(files[0])
    tab.reload()
    assert tab.page.locator(".shown img").count() == 6 and len(tab.answers()) == 2
    wait_until(lambda: tab.page.locator("#pictures img").count() == 1)  # of the draft
    end = "(e => e.scrollHeight - e.clientHeight - e.scrollTop)(document.getElementById('log'))"
    loaded = "[...document.querySelectorAll('.thumbnail img')].every(i => i.naturalWidth === 1600)"
    wait_until(lambda: tab.page.evaluate(loaded))
    wait_until(lambda: tab.page.evaluate(end) < 2)  # with all pictures in their places
    assert tab.page.locator("#notice").is_hidden()
    # what is deleted leaves nothing behind
    act(tab, "这是什么？", "删除")
    tab.page.locator("#ask-ok").click()
    wait_until(lambda: tab.page.evaluate(COUNTS) == [0, 0, 0])


def test_a_draft_is_kept(slow: Running, open_tab: Any) -> None:
    """Of every conversation its own, also in the moment before the page goes away."""
    tab = open_tab(slow)
    talk(tab, "旧的")
    tab.question.fill("还没有写完")
    tab.choose(IMAGES / "panda.png")
    tab.page.locator("#new").click()
    assert tab.question.input_value() == "" and tab.page.locator("#pictures img").count() == 0
    tab.question.fill("新的草稿")
    tab.page.reload()
    tab.ready()
    assert tab.question.input_value() == "新的草稿"
    wait_until(lambda: tab.titles()[0] == "草稿: 新的草稿")
    tab.page.get_by_role("button", name="旧的", exact=True).click()
    wait_until(lambda: tab.question.input_value() == "还没有写完")
    assert tab.page.locator("#pictures img").count() == 1
    tab.page.locator("#conversations .title").first.click()
    wait_until(lambda: tab.question.input_value() == "新的草稿")
    tab.question.fill("")  # of a draft taken back nothing is left
    wait_until(lambda: tab.titles() == ["旧的"])


def test_a_running_question_survives_a_reload(slow: Running, open_tab: Any) -> None:
    tab = open_tab(slow)
    tab.choose(IMAGES / "panda.png")
    tab.ask("你好")
    wait_until(lambda: len(tab.page.locator(".answer").inner_text()) > 5)
    tab.page.reload()
    tab.ready()
    said = tab.answered(1)
    assert len(said) > 2 and "回答被中断" in tab.page.locator(".numbers").inner_text()
    wait_until(lambda: slow.scheduler.idle)
    say(tab, "完整的回答")
    tab.page.get_by_role("button", name="重新发送").click()
    wait_until(lambda: tab.answers() == ["完整的回答"])
    tab.page.unroute("**/v1/chat/completions")
    # one of which nothing was said yet
    held: list[Any] = []
    tab.page.route("**/v1/chat/completions", lambda route: held.append(route))
    tab.ask("第二")
    wait_until(lambda: tab.page.locator("#stop").is_visible() and held)
    tab.page.reload()
    tab.ready()
    assert tab.page.locator(".question").all_inner_texts() == ["你好", "第二"]
    wait_until(tab.page.get_by_role("button", name="重新发送").is_visible)
    bodies = say(tab, "好")
    tab.page.get_by_role("button", name="重新发送").click()
    tab.answered(2)
    assert [m["role"] for m in bodies[0]["messages"]] == ["user", "assistant", "user"]


def test_what_another_tab_has_ended_is_not_undone(slow: Running, open_tab: Any) -> None:
    """An answer that ends while this tab asks who gives it stays as it ended."""
    tab = open_tab(slow)
    save = """async ([answer, state]) => {
        const store = await import('/store.js');
        const turn = {id: 't', conversation: 'c', at: 1, question: 'q', pictures: [], note: null};
        await store.saveTurn({...turn, answer, state});
    }"""
    tab.page.evaluate(save, ["half", "running"])
    tab.page.evaluate(
        """async () => {
            const store = await import('/store.js');
            await store.saveConversation({id: 'c', title: 'c', named: true, created: 1, changed: 1,
                draft: {text: '', pictures: []}});
        }"""
    )
    tab.page.get_by_role("button", name="c", exact=True).click()
    wait_until(lambda: tab.page.locator(".answer.waiting").count() == 1)
    tab.page.evaluate(save, ["half and whole", "done"])
    wait_until(lambda: tab.answers() == ["half and whole"])
    tab.reload()
    assert tab.answered(1) == "half and whole"


def test_another_conversation_may_be_read_meanwhile(slow: Running, open_tab: Any) -> None:
    tab = open_tab(slow)
    talk(tab, "旧的")
    tab.page.unroute("**/v1/chat/completions")
    tab.page.locator("#new").click()
    tab.ask("你好")
    wait_until(lambda: slow.scheduler.answering)
    tab.page.get_by_role("button", name="旧的", exact=True).click()
    wait_until(tab.page.locator("#send").is_visible)
    assert tab.answers() == ["好"] and slow.scheduler.answering
    tab.page.get_by_role("button", name="你好", exact=True).click()
    wait_until(tab.page.locator("#stop").is_visible)
    assert slow.scheduler.answering
    wait_until(lambda: len(tab.page.locator(".answer").inner_text()) > 5)
    tab.page.locator("#stop").click()
    tab.answered(1)


def test_two_tabs_with_one_conversation(slow: Running, open_tab: Any) -> None:
    """Each sees what the other adds; neither ends the other's answer, or undoes a deletion."""
    first = open_tab(slow)
    first.ask("你好")
    wait_until(lambda: slow.scheduler.answering)
    second = open_tab(slow, first.page.context)
    second.page.get_by_role("button", name="你好", exact=True).click()
    wait_until(lambda: second.page.locator(".question").all_inner_texts() == ["你好"])
    second.page.wait_for_timeout(1000)  # as long as it asks whether anybody answers it
    assert second.page.locator(".answer.waiting").count() == 1
    first.page.locator("#stop").click()
    said = first.answered(1)
    wait_until(lambda: second.answers() == [said])
    say(second, "好")
    second.ask("再见")
    second.answered(2)
    wait_until(lambda: first.answers() == [said, "好"])
    # a reader is left where they are while the other tab goes on
    first.page.set_viewport_size({"width": 900, "height": 330})
    first.page.mouse.move(500, 150)
    first.page.mouse.wheel(0, -2000)
    wait_until(first.page.locator("#newest").is_visible)
    place = first.page.locator("#log").evaluate("e => e.scrollTop")
    second.ask("还有")
    second.answered(3)
    wait_until(lambda: len(first.answers()) == 3)
    assert first.page.locator("#log").evaluate("e => e.scrollTop") == place
    first.question.fill("写到一半")
    act(second, "你好", "重命名")
    second.page.get_by_label("标题").fill("招呼")
    second.page.keyboard.press("Enter")
    wait_until(lambda: first.titles() == ["招呼"])
    assert first.question.input_value() == "写到一半"
    act(second, "招呼", "删除")
    second.page.locator("#ask-ok").click()
    wait_until(first.page.locator("#welcome").is_visible)
    wait_until(lambda: first.titles() == second.titles() == [])


def test_a_full_store_is_said(slow: Running, open_tab: Any, tmp_path: Path) -> None:
    """And the conversation goes on, pictures included."""
    tab = open_tab(slow)
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": slow.url, "quotaSize": 1000})
    Image.effect_noise((1200, 1200), 90).save(tmp_path / "noise.jpg")
    tab.choose(tmp_path / "noise.jpg")
    wait_until(lambda: "空间满了" in tab.page.locator("#notice").inner_text())
    bodies = say(tab, "好")
    tab.ask("这是什么？")
    tab.answered(1)
    assert len(bodies[0]["messages"][-1]["content"]) == 2
    assert "空间满了" in tab.page.locator("#notice").inner_text()


def test_a_browser_that_keeps_nothing(slow: Running, open_tab: Any) -> None:
    context = open_tab(slow).page.context
    context.add_init_script("IDBFactory.prototype.open = () => { throw new Error('closed'); };")
    tab = open_tab(slow, context)
    say(tab, "好")
    tab.choose(IMAGES / "panda.png")
    tab.ask("这是什么？")
    tab.answered(1)
    wait_until(lambda: "不允许这个页面保存" in tab.page.locator("#notice").inner_text())
    tab.ask("还有呢？")
    tab.answered(2)
    assert tab.page.locator(".shown img").evaluate("i => i.naturalWidth") > 0


def test_exports(slow: Running, open_tab: Any) -> None:
    """All of it, pictures included; a file's name is the title without what names cannot have."""
    tab = open_tab(slow)
    say(tab, "| a | b |\n|---|---|\n| 1 | 2 |")
    tab.choose(IMAGES / "panda.png")
    tab.ask("什么/是：*这个*?")
    tab.answered(1)
    panda = (
        "data:image/png;base64," + base64.b64encode((IMAGES / "panda.png").read_bytes()).decode()
    )
    name, _, text = exported(tab, "什么", "导出 JSON").partition("\n")
    assert name == "什么 是： 这个.json"
    made = json.loads(text)
    (turn,) = made["turns"]
    assert made["title"] == "什么/是：*这个*?" and turn["question"] == "什么/是：*这个*?"
    assert turn["pictures"] == [panda] and turn["answer"].startswith("| a | b |")
    name, _, text = exported(tab, "什么", "导出 Markdown").partition("\n")
    assert name.endswith(".md")
    assert text.split("\n\n") == [
        r"# 什么\/是：\*这个\*\?",
        "## 你",
        f"![图片 1]({panda})",
        r"什么\/是：\*这个\*\?",
        "## 模型",
        "| a | b |\n|---|---|\n| 1 | 2 |\n",
    ]


def test_the_list_on_a_phone(slow: Running, open_tab: Any) -> None:
    tab = open_tab(slow, viewport=PHONE, has_touch=True, is_mobile=True)
    say(tab, "好")
    tab.ask("第一")
    tab.answered(1)
    assert tab.page.locator("#list").is_hidden()
    tab.page.get_by_role("button", name="打开对话列表").click()
    tab.page.get_by_role("button", name="新对话", exact=True).click()
    assert tab.page.locator("#list").is_hidden() and tab.page.locator("#welcome").is_visible()
    tab.page.get_by_role("button", name="打开对话列表").click()
    tab.page.get_by_role("button", name="第一", exact=True).click()
    wait_until(lambda: tab.answers() == ["好"])
    assert tab.page.locator("#list").is_hidden()
