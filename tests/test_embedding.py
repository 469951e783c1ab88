"""The Python API as applications use it: progress, cancelling, threads, the pictures' memory."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import seechat_lite as sl

ROOT = Path(__file__).parent.parent
PANDA = ROOT / "docs/images/panda.png"


def test_loading_tells_its_progress() -> None:
    told: list[tuple[str, int, int]] = []
    with sl.load(progress=lambda *step: told.append(step)) as model:
        size = sum(f.bytes for f in model.manifest.files.values())
    checking = [step for step in told if step[0] == "checking"]
    assert [done for _, done, _ in checking] == sorted({done for _, done, _ in checking})
    assert checking[-1] == ("checking", size, size)
    assert told[-2:] == [("loading", 0, 1), ("loading", 1, 1)]


@pytest.mark.parametrize("at", [("checking", 0), ("loading", 0), ("loading", 1)])
def test_progress_can_end_the_loading(at: tuple[str, int]) -> None:
    """An exception of the callback comes out of load(), and no engine stays open."""

    class CancelledError(Exception):
        pass

    def progress(stage: str, done: int, total: int) -> None:
        if stage == at[0] and done >= at[1]:
            raise CancelledError

    with pytest.raises(CancelledError):
        sl.load(progress=progress)


@pytest.mark.slow
def test_one_model_answers_many_threads() -> None:
    """Chats of their own in eight threads: each gets the answer it would get alone."""
    pictures = sorted((ROOT / "docs/images").glob("*.png"))[:4]
    questions = [(p, "这是什么？") for p in pictures] + [(p, "What is it?") for p in pictures]
    with sl.load() as model:
        alone = [model.chat().ask(q, p) for p, q in questions]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda pq: model.chat().ask(pq[1], pq[0]), questions * 2))
    assert together == alone * 2


def test_stop_from_another_thread_lets_the_next_one_in() -> None:
    with sl.load() as model:
        chat, waiting = model.chat(), model.chat()
        stream = chat.stream("这是什么？", PANDA)
        next(stream)
        answers: list[str] = []
        other = threading.Thread(target=lambda: answers.append(waiting.ask("这是什么？", PANDA)))
        other.start()
        threading.Thread(target=chat.stop).start()
        list(stream)
        other.join()
        assert answers == ["这是熊猫。"]


@pytest.mark.parametrize(("budget", "encoded"), [(1 << 20, 2), (0, 4)])
def test_embeddings_are_kept_within_their_budget(
    budget: int, encoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    with sl.load(image_cache=budget) as model:
        encode = model.engine.encode_image

        def counting(pixels: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            return encode(pixels)

        monkeypatch.setattr(model.engine, "encode_image", counting)
        for colour in ("red", "blue", "red", "blue"):
            model.encode_image(Image.new("RGB", (64, 64), colour))
    assert calls == encoded
