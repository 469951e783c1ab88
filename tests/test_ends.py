"""close(), stop(), clear(), exit and fork at any moment and from any thread: no crash, no hang."""

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import seechat_lite as sl
from seechat_lite.engines import ENGINES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PANDA = ROOT / "docs/images/panda.png"
PATIENCE = 200  # seconds; ends what hangs, and is never what a test is about
LONG = "详细 tell me everything " * 20
CLOSED = "the model is closed"

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def small(engine: str, vision_bundle: Path) -> sl.Model:
    return sl.load(vision_bundle, engine=engine, image_cache=0)


def talking(model: sl.Model, *, image: Any = None) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that asks until something ends it, and what did."""
    ended: list[BaseException] = []

    def work() -> None:
        try:
            seed = 0
            while True:
                chat, seed = model.chat(), seed + 1
                for _ in chat.stream(LONG, image, temperature=1.0, seed=seed, max_new_tokens=100):
                    pass
        except BaseException as e:
            ended.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, ended


def joined(thread: threading.Thread) -> None:
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.parametrize("image", [None, PANDA], ids=["text", "pictures"])
@pytest.mark.parametrize("engine", ENGINES)
def test_close_at_any_moment(engine: str, image: Path | None, vision_bundle: Path) -> None:
    random = Random(7)
    for _ in range(6):
        model = small(engine, vision_bundle)
        threads = [talking(model, image=image) for _ in range(2)]  # one of them waits in line
        time.sleep(random.random() * 0.3)
        closing = [threading.Thread(target=model.close) for _ in range(2)]
        for thread in closing:
            thread.start()
        for thread in closing:
            joined(thread)
        for thread, ended in threads:
            joined(thread)
            assert isinstance(ended[0], sl.EngineError), ended
            assert CLOSED in str(ended[0])
        with pytest.raises(sl.EngineError, match=CLOSED):
            model.chat().ask("hi")


@pytest.mark.parametrize("engine", ENGINES)
def test_close_between_two_pieces(engine: str, vision_bundle: Path) -> None:
    """In the streaming thread itself; what has been said stays, the next piece is an error."""
    model = small(engine, vision_bundle)
    with pytest.raises(sl.EngineError, match=CLOSED):
        for _ in model.chat().stream(LONG, max_new_tokens=100, temperature=1.0):
            model.close()
    for call in (
        lambda: model.engine.step(1),
        lambda: model.engine.prefill(sl.Prompt([1, 2], [])),
        lambda: model.engine.encode_image(np.zeros((1, 3, 56, 56), np.float32)),
        lambda: model.chat().append("?", "!", PANDA),
    ):
        with pytest.raises(sl.EngineError, match=CLOSED):
            call()


class Closes:
    """Closes a model when the garbage collector finds it."""

    def __init__(self, model: sl.Model) -> None:
        self.model, self.itself = model, self

    def __del__(self) -> None:
        self.model.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_close_in_a_finalizer(engine: str, vision_bundle: Path) -> None:
    """Which Python runs amid whatever the streaming thread is just doing."""
    before = gc.get_threshold()
    try:
        for allocations in (1, 30, 200):
            model = small(engine, vision_bundle)
            gc.collect()
            Closes(model)  # a cycle: the collector's to find
            gc.set_threshold(allocations, 1, 1)
            with pytest.raises(sl.EngineError, match=CLOSED):
                while True:
                    model.chat().ask(LONG, PANDA, max_new_tokens=20, temperature=1.0)
    finally:
        gc.set_threshold(*before)


@pytest.fixture
def alarms() -> Iterator[Callable[..., None]]:
    """Have something done by a signal's handler, so many seconds from now, and perhaps again."""

    def set_alarm(seconds: float, act: Callable[[], None], *, again: float = 0) -> None:
        signal.signal(signal.SIGALRM, lambda *_: act())
        signal.setitimer(signal.ITIMER_REAL, seconds, again)

    before = signal.getsignal(signal.SIGALRM)
    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="signals of Unix")
@pytest.mark.parametrize("engine", ENGINES)
def test_signal_handlers_at_any_moment(
    engine: str, vision_bundle: Path, alarms: Callable[..., None]
) -> None:
    """close(), stop() and KeyboardInterrupt amid whatever this thread is just doing."""
    random = Random(3)
    with small(engine, vision_bundle) as model:
        alone = model.chat().ask("hi", PANDA, max_new_tokens=4)
        for i in range(24):
            chat = model.chat()
            chat.append("a", "b")
            # a stop between two questions stops neither, so that it is said again
            alarms(
                0.001 + random.random() * 0.05,
                (interrupt, chat.stop)[i % 2],
                again=0.03 if i % 2 else 0,
            )
            try:
                while chat.stats is None or chat.stats.finish_reason != "cancelled":
                    chat.ask(LONG, PANDA, max_new_tokens=50, temperature=1.0)
            except KeyboardInterrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert model.chat().ask("hi", PANDA, max_new_tokens=4) == alone
    for _ in range(6):
        model = small(engine, vision_bundle)
        alarms(0.001 + random.random() * 0.05, model.close)
        with pytest.raises(sl.EngineError, match=CLOSED):
            while True:
                model.chat().ask(LONG, PANDA, max_new_tokens=50, temperature=1.0)


def test_stop_ends_a_wait_for_ones_turn(vision_bundle: Path) -> None:
    with small("onnx", vision_bundle) as model:
        stream = model.chat().stream(LONG, max_new_tokens=100)
        next(stream)
        waiting = model.chat()
        thread = threading.Thread(target=lambda: waiting.ask("hi"))
        thread.start()
        while waiting.stats is None:
            time.sleep(0.01)
            waiting.stop()
        joined(thread)
        assert waiting.stats.finish_reason == "cancelled"
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert model.chat().ask("hi", max_new_tokens=2)


def test_clear_while_an_answer_runs() -> None:
    """From another thread, at any moment: whole or empty, and the next question works."""
    random = Random(5)
    with sl.load() as model:
        chat = model.chat()
        done = threading.Event()

        def clear() -> None:
            while not done.is_set():
                time.sleep(random.random() * 0.02)
                chat.clear()

        thread = threading.Thread(target=clear)
        thread.start()
        try:
            answers = [""]
            for _ in range(40):
                answers.append(chat.ask("What is it?", PANDA, max_new_tokens=8))
                said = [turn.answer for turn in chat.turns]  # all since the last clear()
                assert said == answers[len(answers) - len(said) :]
        finally:
            done.set()
            joined(thread)
        stream = chat.stream("What is it?", PANDA)
        next(stream)
        chat.clear()
        assert "".join(stream)
        assert chat.turns == []
        assert chat.ask("What is it?", PANDA) == "This is a panda."


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_may_be_collected_by_another_thread(engine: str, vision_bundle: Path) -> None:
    with small(engine, vision_bundle) as model:
        for _ in range(5):
            streams = [model.chat().stream(LONG, max_new_tokens=100)]
            next(streams[0])
            thread = threading.Thread(target=streams.clear)
            thread.start()
            joined(thread)
            assert model.chat().ask("hi", max_new_tokens=2)


WORK = {
    "streams": "for _ in model.chat().stream('tell ' * 100, temperature=1.0): pass",
    "sees": f"model.chat().ask('?', {str(PANDA)!r}, max_new_tokens=1)",
    "loads": "sl.load(*given[:1], engine=given[1])",
    "closes": "sl.load(*given[:1], engine=given[1]).close()",
}
EXIT = """
import sys, threading, time, faulthandler, seechat_lite as sl
given, seconds = sys.argv[1:3], float(sys.argv[3])
model = sl.load(given[0], engine=given[1], image_cache=0)
def work():
    while True:
        {work}
threading.Thread(target=work, daemon=True).start()
time.sleep(seconds)
"""


@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("engine", ENGINES)
def test_exit_while_a_daemon_thread_works(engine: str, what: str, vision_bundle: Path) -> None:
    for seconds in (0.02, 0.2, 0.31):
        code = EXIT.format(work=WORK[what])
        done = subprocess.run(
            [sys.executable, "-c", code, str(vision_bundle), engine, str(seconds)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_files_stay_open_while_the_process_exits(vision_bundle: Path) -> None:
    """A daemon thread may be amid a step after all else was ended."""
    code = f"""
import atexit
atexit.register(lambda: [read() for read in reads])  # handlers run last in, first out
from pathlib import Path
from seechat_lite.source import open_source
from seechat_weights.bundle.arrays import BundleArrays
folder = Path({str(vision_bundle)!r})
source = open_source(folder)
files, arrays = source.opened_files(), BundleArrays(folder, source.manifest)
reads = [files.check, files.check_places, lambda: arrays.rows([1])]
[read() for read in reads]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_is_freed_before_libraries_take_themselves_down() -> None:
    """When the interpreter exits, and as soon as nobody has an object any more."""
    code = """
import atexit
from seechat_lite.native import Native
atexit.register(print, "the library is gone")  # what a native library does when it is imported
class Model(Native):
    def _release(self):
        print("freed")
Model()
model = Model()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.stdout, done.stderr) == ("freed\nfreed\nthe library is gone\n", "")


def test_exit_handlers_may_close_and_use_a_model(vision_bundle: Path) -> None:
    code = f"""
import atexit, threading, seechat_lite as sl
model = sl.load({str(vision_bundle)!r})
threading.Thread(target=lambda: model.chat().ask("tell " * 99), daemon=True).start()
atexit.register(model.close)
atexit.register(lambda: print(len(model.chat().ask("hi", max_new_tokens=2))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0


def forked(act: Callable[[], str]) -> str:
    """What `act` returns in a forked process, which then ends as a program does."""
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(tells, act().encode())
        os._exit(0)
    os.close(tells)
    end = time.monotonic() + PATIENCE
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
    said = os.read(told, 10_000).decode()
    os.close(told)
    assert done[1] == 0
    return said


def answer_or_error(model: sl.Model) -> str:
    try:
        return model.chat().ask("hi", max_new_tokens=4)
    except sl.EngineError as e:
        return str(e)
    finally:
        model.close()


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_fork_of_an_idle_model(engine: str, vision_bundle: Path) -> None:
    """ONNX Runtime's goes on, with one thread; torch's may hang, so it is refused."""
    with small(engine, vision_bundle) as model:
        alone = model.chat().ask("hi", max_new_tokens=4)
        for _ in range(3):
            said = forked(lambda: answer_or_error(model))
            assert said == alone if engine == "onnx" else "was forked" in said
        assert model.chat().ask("hi", max_new_tokens=4) == alone


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_fork_while_a_thread_answers(engine: str, vision_bundle: Path) -> None:
    """The child answers, or says why it cannot; it never hangs."""
    random = Random(1)
    model = small(engine, vision_bundle)
    alone = model.chat().ask("hi", max_new_tokens=4)
    thread, _ = talking(model)
    for _ in range(8):
        time.sleep(random.random() * 0.05)
        said = forked(lambda: answer_or_error(model))
        assert "was forked" in said or (engine == "onnx" and said == alone)
    model.close()
    joined(thread)


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_may_load_its_own(vision_bundle: Path) -> None:
    with small("torch", vision_bundle) as model:

        def load_again() -> str:
            with small("onnx", vision_bundle) as own:
                return own.chat().ask("hi", max_new_tokens=4)

        assert forked(load_again) == model.chat().ask("hi", max_new_tokens=4)


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_multiprocessing_by_fork(vision_bundle: Path) -> None:
    with small("onnx", vision_bundle) as model:
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        process = context.Process(target=lambda: answers.put(answer_or_error(model)))
        process.start()
        assert answers.get(timeout=PATIENCE) == model.chat().ask("hi", max_new_tokens=4)
        process.join(PATIENCE)
        assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "pread"), reason="a mapped file cannot be cut short there")
@pytest.mark.parametrize("engine", ENGINES)
def test_embeddings_that_are_cut_short(engine: str, vision_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(vision_bundle, folder)
    with sl.load(folder, engine=engine) as model:
        stream = model.chat().stream(LONG, max_new_tokens=100, temperature=1.0)
        next(stream)
        os.truncate(folder / model.manifest.decoder.embeddings, 0)
        with pytest.raises(sl.BundleError, match="shorter than when it was loaded"):
            list(stream)
        with pytest.raises(sl.BundleError, match="shorter than when it was loaded"):
            model.chat().ask("hi")
