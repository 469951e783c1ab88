"""Engines speak for themselves: their plan, what they read, what they can do; before any work."""

import re
import threading
from pathlib import Path

import pytest
import torch

import seechat_lite as sl
from reference import data
from seechat_lite import loading
from seechat_lite.cli.main import main
from seechat_lite.engines import ENGINES, engine_class
from seechat_lite.engines.torch.settings import torch_settings

TINY = data("chatglm_tiny")


def test_only_an_engine_knows_its_name() -> None:
    """What an engine can do is asked of it: nobody else compares with its name."""
    names = "|".join(ENGINES)
    compares = re.compile(rf"""engine["'\])]*\s*(==|!=|in)\s*[("']*({names})["']""")
    root = Path(sl.__file__).parents[2]
    sources = [f for part in ("weights", "lite", "export") for f in (root / part).rglob("*.py")]
    assert len(sources) > 50
    assert not [str(f) for f in sources if compares.search(f.read_text("utf-8"))]
    assert compares.search('if args.engine != "torch" and x') and compares.search(
        "engine == 'onnx'"
    )


@pytest.mark.parametrize("engine", list(ENGINES))
def test_the_plan_is_made_once_and_told_before_anything_is_hashed(
    engine: str, text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, order = engine_class(engine), []
    plan, verify = chosen.plan, loading.verify_once

    def planning(*args: object, **kwargs: object) -> object:
        order.append("plan")
        return plan(*args, **kwargs)  # type: ignore[arg-type]

    def verifying(*args: object) -> None:
        order.append("hash")
        verify(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(chosen, "plan", planning)
    monkeypatch.setattr(loading, "verify_once", verifying)
    options = {"engine": engine, "device": "cpu", "context": 64}
    with sl.load(text_bundle, announce=lambda p: order.append(p.context), **options):
        pass
    assert order == ["plan", 64, "hash"]
    order.clear()
    with pytest.raises(sl.MemoryPlanError, match=r"the budget is 1 MB: "):
        sl.load(text_bundle, max_memory=1_000_000, announce=order.append, **options)
    assert order == ["plan"]
    order.clear()
    with pytest.raises(sl.EngineError, match="abacus"):
        sl.load(text_bundle, announce=order.append, **options | {"device": "abacus"})
    assert order == ["plan"]


@pytest.mark.parametrize(
    "option",
    [
        {"quantize": "int4"},
        {"rounded_rotary": True},
        {"dtype": "bf16"},
        {"vision": sl.VisionFiles()},
    ],
)
def test_what_an_engine_cannot_do_is_refused_not_ignored(
    option: dict[str, object], text_bundle: Path
) -> None:
    with pytest.raises(sl.OptionError, match="not for the engine 'auto'"):
        sl.load(text_bundle, **option)


def test_info_plans_for_the_engine_that_is_meant(
    text_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = []
    for engine in ENGINES:
        assert main(["info", str(text_bundle), "--engine", engine, "--device", "cpu"]) == 0
        sums.append(re.findall(r"weights .*", capsys.readouterr().out))
    assert sums[0] != sums[1]
    with pytest.raises(SystemExit) as e:
        main(["info", str(text_bundle), "--engine", "abacus"])
    assert e.value.code == 2


# --- settings of the process


def settings() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )


def test_the_torch_engine_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    other = before[0] % 2 + 1  # another number of threads
    assert isinstance(other, int)
    with sl.load(TINY, engine="torch", device="cpu", context=64, threads=other) as model:
        assert settings() == before
        seen = []
        model.engine._decoder.register_forward_pre_hook(lambda *_: seen.append(settings()[0]))
        with sl.load(TINY, engine="torch", device="cpu", context=64) as second:
            for chat in (model.chat(), second.chat()):
                chat.ask("你好", max_new_tokens=2)
                assert settings() == before
        assert set(seen) == {other}
        model.engine._decoder.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.chat().ask("你好")
        assert settings() == before

    def fails(*_: object, **__: object) -> None:
        raise sl.EngineError("no; expected yes: do")

    monkeypatch.setattr("seechat_lite.engines.torch.engine.weights_of", fails)
    with pytest.raises(sl.EngineError):
        sl.load(TINY, engine="torch", device="cpu", threads=other)
    for threads in (-1, 100_000):  # as many would be started
        with pytest.raises(sl.OptionError, match="expected 0 to"):
            sl.load(threads=threads)
    assert settings() == before


def test_settings_of_engines_whose_calls_overlap() -> None:
    """The first to begin ends first: the last to end puts back what the first found."""
    before, inside, leave, ended = settings(), *(threading.Event() for _ in range(3))

    def work() -> None:
        with torch_settings(threads=1, on_gpu=True):
            inside.set()
            leave.wait(60)
        ended.set()

    other = threading.Thread(target=work)
    other.start()
    assert inside.wait(60)
    with torch_settings(threads=2, on_gpu=True):
        leave.set()
        assert ended.wait(60)
        assert settings()[:3] == (2, False, False)
    other.join()
    assert settings() == before
