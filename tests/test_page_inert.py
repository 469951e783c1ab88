"""Nothing that a model, or a question, says does anything on the page but be read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browsing import MARKS, Tab, refuse, say
from seechat_lite.server import page
from serving import Running, running, wait_until

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = MARKS

# one JSON string a line: script tags, handlers, addresses, SVG and MathML, mutations, overlays,
# Markdown's own, Unicode and broken markup
LINES = (Path(__file__).parent / "data/injections.txt").read_text("ascii").splitlines()
INJECTIONS = [json.loads(line) for line in LINES]
VENDOR = Path(page.__file__).parent / "vendor"

# what is wrong with the elements below `root`; own: those of the page itself are there too
FAULTS = """(root) => {
    const tags = new Set(`P BR HR H1 H2 H3 H4 H5 H6 STRONG EM DEL CODE PRE BLOCKQUOTE UL OL LI A
        TABLE THEAD TBODY TR TH TD`.split(/\\s+/));
    const faults = [];
    for (const e of root.querySelectorAll('*')) {
        const own = e.closest('.code > button') || e.matches('.code, .table');
        if (!own && !tags.has(e.tagName)) faults.push(e.outerHTML);
        for (const {name, value} of e.attributes) {
            const fine = name === 'href' ? /^(https?|mailto):/i.test(value)
                : 'align start class type tabindex target rel title'.split(' ').includes(name);
            if (!fine) faults.push(e.outerHTML);
        }
        if (e.tagName === 'A' && (e.target !== '_blank' || !e.rel.includes('noopener')))
            faults.push(e.outerHTML);
        if (!own && (e.className || e.id) && !e.matches('pre')) faults.push(e.outerHTML);
    }
    return faults;
}"""
# what may do something, anywhere in the page: the same before and after
ACTIVE = """[...document.querySelectorAll(
    'script, iframe, frame, object, embed, applet, base, meta, link, style, math, video, audio, '
    + 'source, template, portal, form, [style], [srcdoc], [action], [formaction], [autofocus], '
    + '[popover]')]
    .filter((e) => !e.matches('#question, #log textarea')).map((e) => e.cloneNode(false).outerHTML)
    .concat([...document.querySelectorAll('*')].flatMap((e) => [...e.attributes].filter(
        ({name}) => name.startsWith('on')).map(() => e.outerHTML)))"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def fill_store(tab: Tab, strings: list[str]) -> None:
    """A conversation with a turn for each string, and one for each with it as title and draft."""
    tab.page.evaluate(
        """async (strings) => {
            const store = await import('/store.js');
            const conversation = (id, title, text) => store.saveConversation({id, title,
                named: true, created: 1, changed: id === 'all' ? 2 : 1,
                draft: {text, pictures: []}});
            await conversation('all', 'all', '');
            for (const [i, s] of strings.entries()) {
                await store.saveTurn({id: `turn${i}`, conversation: 'all', at: i, question: s,
                    pictures: [], answer: s, note: null, state: 'done'});
                await conversation(`title${i}`, i % 2 ? s : '', s);
            }
        }""",
        strings,
    )


def test_the_corpus_is_what_it_should_be() -> None:
    assert len(set(INJECTIONS)) == len(INJECTIONS) >= 200


def test_as_question_answer_title_and_draft(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    before = tab.page.evaluate(ACTIVE)
    fill_store(tab, INJECTIONS)
    count = len(INJECTIONS)
    tab.reload()
    wait_until(lambda: len(tab.titles()) == count + 1)
    tab.page.locator("#conversations .title").first.click()
    wait_until(lambda: tab.page.locator(".answer").count() == count)
    for answer in tab.page.locator(".answer").element_handles():
        assert answer.evaluate(FAULTS) == []
    assert tab.page.evaluate(ACTIVE) == before
    # questions and titles are text, whole and alone
    questions = tab.page.locator(".question")
    assert questions.locator("*").count() == 0
    assert questions.all_text_contents() == INJECTIONS
    assert tab.page.locator("#conversations .title *").count() == 0
    assert set(INJECTIONS[1::2]) <= set(tab.titles())
    # an address is nowhere but where its title says
    assert tab.page.evaluate(
        "[...document.querySelectorAll('.answer a')].every((a) => a.title === a.href)"
    )
    # in the dialogs, in a draft
    tab.page.locator("#conversations .more").nth(2).click()
    tab.page.locator("[data-role=delete]").click()
    assert tab.page.evaluate(ACTIVE) == before
    assert tab.page.locator("#ask-what *").count() == 0
    tab.page.keyboard.press("Escape")
    tab.page.locator("#conversations .title").nth(4).click()
    wait_until(lambda: tab.page.locator(".question").count() == 0)
    assert tab.page.evaluate(ACTIVE) == before


def test_as_a_stream_and_as_an_error(server: Running, open_tab: Any) -> None:
    """In pieces, so that what is half said is drawn too."""
    tab = open_tab(server)
    before = tab.page.evaluate(ACTIVE)
    for strings in (INJECTIONS[0::2], INJECTIONS[1::2]):
        tab.page.unroute_all()
        say(
            tab, *(piece for s in strings for piece in (s[: len(s) // 2], s[len(s) // 2 :], "\n\n"))
        )
        tab.page.locator("#new").click()
        tab.ask("你好")
        tab.answered(1)
        assert tab.page.locator(".answer").evaluate(FAULTS) == []
        assert tab.page.evaluate(ACTIVE) == before
    for string in INJECTIONS[::20]:
        refuse(tab, string, string)
        tab.page.locator("#new").click()
        tab.ask("你好")
        tab.page.wait_for_selector(".wrong")
        assert tab.page.locator(".wrong details p *").count() == 0
    assert tab.page.evaluate(ACTIVE) == before
    tab.allow("Failed to load resource")


def test_every_half_said_answer(server: Running, open_tab: Any) -> None:
    """All beginnings of all strings, as a stream draws them, by the function that draws them."""
    tab = open_tab(server)
    faults = tab.page.evaluate(
        f"""async (strings) => {{
            const {{rendered}} = await import('/markdown.js');
            const faults = {FAULTS};
            const of = (s) => {{
                const box = document.createElement('div');
                box.append(rendered(s, () => {{}}));
                return faults(box);
            }};
            const ends = (s) => [...Array(Math.min(s.length, 120)).keys()].map((i) => i + 1);
            return strings.flatMap((s) => ends(s).flatMap((end) => of(s.slice(0, end))));
        }}""",
        INJECTIONS,
    )
    assert faults == []


@pytest.mark.parametrize("kind", ["Markdown", "JSON"])
def test_as_exported(server: Running, open_tab: Any, browser: Any, kind: str) -> None:
    """Also where a program shows the Markdown with all the HTML that is in it."""
    tab = open_tab(server)
    fill_store(tab, INJECTIONS)
    tab.page.locator("#conversations .title").first.click()
    wait_until(lambda: len(tab.answers()) == len(INJECTIONS))
    tab.page.locator("#conversations .more").first.click()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name=f"导出 {kind}").click()
    text = Path(download.value.path()).read_text("utf-8")
    if kind == "JSON":
        turns = json.loads(text)["turns"]
        assert [t["answer"] for t in turns] == [t["question"] for t in turns] == INJECTIONS
        return
    viewer = browser.new_page()
    spoken: list[str] = []
    viewer.on("request", lambda r: spoken.append(r.url))
    viewer.on("dialog", lambda d: (spoken.append(d.message), d.dismiss()))
    viewer.add_script_tag(content=(VENDOR / "marked.esm.js").read_text("utf-8"), type="module")
    source = json.dumps((VENDOR / "marked.esm.js").read_text("utf-8"))
    viewer.evaluate(
        f"""async (text) => {{
            const address = URL.createObjectURL(new Blob([{source}], {{type: 'text/javascript'}}));
            const {{marked}} = await import(address);
            document.body.innerHTML = marked.parse(text);
        }}""",
        text,
    )
    viewer.wait_for_timeout(300)
    assert [s for s in spoken if not s.startswith("blob:")] == []
    seen = "[...document.body.querySelectorAll('*')].map((e) => e.tagName)"
    allowed = "P BR HR H1 H2 H3 H4 H5 H6 STRONG EM DEL CODE PRE BLOCKQUOTE UL OL LI A INPUT"
    assert set(viewer.evaluate(seen)) <= {*f"{allowed} TABLE THEAD TBODY TR TH TD".split()}
    hrefs = "[...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))"
    links = viewer.evaluate(hrefs)
    assert [h for h in links if not h.lower().startswith(("http:", "https:", "mailto:"))] == []
    viewer.close()


def test_bombs_end(server: Running, open_tab: Any) -> None:
    """What would take a parser very long, or very deep, is shown as it is."""
    tab = open_tab(server)
    lengths = tab.page.evaluate(
        """async () => {
            const {rendered, harmless} = await import('/markdown.js');
            const bombs = ['>'.repeat(20000) + 'x', '['.repeat(20000), '*a **a '.repeat(5000),
                '`'.repeat(20000), '- '.repeat(5000) + 'x', '<'.repeat(20000), '|a'.repeat(5000),
                '![['.repeat(5000), '<!--'.repeat(5000), 'a\\n'.repeat(50000), 'x'.repeat(300000)];
            return bombs.map((bomb) => {
                const box = document.createElement('div');
                box.append(rendered(bomb, () => {}));
                return box.textContent.length && harmless(bomb).length;
            });
        }"""
    )
    assert all(lengths)


def test_no_picture_is_loaded_even_if_one_were_let_through(server: Running, open_tab: Any) -> None:
    tab = open_tab(server)
    blocked = tab.page.evaluate(
        """() => new Promise((resolve) => {
            document.onsecuritypolicyviolation = (e) => resolve(e.violatedDirective);
            document.body.append(Object.assign(new Image(), {src: 'https://evil.example/p.png'}));
        })"""
    )
    assert blocked == "img-src"
    failed = tab.page.evaluate(
        "() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } }"
    )
    assert failed == "TypeError"
    tab.allow("Content Security Policy", "TrustedHTML", "requires")
    tab.hosts.discard("https://evil.example")  # refused by the browser before it was sent


def test_markdown(server: Running, open_tab: Any) -> None:
    """Tables, lists, code with a button; links open elsewhere; a code block is copied as it is."""
    tab = open_tab(server, permissions=["clipboard-read", "clipboard-write"])
    answer = (
        "## 标题\n\n| 名 | 色 |\n|:--|--:|\n| 熊猫 | 黑 |\n\n1. 一\n2. 二\n   - 三\n\n"
        "```python\nprint('<b>')\n  x\n```\n\n> 引用\n\n**粗** *斜* `a<b` ~~无~~ 第一行\n第二行 "
        "[网页](https://example.org/a) https://example.org/b ![画](https://example.org/c.png) "
        "<b>字</b>"
    )
    say(tab, *answer)
    tab.ask("你好")
    tab.answered(1)
    found = tab.page.locator(".answer")
    assert found.locator("td").all_inner_texts() == ["熊猫", "黑"]
    assert found.locator("ol > li").count() == 2 and found.locator("ol ul li").count() == 1
    assert found.locator("blockquote, strong, em, del, h2").count() == 5
    assert found.locator("p code").inner_text() == "a<b" and "<b>字</b>" in found.inner_text()
    links = found.locator("a")
    assert [a.get_attribute("href") for a in links.all()] == [
        f"https://example.org/{x}" for x in ("a", "b", "c.png")
    ]
    assert {a.get_attribute("target") for a in links.all()} == {"_blank"}
    assert {a.get_attribute("rel") for a in links.all()} == {"noopener noreferrer nofollow"}
    assert found.locator("img").count() == 0
    tab.page.get_by_role("button", name="复制代码").click()
    wait_until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == "print('<b>')\n  x\n")
    tab.page.locator(".foot").get_by_role("button", name="复制").click()
    wait_until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == answer)
