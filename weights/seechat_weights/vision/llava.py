"""Reads what LLaVA's config.json says of vision, and finds its CLIP tower and projector.

Four published forms hold the same network. The original checkpoint has LM and projector, and names
a CLIP folder; if the tower was trained too, it holds the tower as well. A projector alone, and a
LoRA run with `non_lora_trainables.bin`, go over a base LM. The Hugging Face form holds everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import Opener, read_json
from seechat_weights.files.reading import shown
from seechat_weights.vision.bridge_names import bridge_prefix
from seechat_weights.vision.part import Section, Tensors

CONFIG = "config.json"
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
MARKS = ("<im_start>", "<im_end>")
# the tower's names in the original form, in a LoRA run, and in the two Hugging Face forms
TOWER_PREFIXES = (
    "model.vision_tower.vision_tower.",
    "base_model.model.model.vision_tower.vision_tower.",
    "model.vision_tower.",
    "vision_tower.",
)
_FEATURES = {"patch": False, "cls_patch": True, "default": False, "full": True}


@dataclass(frozen=True)
class LlavaSettings:
    """What LLaVA's configuration says of vision.

    file: the configuration.
    tower: the published name of the CLIP tower; empty if the checkpoint holds all of it.
    select_layer: which of the tower's hidden states is taken, see clip_names.map_clip.
    class_token: whether the class token's features are taken too.
    pad: whether pictures are made square first; else their centre is cut out.
    tuned: whether the tower was trained, so that the checkpoint's own counts.
    marks: the tokens around a picture.
    conversation: the format that its code speaks.
    """

    file: Path
    tower: str
    select_layer: int
    class_token: bool
    pad: bool
    tuned: bool
    marks: tuple[str, str]
    conversation: str


def llava_settings(folder: Path) -> LlavaSettings | None:
    """The settings in a folder's config.json; None if that is not LLaVA's.

    folder: a checkpoint's folder, or that of a projector.

    Raises CheckpointError for settings that are not supported.
    """
    file = folder / CONFIG
    config = read_json(file) if file.is_file() else {}
    if is_hugging_face(config):
        return _hugging_face(file, config)
    if not is_llava(config):
        return None
    tower = config["mm_vision_tower"]
    tower = tower[0] if isinstance(tower, list) and len(tower) == 1 else tower  # of early versions
    aspect = config.get("image_aspect_ratio")
    if aspect == "anyres" or not isinstance(tower, str) or config.get("mm_resampler_type"):
        raise CheckpointError(
            f"{file}: image_aspect_ratio {aspect!r:.80}, mm_vision_tower {tower!r:.80}, "
            f"mm_resampler_type {config.get('mm_resampler_type')!r:.80}; expected LLaVA 1 or 1.5, "
            "which show a picture as one square of one tower: take such a checkpoint"
        )
    marked = config.get("mm_use_im_start_end", False) is True
    return LlavaSettings(
        file=file,
        tower=tower,
        select_layer=_layer(file, config.get("mm_vision_select_layer", -2)),
        class_token=_feature(file, config.get("mm_vision_select_feature", "patch")),
        pad=aspect == "pad",
        tuned=config.get("unfreeze_mm_vision_tower") is True,
        marks=MARKS if marked else ("", ""),
        conversation=_conversation(f"{config.get('_name_or_path', '')} {folder.resolve().name}"),
    )


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is LLaVA's in its original form.

    config: a config.json.
    """
    return bool(config.get("mm_vision_tower"))


def is_hugging_face(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is LLaVA's in its Hugging Face form.

    config: a config.json.
    """
    return config.get("model_type") == "llava" and "vision_config" in config


def _hugging_face(file: Path, config: Mapping[str, Any]) -> LlavaSettings:
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{file}: projector_hidden_act is {config['projector_hidden_act']!r:.80}; expected "
            "'gelu', as in LLaVA 1.5: take such a checkpoint"
        )
    return LlavaSettings(
        file=file,
        tower="",
        select_layer=_layer(file, config.get("vision_feature_layer", -2)),
        class_token=_feature(file, config.get("vision_feature_select_strategy", "default")),
        pad=True,  # as it was trained; transformers' processor only crops unless it is told
        tuned=True,
        marks=("", ""),
        conversation="vicuna_v1",
    )


def _layer(file: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(
            f"{file}: the vision tower's features come from layer {value!r:.80}; expected one "
            "number, such as -2: take a checkpoint of LLaVA 1 or 1.5"
        )
    return value


def _feature(file: Path, value: Any) -> bool:
    if not isinstance(value, str) or value not in _FEATURES:
        raise CheckpointError(
            f"{file}: the vision tower's features are {value!r:.80}; expected one of "
            f"{', '.join(_FEATURES)}: take a checkpoint of LLaVA 1 or 1.5"
        )
    return _FEATURES[value]


def _conversation(names: str) -> str:
    """The format by a model's names, as LLaVA's own programs choose it."""
    names = names.lower()
    if "llama-2" in names or "llama2" in names:
        return "llava_llama_2"
    return "llava_v0" if "v0" in names else "vicuna_v1"


def find_tower(settings: LlavaSettings) -> Path | None:
    """The CLIP folder that a LLaVA configuration names, if it lies near it.

    settings: the configuration's.
    """
    name = Path(settings.tower)
    near = [name, Path(name.name)] if not name.is_absolute() else [Path(name.name)]
    for folder in (settings.file.parent, settings.file.resolve().parent.parent):
        for candidate in near:
            plain = candidate.name and ".." not in candidate.parts
            if plain and (folder / candidate / CONFIG).is_file():
                return folder / candidate
    return None


def is_openai(tower: str) -> bool:
    """Whether a tower is one of OpenAI's.

    tower: its name in a LLaVA configuration.
    """
    return Path(tower).name.startswith("clip-vit-") and "laion" not in tower.lower()


def published_at(tower: str) -> str:
    """Where a CLIP tower is published.

    tower: its name in a LLaVA configuration.
    """
    owner, _, name = tower.strip("/").rpartition("/")
    on_hub = owner and "/" not in owner and not tower.startswith("/")
    return f"https://huggingface.co/{shown(f'{owner}/{name}')}" if on_hub else "its publisher"


def find_section(sources: Sequence[Tensors], prefixes: Sequence[str]) -> Section | None:
    """The tensors under the first of some prefixes that a source has.

    sources: checkpoints, the first choice first.
    prefixes: prefixes of names.
    """
    for source in sources:
        for prefix in prefixes:
            if any(k.startswith(prefix) for k in source.shapes):
                return Section(source, prefix)
    return None


def find_projector(
    lm: Path,
    *,
    projector: Path | None,
    adapter: Path | None,
    opener: Opener,
) -> tuple[Tensors, str] | None:
    """The tensors that hold a LLaVA projector, and their path for errors.

    The file that is named counts before that of a LoRA run, and that before the LM's own.

    lm: the language model's folder or file.
    projector: a projector's file, or the folder of one.
    adapter: the folder of a LoRA run.
    opener: opens checkpoints.
    """
    if projector:
        file = projector / PROJECTOR_FILE if projector.is_dir() else projector
        file = file if file.exists() else projector
        return opener(file), str(file)
    if adapter and (adapter / NON_LORA_FILE).is_file():
        file = adapter / NON_LORA_FILE
        return opener(file), str(file)
    whole = opener(lm)
    prefix = bridge_prefix(whole.shapes)
    if not prefix:
        return None
    return Section(whole, prefix), str(lm)
