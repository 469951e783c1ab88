"""Describes conversation formats as data, and writes a conversation in one of them.

Nothing here knows token ids. `render` returns pieces of text, each tokenized alone, and slots for
the embeddings of pictures. A new format needs a row in FORMATS and a golden test.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from seechat_lite.vicuna_example import VICUNA_EXAMPLE
from seechat_lite.written import Names, Text
from seechat_weights.errors import ContextError


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `images` are the keys (content hashes) of its pictures.

    `system` is what a format with a place for it tells the model before the question.
    """

    question: str
    answer: str | None = None
    images: tuple[str, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class ImageSlot:
    """The place of one picture in the text; all of its ids are `token_id`."""

    key: str
    token_id: int


@dataclass(frozen=True)
class Format:
    """How one family of models expects a conversation to be written.

    turn: a turn's text around {images}, {question} and {answer}; {round} counts turns from 0. A
        format without {images} takes no pictures. {system} is the place of a system's text.
    first: the text of the first turn, if it differs: with what the model is told of itself.
    answered: the text before an answer; a turn that waits for its answer is without it.
    image: the text around each picture.
    after_images: the text between a turn's pictures and its question.
    marks: whether a model's own tokens around pictures are written, see with_marks().
    image_token_id: the id under a picture's embeddings (the repetition penalty sees it).
    single: the text of a conversation of one turn, if it differs.
    stop: text that ends an answer, besides the end-of-answer token.
    ends: names of tokens that end an answer as well, whatever the model's configuration says.
    system: the text around a system's text, {system}. Without it, that text stands in the question.
    told: what the system says if nobody says anything for it.
    specials: whether names of special tokens become tokens in what people write, as in the
        published code; otherwise they stay text there, and only the format's own become tokens.
    trim: whether blanks around questions and answers are removed, see trimmed(). The published
        codes leave them in, so their formats do too.
    clean: cleans an answer before it is shown or enters the history.
    holdback: how many characters at the end of a cleaned text the following text may still change,
        so that an answer can be shown as it grows; None if any of it may change until the end.
    drops_empty: whether an empty answer is left out with all text around it, as in the published
        code of some models.
    remembers: whether earlier turns are written. If not, only their pictures are.
    begins: whether the ids with which the model's prompts begin stand before all text.
    penalizes_prompt: whether the repetition penalty counts the prompt as said. The published code
        of models whose prompts are embeddings counts only the answer, after the first token.
    cut: tokens of prompt and answer together beyond which the prompt loses its beginning, wherever
        that is, as in the published code of some models; 0: the oldest turns are left out whole.
    exact: whether pictures become pixels as in the published code, see PixelSpec.exact.
    demo: write the history as SEEChat's published demo does, see _render_demo.
    instructions: whether a system's texts are written, before the question that follows. A model
        that was not trained with them answers something else.
    describe: the question of a picture without one, in Chinese and in English.
    """

    name: str
    turn: str
    image: tuple[str, str] = ("", "")
    after_images: str = ""
    image_token_id: int = 0
    single: str | None = None
    first: str | None = None
    answered: str = ""
    marks: bool = False
    stop: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    system: str = ""
    told: str = ""
    specials: bool = False
    trim: bool = False
    clean: Callable[[str], str] = str.strip
    holdback: int | None = 0
    drops_empty: bool = False
    remembers: bool = True
    begins: bool = True
    penalizes_prompt: bool = True
    cut: int = 0
    exact: bool = False
    demo: bool = False
    instructions: bool = True
    describe: tuple[str, str] = ("描述这张图片。", "Describe this picture.")


# White space of every script, control characters, and characters without width: joiners, marks of
# direction, byte order marks, blank letters
_BLANKS = "".join(
    chr(c)
    for c in (
        *(*range(0x21), *range(0x7F, 0xA1), 0xAD, 0x61C, 0x115F, 0x1160, 0x1680, 0x180E),
        *(*range(0x2000, 0x2010), *range(0x2028, 0x2030), *range(0x205F, 0x2070)),
        *(0x2800, 0x3000, 0x3164, 0xFEFF, 0xFFA0, 0xFFF9, 0xFFFA, 0xFFFB),
    )
)


def trimmed(text: str) -> str:
    """Remove invisible characters around a text; text boxes, files and shells leave them.

    text: the text.
    """
    return text.strip(_BLANKS)


def with_marks(format: Format, marks: tuple[str, str]) -> Format:
    """The format for a model that was trained to see tokens of its own around pictures.

    format: the format.
    marks: the tokens, such as "<im_start>" and "<im_end>"; empty texts for none.
    """
    if not format.marks:
        return format
    (before, after), (begin, end) = format.image, marks
    return replace(format, image=(before + begin, end + after))


def description_question(format: Format, said: Iterable[str] = ()) -> str:
    """The question of a picture without one, in the language spoken before; by default Chinese.

    format: the conversation format.
    said: texts that were said before.
    """
    letter, han = letters(said)
    chinese, english = format.describe
    return english if letter and not han else chinese


def letters(texts: Iterable[str]) -> tuple[str, str]:
    """A Latin letter and a Chinese character of some texts, each "" if there is none.

    They tell as much of the language that is spoken as the texts themselves.

    texts: the texts.
    """
    letter = han = ""
    for text in texts:
        letter = letter or _first(_LATIN, text)
        han = han or _first(_HAN, text)
    return letter, han


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[0] if found else ""


def render(format: Format, turns: Sequence[Turn]) -> list[str | ImageSlot]:
    """The segments of the prompt for a conversation: texts and slots of pictures.

    format: the conversation format.
    turns: the turns; all but the last have an answer.

    Raises ContextError if they do not, or if the format has no place for their pictures.
    """
    if not turns or turns[-1].answer is not None or any(t.answer is None for t in turns[:-1]):
        raise ContextError(
            "conversation: expected every turn but the last to be answered: "
            "append past turns with their answers and leave the question to be asked last"
        )
    if format.demo:
        return _render_demo(format, turns)
    if "{images}" not in format.turn and any(t.images for t in turns):
        takers = ", ".join(f.name for f in FORMATS.values() if "{images}" in f.turn)
        raise ContextError(
            f"conversation format {format.name!r} has no place for pictures; a turn has one: "
            f"ask without a picture or use a format that takes them ({takers})"
        )
    usual = format.single if format.single and len(turns) == 1 else format.turn
    segments = _Segments()
    written = trimmed if format.trim else str
    if not format.remembers:
        shown = tuple(dict.fromkeys(key for turn in turns for key in turn.images))
        turns = [replace(turns[-1], images=shown)]
    for i, turn in enumerate(turns):
        template = format.first if format.first and not i else usual
        before_answer, after_answer = template.replace("{round}", str(i)).split("{answer}")
        before_images, images, before_answer = before_answer.rpartition("{images}")
        before_system, system, before_images = before_images.rpartition("{system}")
        segments.text(before_system)
        if system:
            _system(segments, format, turn.system or ("" if i else format.told))
        segments.text(before_images)
        if images and turn.images:
            for key in turn.images:
                segments.image(format, key)
            segments.text(format.after_images if turn.question else "")
        before_question, question, after_question = before_answer.partition("{question}")
        segments.text(before_question)
        segments.text(written(turn.question) if question else "", Names.NONE)
        segments.text(after_question)
        if turn.answer or (turn.answer is not None and not format.drops_empty):
            segments.text(format.answered)
            segments.text(written(turn.answer), Names.SAID)
            segments.text(after_answer)
    return segments.items


def _system(segments: "_Segments", format: Format, text: str) -> None:
    """Write a system's text with what stands around it; nothing if there is none."""
    if text:
        before, after = format.system.split("{system}")
        segments.text(before)
        segments.text(trimmed(text) if format.trim else text, Names.NONE)
        segments.text(after)


class _Segments:
    """Collects segments. Text between pictures is joined: it is tokenized as one piece."""

    def __init__(self) -> None:
        self._done: list[str | ImageSlot] = []
        self._texts: list[tuple[str, Names]] = []  # since the last picture

    @property
    def items(self) -> list[str | ImageSlot]:
        text = Text(self._texts)
        return [*self._done, text] if text else self._done

    def text(self, text: str, names: Names = Names.ALL) -> None:
        if text:
            self._texts.append((text, names))

    def image(self, format: Format, key: str) -> None:
        before, after = format.image
        self.text(before)
        self._done = [*self.items, ImageSlot(key, format.image_token_id)]
        self._texts = [(after, Names.ALL)] if after else []


_DEMO_MAX_CHARS = 2000


def _render_demo(format: Format, turns: Sequence[Turn]) -> list[str | ImageSlot]:
    """The prompt as SEEChat's demo_stage2.py writes it, with its oddities.

    The first question is always 详细描述这张图片, whatever was asked. If the text after the
    picture would exceed 2000 characters, that first question silently replaces the question, and
    the history is forgotten. The later history still records the question that was asked.
    """
    if len(turns[0].images) != 1 or any(t.images for t in turns[1:]):
        raise ContextError(
            f"conversation format {format.name!r} is the published demo's; expected exactly one "
            "picture, with the first question: use the format 'seechat' for anything else"
        )
    first = "</Img> 详细描述这张图片 ###Assistant: "
    after = history = first
    for i, turn in enumerate(turns):
        if i:
            asked = f"###Human: {turn.question} ###Assistant: "
            after = history + asked
            if len(after) > _DEMO_MAX_CHARS:
                after = history = first
            history += asked
        history += turn.answer or ""
    return ["###Human: <Img>", ImageSlot(turns[0].images[0], format.image_token_id), after]


def postprocess(format: Format, text: str) -> str:
    """A finished answer as it is shown and enters the history.

    format: the conversation format.
    text: the decoded ids.
    """
    for marker in format.stop:
        text = text.split(marker, 1)[0]
    return format.clean(text)


class CleanStream:
    """Cleans the text of a growing answer as the format wants it, piece by piece.

    The pieces joined equal postprocess(format, all text). Every piece cleans the whole text again:
    for answers of a few hundred tokens this costs far less than one step.

    format: the conversation format.
    """

    def __init__(self, format: Format) -> None:
        self._format = format
        self._text = ""
        self._shown = 0

    @property
    def shown(self) -> str:
        """All pieces so far, joined."""
        return postprocess(self._format, self._text)[: self._shown]

    def push(self, text: str) -> str:
        """Take more text; returns the part that can no longer change.

        text: the next text of the answer.
        """
        holdback = self._format.holdback
        self._text += text
        if holdback is None or not text:
            return ""
        clean = postprocess(self._format, self._text)
        return self._show(clean, max(len(clean) - holdback, self._shown))

    def finish(self) -> str:
        """The rest of the cleaned answer."""
        clean = postprocess(self._format, self._text)
        return self._show(clean, len(clean))

    def _show(self, clean: str, end: int) -> str:
        piece, self._shown = clean[self._shown : end], end
        return piece


_TRAINING_TIME = "[[训练时间]]"
_CHATGLM_HOLDBACK = len(_TRAINING_TIME) - 1  # all of it but the last character may be there already
_HAN, _LATIN = "[\u4e00-\u9fff]", "[A-Za-z]"
_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}


def _clean_chatglm(text: str) -> str:
    """ChatGLM-6B's process_response: punctuation beside a Chinese character becomes full-width."""
    text = text.strip().replace(_TRAINING_TIME, "2023年")
    for half, full in _FULL_WIDTH.items():
        text = re.sub(f"(?<={_HAN}){re.escape(half)}", full, text)
        text = re.sub(f"{re.escape(half)}(?={_HAN})", full, text)
    return text


def _clean_demo(text: str) -> str:
    """Clean as demo_stage2.py does; it removes every space, so English and code suffer."""
    text = text.replace(",", "，")
    for remove in ("Human:", "<Img>", "</Img>", " "):
        text = text.replace(remove, "")
    answer = text.split("###", 1)[0].split("Assistant:")[-1].strip()
    return answer or text.replace("###", "").replace("Assistant:", "").strip()


def _clean_minigpt4(text: str) -> str:
    """Clean as MiniGPT-4's demo does: what comes before "Assistant:" is thrown away."""
    return text.split("Assistant:")[-1].strip()


_DESCRIBE = "Describe the image in detail."
_CHAT_OF_USER, _CHAT_OF_HUMAN = (
    f"A chat between a curious {who} and an artificial intelligence assistant. The assistant "
    f"gives helpful, detailed, and polite answers to the {who}'s questions."
    for who in ("user", "human")
)
_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_LLAVA: dict[str, Any] = {
    "answered": " ",
    "image": ("", "\n"),
    "marks": True,
    "drops_empty": True,
    "penalizes_prompt": False,
    "describe": ("描述这张图片。", "Describe the image in detail."),
}
# text models that talk; pictures stand in their questions as in LLaVA's
_TALK: dict[str, Any] = {"image": ("", "\n"), "marks": True}
_CHATML: dict[str, Any] = _TALK | {
    "turn": "{system}<|im_start|>user\n{images}{question}<|im_end|>\n"
    "<|im_start|>assistant\n{answer}<|im_end|>\n",
    "system": "<|im_start|>system\n{system}<|im_end|>\n",
    "ends": ("<|im_end|>",),
}
_IMAGE_COMES = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions."
)
_MINIGPT4: dict[str, Any] = {
    "first": _IMAGE_COMES + "###Human: {images}{question}###Assistant: {answer}###",
    "turn": "Human: {images}{question}###Assistant: {answer}###",
    "image": ("<Img>", "</Img>"),
    "after_images": " ",
    "drops_empty": True,
    "penalizes_prompt": False,
    "stop": ("###",),
    "describe": (_DESCRIBE, _DESCRIBE),
}
_MINIGPT4_LLAMA2: dict[str, Any] = _MINIGPT4 | {
    "first": _IMAGE_COMES + "<s>[INST] {images}{question} [/INST] {answer}",
    "turn": "<s>[INST] {images}{question} [/INST] {answer}",
}
_MINIGPT4_DEMO: dict[str, Any] = {
    "clean": _clean_minigpt4,
    "holdback": None,
    "exact": True,
    "specials": True,
    "cut": 2000,
}

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        # SEEChat's prompt with the user's own questions and pictures in any turn, or none
        Format(
            name="seechat",
            turn="###Human: {images}{question} ###Assistant: {answer}",
            image=("<Img>", "</Img>"),
            after_images=" ",
            stop=("###",),
            trim=True,
        ),
        # for models that were trained on questions alone
        Format(
            name="seechat-plain",
            turn="###Human: {images}{question} ###Assistant: {answer}",
            image=("<Img>", "</Img>"),
            after_images=" ",
            stop=("###",),
            trim=True,
            instructions=False,
        ),
        Format(
            name="seechat-compat",
            turn="###Human: {images}{question} ###Assistant: {answer}",
            image=("<Img>", "</Img>"),
            after_images=" ",
            specials=True,
            clean=_clean_demo,
            holdback=None,
            exact=True,
            demo=True,
            describe=(
                "详细描述这张图片",
                "详细描述这张图片",
            ),  # the demo asks this of every picture
        ),
        Format(
            name="chatglm",
            turn="[Round {round}]\n问：{question}\n答：{answer}\n",
            single="{question}{answer}",
            specials=True,
            clean=_clean_chatglm,
            holdback=_CHATGLM_HOLDBACK,
        ),
        # as its Hugging Face code writes it; the ids under the picture are <unk>
        Format(
            name="visualglm",
            turn="{images}问：{question}\n答：{answer}\n",
            image=("<img>", "</img>"),
            specials=True,
            clean=_clean_chatglm,
            holdback=_CHATGLM_HOLDBACK,
        ),
        # LLaVA's, as its published code names them
        Format(
            name="vicuna_v1",
            first=_CHAT_OF_USER + " USER: {images}{question} ASSISTANT:{answer}</s>",
            turn="USER: {images}{question} ASSISTANT:{answer}</s>",
            **_LLAVA,
        ),
        Format(
            name="llava_v1",
            first=_CHAT_OF_HUMAN + " USER: {images}{question} ASSISTANT:{answer}</s>",
            turn="USER: {images}{question} ASSISTANT:{answer}</s>",
            **_LLAVA,
        ),
        Format(
            name="llava_v0",
            first=_CHAT_OF_HUMAN + "###Human: {images}{question}###Assistant:{answer}###",
            turn="Human: {images}{question}###Assistant:{answer}###",
            stop=("###",),
            **_LLAVA,
        ),
        Format(  # the same after a long example of a conversation
            name="v0",
            first=_CHAT_OF_HUMAN
            + VICUNA_EXAMPLE
            + "###Human: {images}{question}###Assistant:{answer}###",
            turn="Human: {images}{question}###Assistant:{answer}###",
            stop=("###",),
            **_LLAVA,
        ),
        Format(
            name="llava_llama_2",
            first=f"[INST] <<SYS>>\n{_HELPFUL}\n<</SYS>>\n\n{{images}}{{question}} [/INST]"
            "{answer} </s>",
            turn="<s>[INST] {images}{question} [/INST]{answer} </s>",
            **_LLAVA,
        ),
        Format(  # what LLaVA's projectors are first trained with: captions, without questions
            name="plain",
            turn="{images}{question}\n{answer}\n",
            after_images="\n",
            marks=True,
            stop=("\n",),
            drops_empty=True,
            instructions=False,
            penalizes_prompt=False,
            describe=("", ""),
        ),
        # chat templates of text models
        Format(name="chatml", **_CHATML),
        Format(
            name="smollm2",
            told="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            **_CHATML,
        ),
        Format(
            name="llama_3",
            turn="{system}<|start_header_id|>user<|end_header_id|>\n\n{images}{question}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>",
            system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
            ends=("<|eot_id|>", "<|end_of_text|>"),
            trim=True,
            **_TALK,
        ),
        Format(
            name="llama_2",
            first="[INST] {system}{images}{question} [/INST]{answer} </s>",
            turn="<s>[INST] {system}{images}{question} [/INST]{answer} </s>",
            system="<<SYS>>\n{system}\n<</SYS>>\n\n",
            answered=" ",
            trim=True,
            **_TALK,
        ),
        # MiniGPT-4's two, with sensible pixels and answers that are shown as they grow
        Format(name="minigpt4", **_MINIGPT4),
        Format(name="minigpt4_llama2", **_MINIGPT4_LLAMA2),
        # and as its demo does it: only the text behind the last "Assistant:" is the answer, and
        # names of special tokens in a question are these tokens
        Format(name="minigpt4-compat", **_MINIGPT4 | _MINIGPT4_DEMO),
        Format(name="minigpt4_llama2-compat", **_MINIGPT4_LLAMA2 | _MINIGPT4_DEMO),
        # the picture's embeddings depend on the question, so no earlier turn is written
        Format(
            name="instructblip",
            turn="{images}</s>{question}{answer}",
            instructions=False,
            remembers=False,
            begins=False,
            penalizes_prompt=False,
            describe=(_DESCRIBE, _DESCRIBE),
        ),
    )
}
