"""Wrong arguments of the Python API: each is an OptionError that says what is expected."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seechat_lite as sl
from seechat_lite.cli import hints
from seechat_lite.engines import EngineOptions
from seechat_lite.generation import DEFAULTS, Generation
from seechat_weights.errors import SeechatError

HUGE = 10**5000  # has more digits than Python writes
ODD = (None, "hot", b"1", 1.5, math.nan, math.inf, -math.inf, -1, HUGE, True, [], {}, object(), "")
ODD_NUMBERS = [value for value in ODD if value is not True]


def refused(error: pytest.ExceptionInfo[sl.OptionError], name: str) -> None:
    text = str(error.value)
    assert text.startswith(f"{name} is ") and "; expected " in text and "\n" not in text
    said, _, advice = text.rpartition(": ")
    assert said and len(advice.split()) > 1 and len(text) < 400
    assert isinstance(error.value, ValueError)
    assert name in error.value.options


@pytest.fixture(scope="module")
def model(text_bundle: Path) -> Any:
    with sl.load(text_bundle, context=64) as loaded:
        yield loaded


WRONG_OPTIONS = {
    "max_new_tokens": [*ODD, 0],
    "temperature": [v for v in ODD if v != 1.5],
    "top_p": [*ODD, 0, 1.01],
    "top_k": ODD,
    "repetition_penalty": [v for v in ODD if v != 1.5] + [0],
    "seed": ODD,
    "stop": [3, 1.5, [""], [3], object(), b"x"],
    "speculate": ["yes", 1, None],
    "schema": [1, "{}", [], True, object()],
}


def test_every_option_is_tried() -> None:
    assert WRONG_OPTIONS.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_of_an_answer(name: str, model: sl.Model) -> None:
    chat = model.chat()
    for value in WRONG_OPTIONS[name]:
        for call in (
            lambda v=value: chat.stream("你好", **{name: v}),
            lambda v=value: Generation(**{name: v}),
        ):
            with pytest.raises(sl.OptionError) as error:
                call()
            refused(error, name)
    assert chat.turns == [] and chat.stats is None


def test_numbers_of_other_kinds_are_taken(model: sl.Model) -> None:
    chat = model.chat()
    for options in (
        {"max_new_tokens": np.int64(2), "temperature": np.float32(0.5), "seed": np.uint8(3)},
        {"max_new_tokens": 2, "temperature": Fraction(1, 2), "top_p": 1, "top_k": 2**40},
        {"max_new_tokens": 2, "temperature": np.float64(0), "stop": "x", "seed": 2**60},
    ):
        chat.ask("你好", **options)  # type: ignore[arg-type]


@given(st.one_of(st.text(), st.binary(), st.floats(), st.none(), st.lists(st.integers())))
def test_whatever_is_no_whole_number(value: Any) -> None:
    with pytest.raises(sl.OptionError) as error:
        Generation(max_new_tokens=value)
    refused(error, "max_new_tokens")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "engine": ["x", "", None, 3, ["onnx"]],
        "device": [None, 3, b"cpu"],
        "context": [v for v in ODD if v not in (-1,)],
        "threads": ODD,
        "vision_device": [3, b"cpu"],
        "keep_vision": ["yes", 1],
        "max_memory": [v for v in ODD if v is not None],
        "dtype": ["fp64", 3, "", ["fp16"]],
        "quantize": ["int3", 4, ""],
        "rounded_rotary": ["yes", 1, None],
        "image_cache": ODD,
        "vision": ["clip.pt", 3],
    }.items(),
)
def test_options_of_load(name: str, values: list[Any], text_bundle: Path) -> None:
    for value in values:
        with pytest.raises(sl.OptionError) as error:
            sl.load(text_bundle, **{name: value})
        refused(error, name)


@pytest.mark.parametrize("device", ["cpu:0", "cuda:x", "cpu:", ":", ":1"])
def test_devices_with_odd_numbers(device: str, text_bundle: Path) -> None:
    """Wrong as such, or of a device that is not there; never something else."""
    with pytest.raises((sl.OptionError, sl.EngineError), match="device"):
        sl.load(text_bundle, device=device)


@pytest.mark.parametrize("path", [3, b"x", ["x"], object()])
def test_what_is_no_path(path: Any) -> None:
    for call in (
        sl.load,
        lambda p: sl.load(p, engine="onnx"),
        lambda p: sl.VisionFiles(eva=p).open("."),
    ):
        with pytest.raises(sl.OptionError) as error:
            call(path)
        refused(error, "path")


def test_questions_and_formats(model: sl.Model) -> None:
    chat = model.chat()
    for question in (3, b"x", ["x"], object()):
        for call in (chat.stream, chat.prompt, lambda q: chat.append(q, "x")):
            with pytest.raises(sl.OptionError) as error:
                call(question)  # type: ignore[arg-type]
            refused(error, "question")
    for format in ("x", 3, ["seechat"]):
        with pytest.raises(sl.OptionError) as error:
            model.chat(format)  # type: ignore[arg-type]
        refused(error, "format")
    with pytest.raises(sl.OptionError, match="generation is"):
        chat.stream("你好", generation={"seed": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "files",
    [
        {"clip": "a", "eva": "b"}, {"projector": "a", "qformer": "b"},
        {"clip": "a", "projector": "b", "eva": "c"},
        {"image_size": 224}, {"eva": "a", "image_size": 22.4}, {"clip_activation": "relu"},
    ],
)  # fmt: skip
def test_vision_files_that_do_not_go_together(files: dict[str, Any]) -> None:
    with pytest.raises(sl.OptionError, match="expected") as error:
        sl.VisionFiles(**files)
    assert error.value.options.keys() & files.keys()
    assert "--" not in str(error.value) and "--" in hints.as_usage(error.value)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "precision": ["int3", 4, None, ["int4"], ""],
        "block_size": [7, "32", 128.5, None, [128]],
        "vision_precision": ["int4", 8, ""],
        "conversation": ["x", 3, ""],
    }.items(),
)
def test_options_of_an_export(name: str, values: list[Any], tmp_path: Path) -> None:
    from seechat_export.export import export_bundle

    for value in values:
        with pytest.raises(sl.OptionError) as error:
            export_bundle(lm=tmp_path, out=tmp_path / "b", **{"precision": "int4", name: value})
        refused(error, name)
    assert not any(tmp_path.iterdir())


# --- what the command line makes of it


def test_hints() -> None:
    known = {"context", "keep_vision", "clip"}
    for options, calls, expected in [
        ({"context": 512}, {}, "--context 512"),
        ({"keep_vision": False}, {}, "--no-keep-vision"),
        ({"keep_vision": True, "clip": None}, {}, "--keep-vision --clip"),
        ({"quantize": "int4"}, {}, ""),  # this command has no such option
        ({}, {"export": {"precision": "int4"}}, "seechat export --precision int4"),
        ({}, {"export": {}}, "seechat export"),
        ({}, {"identify": {"path": Path("a b")}}, f"seechat info {hints.quoted('a b')}"),
        (
            {"context": 512},
            {"load": {"engine": "torch", "model": Path("m")}},
            "--context 512; seechat chat --engine torch --model m",
        ),
    ]:
        error = SeechatError("no; expected yes: do", options=options, calls=calls)
        assert hints.hint(error, known) == expected
        assert hints.told(error, known) == (f"{error} ({expected})" if expected else str(error))


def test_words_of_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, posix, windows in [
        ("plain", "plain", "plain"),
        ("a b", "'a b'", '"a b"'),
        ("猫", "'猫'", '"猫"'),
        (r"C:\models\x", r"'C:\models\x'", r"C:\models\x"),
        (r"C:\my models", r"'C:\my models'", r'"C:\my models"'),
    ]:
        monkeypatch.setattr(hints.os, "name", "posix")
        assert hints.quoted(text) == posix
        monkeypatch.setattr(hints.os, "name", "nt")
        assert hints.quoted(text) == windows
        monkeypatch.undo()


def test_engine_options_are_checked_where_they_are_made() -> None:
    with pytest.raises(sl.OptionError, match="threads is -1"):
        EngineOptions(threads=-1)
