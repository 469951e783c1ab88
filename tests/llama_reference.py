"""Golden data of LLaVA, MiniGPT-4 and InstructBLIP, made by running the original code.

It is not part of the repository: it lies in the folder `llama` of the one that SEECHAT_REFERENCE
names (default: shared/reference beside the checkout), and tests of it are skipped where that is
absent. Nothing here knows a size: data of other models in the same layout passes as well.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from seechat_lite.conversation import Turn
from seechat_lite.images import levels, load_image, pixels
from seechat_weights.config import PixelSpec
from seechat_weights.vision.blip_names import BlipSettings
from seechat_weights.vision.weights import VisionFiles, VisionWeights, load_seechat

_BESIDE = Path(__file__).parents[1].parent / "shared" / "reference"
ROOT = Path(os.environ.get("SEECHAT_REFERENCE", _BESIDE)) / "llama"
LLAVA, MINIGPT4, INSTRUCTBLIP = (
    ROOT / "llava_tiny",
    ROOT / "minigpt4_tiny",
    ROOT / "instructblip_tiny",
)
LLAMA = ROOT / "llama_tiny"
needs_llama_reference = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no golden data in {ROOT}")


@dataclass(frozen=True)
class Published:
    """One published model: what an export is given.

    lm: the language model.
    vision: files of the vision network beside it.
    adapter: a LoRA.
    """

    lm: Path
    vision: VisionFiles = field(default_factory=VisionFiles)
    adapter: Path | None = None

    @property
    def as_named(self) -> bool:
        """Whether the files tell everything, so that naming them is enough."""
        return True

    def weights(self) -> VisionWeights:
        """The vision network."""
        found = self.vision.open(self.lm, adapter=self.adapter)
        assert found is not None
        return found


LLAVAS = {
    "llava_v1": Published(LLAVA / "llava_v1"),
    "llava_v15": Published(LLAVA / "llava_v15"),
    "llava_projector_only": Published(
        LLAMA / "vicuna_real_vocab",
        VisionFiles(projector=LLAVA / "llava_projector_only" / "mm_projector.bin"),
    ),
    "llava_lora": Published(LLAMA / "llama2", adapter=LLAVA / "llava_lora"),
    "hf_old": Published(LLAVA / "hf_old"),
    "hf_new": Published(LLAVA / "hf_new"),
}
# the folder with the recorded pixels of each
RECORDED_PIXELS = {
    "llava_v1": "llava_v1", "llava_v15": "llava_v15", "llava_lora": "llava_v15",
    "hf_old": "llava_v15", "hf_new": "llava_v15",
}  # fmt: skip


@functools.cache
def cases(path: str) -> Any:
    """A JSON file of the golden data.

    path: under ROOT.
    """
    return json.loads((ROOT / path).read_text("utf-8"))


@functools.cache
def arrays(path: str) -> Mapping[str, np.ndarray]:
    """The tensors of a file of the golden data; empty if there is no such file.

    path: under ROOT.
    """
    file = ROOT / path
    return load_file(file) if file.is_file() else {}


def picture(name: str) -> Path:
    return ROOT / "pictures" / name


def published_levels(name: str, spec: PixelSpec) -> np.ndarray:
    """A picture's levels as the original code makes them, uint8 [3, S, S]."""
    return levels(load_image(picture(name)).image, replace(spec, exact=True)).transpose(2, 0, 1)


def published_pixels(name: str, spec: PixelSpec) -> np.ndarray:
    """A picture's pixels as the original code makes them, float32 [1, 3, S, S]."""
    return pixels(load_image(picture(name)).image, replace(spec, exact=True))[None]


def blip_settings(sizes: Mapping[str, int]) -> BlipSettings:
    """What the tensors of EVA and Q-Former do not tell, from the golden data's own sizes."""
    return BlipSettings(blocks=sizes["depth"], heads=sizes["heads"], query_heads=sizes["qf_heads"])


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found.astype(np.float64) - expected).max())


def module_outputs(weights: VisionWeights, of: Callable[[Any, Any], Any], name: str) -> np.ndarray:
    """What a part of the torch network makes of a picture, without the batch's axis.

    of: takes the network and the pixels.
    """
    import torch

    from seechat_lite.nn.vision import streamed

    network = streamed(weights).loaded()
    given = torch.from_numpy(published_pixels(name, weights.config.pixels))
    with torch.inference_mode():
        return of(network, given)[0].numpy()


def llava_conversation(
    conversation: Mapping[str, Any],
) -> Iterator[tuple[list[Turn], dict[str, Any]]]:
    """The turns of a recorded conversation up to each question, and what was recorded of it.

    Pictures' keys are their files' names. The recorded questions hold "<image>" for each picture.
    """
    turns: list[Turn] = []
    shown = 0
    for turn in conversation["turns"]:
        question = turn["question"].replace("<im_start>", "").replace("<im_end>", "")
        count = question.count("<image>")
        images = tuple(turn["images"][shown : shown + count])
        shown += count
        question = question.replace("<image>\n", "").replace("<image>", "")
        yield [*turns, Turn(question, None, images)], turn
        turns.append(Turn(question, turn["answer_in_history"], images))


def minigpt4_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """MiniGPT-4's recorded conversations, each with the name of its format."""
    recorded = cases("minigpt4_tiny/cases.json")
    for case in (
        *recorded["vicuna"],
        *recorded["vicuna_real_vocab"]["cases"],
        *recorded["llama2"]["cases"],
    ):
        yield "minigpt4_llama2" if "[INST]" in case["roles"][0] else "minigpt4", case


# their pixels differ without `exact`: transparent, or turned by their metadata
OTHER_PIXELS = ("rgba.png", "exif6.jpg")


@dataclass(frozen=True)
class PublishedBlip(Published):
    """EVA ViT with a bridge; `sizes` is the golden data's own record of what no tensor tells."""

    sizes: tuple[str, str] | None = None

    @property
    def as_named(self) -> bool:
        return self.sizes is None

    def weights(self) -> VisionWeights:
        if self.sizes is None:
            return super().weights()
        file, key = self.sizes
        found = cases(file)
        return load_seechat(
            eva=self.vision.eva,
            qformer=self.vision.qformer,
            checkpoint=self.vision.checkpoint,
            wordpiece=self.vision.wordpiece,
            settings=blip_settings(found["sizes"][key] if "sizes" in found else found[key]),
        )


_EVA, _BLIP2 = MINIGPT4 / "eva_vit_tiny.pth", MINIGPT4 / "blip2_tiny_flant5.pth"
_TRIMMED = INSTRUCTBLIP / "instruct_blip_vicuna_tiny_trimmed.pth"
_MINIGPT4_SIZES = ("minigpt4_tiny/cases.json", "eva")
_INSTRUCTBLIP_SIZES = ("instructblip_tiny/cases.json", "eva")
_BERT = INSTRUCTBLIP / "bert_small" / "vocab.txt"
PUBLISHED: dict[str, Published] = {
    **LLAVAS,
    "minigpt4": PublishedBlip(
        MINIGPT4 / "vicuna",
        VisionFiles(eva=_EVA, qformer=_BLIP2, checkpoint=MINIGPT4 / "pretrained_minigpt4_tiny.pth"),
        sizes=_MINIGPT4_SIZES,
    ),
    "minigpt4_real_vocab": PublishedBlip(
        LLAMA / "vicuna_real_vocab",
        VisionFiles(
            eva=_EVA, qformer=_BLIP2, checkpoint=MINIGPT4 / "pretrained_minigpt4_real_vocab.pth"
        ),
        sizes=_MINIGPT4_SIZES,
    ),
    "minigpt4_llama2": PublishedBlip(
        LLAMA / "llama2",
        VisionFiles(eva=_EVA, checkpoint=MINIGPT4 / "pretrained_minigpt4_llama2_tiny.pth"),
        sizes=_MINIGPT4_SIZES,
    ),
    "instructblip": PublishedBlip(
        MINIGPT4 / "vicuna",
        VisionFiles(checkpoint=_TRIMMED, wordpiece=_BERT),
        sizes=_INSTRUCTBLIP_SIZES,
    ),
    "instructblip_real_vocab": PublishedBlip(
        LLAMA / "vicuna_real_vocab",
        VisionFiles(
            qformer=_TRIMMED,
            checkpoint=INSTRUCTBLIP / "llm_proj_real_vocab.pth",
            wordpiece=_BERT,
        ),
        sizes=_INSTRUCTBLIP_SIZES,
    ),
    "instructblip_hf": PublishedBlip(INSTRUCTBLIP / "hf"),
}
