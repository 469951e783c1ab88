"""The desktop example in a window, under a virtual screen; skipped where there is neither."""

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from serving import IMAGES, PATIENCE, slow_load

tkinter = pytest.importorskip("tkinter", reason="this Python has no Tk")

ROOT = IMAGES.parent.parent


@pytest.fixture(scope="module")
def screen() -> Iterator[None]:
    """A display of our own, so that no window opens on anybody's screen."""
    if sys.platform != "linux":
        yield
        return
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb is not installed")
    read, write = os.pipe()
    with subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "800x700x24"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    ) as xvfb:
        os.close(write)
        number = os.read(read, 16).decode().strip()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DISPLAY", f":{number}")
            yield
        xvfb.terminate()
    os.close(read)  # not before: it writes its number in two parts


@pytest.fixture(scope="module")
def desktop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("desktop", ROOT / "examples/desktop.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Driver:
    """The example's window, whose events are handled while something is waited for."""

    def __init__(self, desktop: ModuleType, bundle: str | None = None) -> None:
        self.root = tkinter.Tk()
        self.window = desktop.Window(self.root, bundle)

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, self.text()
            self.root.update()
            time.sleep(0.005)

    def ready(self) -> None:
        self.until(lambda: not self.window.busy)

    def text(self) -> str:
        return self.window.talk.get("1.0", "end")

    def press(self, name: str) -> None:
        """Click the button whose text has this word."""

        def buttons(widget: Any) -> Iterator[Any]:
            for child in widget.winfo_children():
                if child.winfo_class() == "TButton":
                    yield child
                yield from buttons(child)

        (button,) = [b for b in buttons(self.root) if name in b.cget("text")]
        button.invoke()


@pytest.fixture
def open_window(screen: None, desktop: ModuleType) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def open_(*args: Any) -> Driver:
        drivers.append(Driver(desktop, *args))
        return drivers[-1]

    yield open_
    while drivers:
        driver = drivers.pop()
        driver.window.worker.close()
        driver.window.worker.join(PATIENCE)
        assert not driver.window.worker.is_alive()
        driver.root.update()
        driver.root.destroy()
    driver = None
    gc.collect()  # here: Tk ends the process if another thread comes to delete what is left of it


def test_a_picture_a_question_and_a_new_conversation(open_window: Callable[..., Driver]) -> None:
    driver = open_window()
    driver.ready()
    driver.window.add_pictures([IMAGES / "panda.png"])
    driver.window.ask("这是什么？")
    driver.ready()
    assert "这是熊猫。" in driver.text() and "3 tokens" in driver.text()
    assert len(driver.window.talk.image_names()) == 1
    driver.window.ask("它能吃吗？")
    driver.ready()
    assert "熊猫" in driver.text().rpartition("它能吃吗？")[2]
    driver.press("New")
    driver.until(lambda: not driver.text().strip())
    driver.window.add_pictures([ROOT / "LICENSE"])
    driver.window.ask("这是什么？")
    driver.ready()
    assert "not a picture" in driver.text()


def test_stop(
    open_window: Callable[..., Driver], desktop: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = slow_load(0.01)
    monkeypatch.setattr(desktop.sl, "load", lambda *_, **__: load())
    driver = open_window()
    driver.ready()
    driver.window.ask("你好")
    driver.until(lambda: len(driver.text()) > 8)
    driver.press("Stop")
    driver.ready()
    assert "stopped" in driver.text()


def test_a_bundle_that_is_none_is_said(open_window: Callable[..., Driver]) -> None:
    driver = open_window("/no/such/bundle")
    driver.until(lambda: "no such folder" in driver.text())
