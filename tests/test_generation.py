"""Options of an answer: one value, the same in every entry."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

import seechat_lite as sl
from seechat_lite.cli.main import main
from seechat_lite.generation import DEFAULTS, HELP, Generation, GenerationOptions, Sampling

OFFERED = set(get_type_hints(GenerationOptions))


@pytest.fixture(scope="module")
def model(text_bundle: Path) -> Iterator[sl.Model]:
    with sl.load(text_bundle, context=200) as model:
        yield model


def test_every_option_is_offered_everywhere() -> None:
    """A new one is a field and a line of HELP; commands, pipe and plugin take it from there."""
    assert {f.name for f in dataclasses.fields(Generation)} == OFFERED
    assert OFFERED == HELP.keys() == DEFAULTS.keys()
    plugin = pytest.importorskip("seechat_lite.llm_plugin")
    offered = plugin.Seechat.Options.model_fields.keys()
    assert {"bundle", "format", *OFFERED} - {"stop", "schema"} == offered


def test_every_option_is_one_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    shown = capsys.readouterr().out
    for name in OFFERED:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("stop", [""]),
        ("stop", [3]),
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("schema", "{}"),
    ],
)
def test_what_no_model_would_take(option: str, value: object, model: sl.Model) -> None:
    with pytest.raises(sl.OptionError, match=f"{option} is .*; expected"):
        model.chat().stream("你好", **{option: value})  # before its first piece is asked for
    with pytest.raises(ValueError, match=option):
        Generation(**{option: value})  # type: ignore[arg-type]


def test_options_by_name_count_before_the_value(model: sl.Model) -> None:
    short = Generation(max_new_tokens=2)
    chat = model.chat()
    assert chat.ask("你好", generation=short) == chat.model.chat().ask("你好", max_new_tokens=2)
    assert chat.stats and chat.stats.new_tokens == 2
    chat.ask("你好", generation=short, max_new_tokens=3)
    assert chat.stats.new_tokens == 3
    assert isinstance(short, Sampling) and Generation(stop="x").stop == ("x",)


def test_stop_ends_an_answer_and_leaves_the_format_alone(
    model: sl.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = model.chat().ask("你好", max_new_tokens=4)
    marker = whole[-3:]
    expected = whole[: whole.index(marker)]
    chat = model.chat()
    before = chat.format
    assert chat.ask("你好", max_new_tokens=4, stop=[marker, "另一个"]) == expected
    assert chat.stats and chat.stats.finish_reason == "stop"
    assert chat.format is before and chat.turns[-1].answer == expected
    assert chat.model.chat().ask("你好", max_new_tokens=4) == whole  # the next one is not stopped
    path = str(model.engine._folder)
    command = ["ask", "你好", "--model", path, "--context", "200", "--max-new-tokens", "4"]
    assert main([*command, "--stop", marker, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == expected
