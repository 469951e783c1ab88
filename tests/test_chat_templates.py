"""Formats of text models' chat templates, against transformers' apply_chat_template."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import byte_level
import seechat_lite as sl
from reference import data
from seechat_lite.conversation import FORMATS, Turn, render
from seechat_lite.json_tokenizer import JsonTokenizer
from seechat_lite.llama_tokenizer import LlamaTokenizer
from seechat_lite.messages import read_messages
from seechat_lite.prompt import build
from seechat_lite.tokenizers import TextTokenizer
from seechat_weights.errors import CheckpointError
from seechat_weights.lm.tokenizers import template_format

# as their publishers wrote them, in tokenizer_config.json
TEMPLATES = {
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
    "%}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama_3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content "
    "= '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "llama_2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if "
    "loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message "
    "+ '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + "
    "eos_token }}{% endif %}{% endfor %}",
    # FastChat's conversation template of the same name, in a template's words
    "vicuna_v1": "{{ bos_token + 'A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s "
    "questions. ' }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + message['content'] + "
    "eos_token }}{% endif %}{% endfor %}{{ 'ASSISTANT:' }}",
}
KIND = {"smollm2": "smollm2", "chatml": "qwen2", "llama_3": "llama3"}
DIALOGUES = {
    "one question": [("user", "What is this?")],
    "turns": [
        ("user", "图里有什么？\n请简短。"),
        ("assistant", "A cat, on a mat."),
        ("user", "It's 12 345 old?  Two  spaces."),
        ("assistant", "é 🐼\n\n- list"),
        ("user", "ok"),
    ],
    "system": [("system", "You are terse."), ("user", "Who are you?")],
    "system and turns": [
        ("system", "Answer in Chinese.\nAlways."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ],
    "system in the middle": [
        ("user", "a"),
        ("assistant", "b"),
        ("system", "Now in English."),
        ("user", "c"),
    ],
}


def tokenizers(name: str, folder: Path) -> tuple[TextTokenizer, Any]:
    """Ours, and transformers' with the template."""
    from transformers import PreTrainedTokenizerFast

    kind = KIND.get(name, "smollm2")
    path = byte_level.make(kind, folder / "tokenizer.json")
    said = byte_level.KINDS[kind]
    names = {"bos_token": said["begin"] or None, "eos_token": said["end"]}
    ours: TextTokenizer = JsonTokenizer(path, eos_id=0)
    if name not in KIND:  # transformers has no longer the tokenizer of these, only its template
        ours, names = (
            LlamaTokenizer(data("llama/tokenizer.model"), legacy=True),
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
            },
        )
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), **names)
    theirs.chat_template = TEMPLATES[name]
    return ours, theirs


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_template(name: str, dialogue: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    format = FORMATS[name]
    said = DIALOGUES[dialogue]
    if dialogue.startswith("system") and not format.system:
        pytest.skip("FastChat's format has a system text of its own")
    if dialogue == "system in the middle" and name == "llama_2":
        pytest.skip("the template refuses it")
    ours, theirs = tokenizers(name, tmp_path)
    messages = [{"role": role, "content": content} for role, content in said]
    found = read_messages(messages, format=format)
    turns = [Turn(e.question(), e.answer(), system=e.system()) for e in found.past]
    turns.append(Turn(found.question.question(), system=found.question.system()))
    prompt = build(ours, render(format, turns), {}, specials=format.specials)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written = "".join(str(s) for s in render(format, turns))
    begin = theirs.bos_token if ours.prompt_begin else ""
    assert begin + written == text
    if name in KIND:
        assert prompt.ids == theirs.encode(text, add_special_tokens=False)
    else:  # the slow tokenizer that these models have, recorded in test_llama_tokenizer.py
        assert prompt.ids == ours.encode(text)
    ends = [ours.encode(end) for end in format.ends]
    assert all(len(ids) == 1 for ids in ends)


@pytest.mark.parametrize("form", ["a text", "a list", "a file"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_its_format(name: str, form: str, tmp_path: Path) -> None:
    import json

    file = tmp_path / "tokenizer.json"
    assert template_format(file) is None
    template: Any = TEMPLATES[name]
    if form == "a list":
        template = [{"name": "tool_use", "template": ""}, {"name": "default", "template": template}]
    if form == "a file":
        (tmp_path / "chat_template.jinja").write_text(template, "utf-8")
        template = 7
    settings = json.dumps({"chat_template": template})
    (tmp_path / "tokenizer_config.json").write_text(settings, "utf-8")
    assert template_format(file) == (None if name == "vicuna_v1" else name)


def test_a_template_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match="expected"):
        template_format(tmp_path / "tokenizer.json")


@pytest.fixture(scope="module")
def model() -> Any:
    with sl.load() as model:
        yield model


def test_a_chat_tells_the_model_what_the_system_says(model: sl.Model) -> None:
    tokenizer = model.tokenizer

    def text(chat: sl.Chat) -> str:
        return tokenizer.decode(chat.prompt("c").ids)

    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "a"}]
    messages += [{"role": "assistant", "content": "b"}]
    whole = "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n"
    first = f"{whole}a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc"
    assert text(model.chat("chatml", messages=messages)).startswith(first)
    alone = model.chat("chatml", messages=messages[:1])  # before any question
    assert text(alone).startswith(f"{whole}c")
    by_hand = model.chat("smollm2")
    assert "named SmolLM" in text(by_hand)
    by_hand.instruct("Be terse.")
    assert text(by_hand).startswith(f"{whole}c")
    by_hand.append("a", "b")
    assert text(by_hand).startswith(first)
    by_hand.instruct("Later.")
    assert "<|im_start|>system\nLater.<|im_end|>\n<|im_start|>user\nc" in text(by_hand)
    by_hand.ask("c", max_new_tokens=1)
    assert by_hand.turns[-1].system == "Later." and by_hand.turns[0].system == "Be terse."
    by_hand.clear()
    assert "terse" not in text(by_hand)
    with pytest.raises(sl.OptionError, match="no place for a system's text; expected one of"):
        model.chat("seechat").instruct("x")


def test_a_format_s_own_token_ends_an_answer(model: sl.Model) -> None:
    """Whatever the model's configuration says."""
    asked: dict[str, Any] = {"max_new_tokens": 8}
    chat = model.chat()
    prompt = chat.prompt("你好")
    ids = [int(model.engine.prefill(prompt).argmax())]
    ids.append(int(model.engine.step(ids[0]).argmax()))
    model.engine.reset()
    # a tokenizer that has the second token of the answer under a name
    names = {"<end>": [ids[1]], "<none>": [1, 2]}
    encode = model.tokenizer.encode
    model.tokenizer.encode = lambda text, **given: names.get(text) or encode(text, **given)
    try:
        chat.format = replace(chat.format, ends=tuple(names))
        answer = chat.ask("你好", **asked)
    finally:
        del model.tokenizer.encode
    assert answer.stats.new_tokens == 1 and answer.stats.finish_reason == "stop"
