"""Recognizes each published model by its tensors; says what it still needs and how to use it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import TensorInfo
from seechat_weights.files.reading import first_bytes, read_json, shown
from seechat_weights.lm import llama
from seechat_weights.lm.families import LM_FAMILIES
from seechat_weights.lm.lora import ADAPTER_CONFIG
from seechat_weights.model_files import CONFIG, TOKENIZER, find_model, model_place
from seechat_weights.scorer.names import is_scorer
from seechat_weights.vision.bridge_names import bridge_names
from seechat_weights.vision.clip_names import CLIP_FORMS, clip_library
from seechat_weights.vision.llava import (
    NON_LORA_FILE,
    find_tower,
    is_llava,
    is_openai,
    llava_settings,
    published_at,
)
from seechat_weights.vision.network import BRIDGE_TENSORS
from seechat_weights.vision.weights import LICENCES, find_vocabulary
from seechat_weights.wordpiece import BERT_HUB, CHINESE_CLIP_PLACE
from seechat_weights.wordpiece import FILE as WORDS

CHATGLM_HUB = "https://huggingface.co/THUDM/chatglm-6b"
VISUALGLM_HUB = "https://huggingface.co/THUDM/visualglm-6b"
_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
EVA, QFORMER, CHECKPOINT = (
    "eva_vit_g.pth",
    "blip2_pretrained_flant5xxl.pth",
    "checkpoint_100.pth",
)
INSTRUCTBLIP = "instruct_blip_vicuna7b_trimmed.pth"
PLACES = {
    EVA: f"{_LAVIS}/{EVA}",
    QFORMER: f"{_LAVIS}/{QFORMER}",
    CHECKPOINT: "https://pan.baidu.com/s/18-_f_O5a-W1dJBWsbpmAGw (code qiho)",
    "a ChatGLM-6B folder": CHATGLM_HUB,
    "a LLaMA folder": "the model that its adapter_config.json names",
    INSTRUCTBLIP: f"{_LAVIS.removesuffix('BLIP2')}InstructBLIP/{INSTRUCTBLIP}",
    "a Vicuna folder": "https://huggingface.co/Vision-CAIR/vicuna-7b",
    "a Vicuna 1.1 folder": "https://huggingface.co/lmsys/vicuna-7b-v1.1",
    "a Llama 2 folder": "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf",
    WORDS: BERT_HUB,
    "a CLIP ViT-L/14": "https://huggingface.co/openai/clip-vit-large-patch14",
    "a projector": "the training run that made it; SEEChat publishes none for CLIP",
}
_CLIP_LIBRARIES = {
    "openai": "OpenAI's own file",
    "open_clip": "open_clip",
    "huggingface": "Hugging Face",
}
_OLD_VOCABULARY = 150528

Shapes = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Identity:
    """What a path holds.

    path: the file or folder.
    kind: one word for programs.
    title: a line for people.
    facts: name -> value, in the order to show.
    missing: what else is needed -> where it is published.
    options: what an export that uses it is given, by argument: a path, or the name of what is still
        needed; of a bundle, the "model" to load.
    usable: whether seechat-lite can read it at all.
    runs: whether without an export.
    """

    path: Path
    kind: str
    title: str
    facts: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    options: Mapping[str, Path | str] = field(default_factory=dict)
    usable: bool = True
    runs: bool = False


def _lm(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> Identity | None:
    """Recognizes ChatGLM-6B and VisualGLM-6B, as Hugging Face folders or SAT's file."""
    sat = "mixins.chatglm-final.lm_head.weight" in shapes
    embeddings = shapes.get("transformer.word_embeddings.weight")
    if embeddings is None or "transformer.layers.0.attention.query_key_value.weight" not in shapes:
        return None
    layers = _layers(shapes, r"transformer\.layers\.(\d+)\.")
    hidden = _size(shapes.get("transformer.layers.0.input_layernorm.weight"), 0)
    seeing = any(k.startswith(("image_encoder.", "mixins.eva.")) for k in shapes)
    family = "VisualGLM-6B" if seeing else "ChatGLM-6B"
    vocabulary = _size(embeddings, 0)
    old = vocabulary == _OLD_VOCABULARY
    facts = {
        "language model": f"{layers} layers, hidden {hidden}",
        "vocabulary": f"{vocabulary} ids" + (", the old one with image tokens" if old else ""),
        "precision": _precision(shapes, hidden),
        "vision": "EVA ViT-g + Q-Former" if seeing else "none",
    }
    if any(".matrix_A." in k or ".lora_A." in k for k in shapes):
        facts["fine-tuned"] = "LoRA, merged at export"
    prefix = next((v for k, v in shapes.items() if "prefix_encoder.embedding.weight" in k), None)
    if prefix:
        facts["fine-tuned"] = f"P-tuning, a prefix of {_size(prefix, 0)} tokens"
    where = path if sat else model_place(path)
    try:
        files = find_model(where)
    except CheckpointError:
        files = None
    missing = {}
    quantized = re.match(r"int[48]", facts["precision"])
    form = f"-{quantized[0]}{'-qe' * ('(qe)' in facts['precision'])}" if quantized else ""
    hub = VISUALGLM_HUB if seeing else CHATGLM_HUB + form
    if not sat and not (files and files.config):
        missing[CONFIG] = hub
    if not (files and whole(files.tokenizer(TOKENIZER))):
        missing[TOKENIZER] = hub
    title = f"{family}, SwissArmyTransformer's file" if sat else family
    kind = "visualglm" if seeing else "chatglm"
    beside = TOKENIZER if TOKENIZER in missing else None
    options = export(lm=where, tokenizer=beside)
    return Identity(path, kind, title, facts, missing, options, runs=not missing)


def _precision(shapes: Mapping[str, TensorInfo], hidden: int) -> str:
    name = "transformer.layers.0.attention.query_key_value.weight"
    weight = shapes[name]
    if f"{name}_scale" not in shapes:
        return weight.dtype
    bits = 8 if _size(weight, 1) == hidden else 4
    quantized = "transformer.word_embeddings.weight_scale" in shapes
    return f"int{bits}, the authors' own" + (", embeddings too (qe)" if quantized else "")


def _ptuning(path: Path, shapes: Shapes, _: object) -> Identity | None:
    prefix = [k for k in shapes if k.startswith(("transformer.prefix_encoder.", "prefix_encoder."))]
    if not prefix or len(prefix) < len(shapes):
        return None
    table = next((shapes[k] for k in prefix if k.endswith("embedding.weight")), None)
    projected = any(".trans." in k for k in prefix)
    facts = {"prefix": f"{_size(table, 0)} tokens" + (", with projection" if projected else "")}
    return Identity(
        path,
        "ptuning",
        "a P-tuning prefix for ChatGLM-6B",
        facts,
        need("a ChatGLM-6B folder"),
        export(prefix=path),
    )


def _lora(path: Path, shapes: Shapes, _: object) -> Identity | None:
    tuned = [k for k in shapes if ".lora_A." in k]
    if not tuned or not all(k.startswith("base_model.model.") for k in shapes):
        return None
    folder = path if path.is_dir() else path.parent
    facts = {"adapter": f"LoRA of rank {_size(shapes[tuned[0]], 0)} on {len(tuned)} linears"}
    chatglm = any(re.search(r"\.transformer\.layers\.\d+\.(attention|mlp)\.", k) for k in tuned)
    if not chatglm and (folder / NON_LORA_FILE).is_file():
        return _llava_lora(folder, facts)
    if not chatglm and not any(re.search(r"\.layers\.\d+\.(self_attn|mlp)\.", k) for k in tuned):
        return Identity(path, "other", "a LoRA adapter of another model", facts, usable=False)
    base = "a ChatGLM-6B folder" if chatglm else "a LLaMA folder"
    missing = need(base)
    if not (folder / "adapter_config.json").is_file():
        missing["adapter_config.json"] = "the training run that made it"
    options = export(lm=None if chatglm else "LLAMA", adapter=path)
    title = f"a LoRA adapter for {'ChatGLM-6B' if chatglm else 'a LLaMA'}"
    return Identity(path, "lora", title, facts, missing, options)


def _llava_lora(folder: Path, facts: Mapping[str, str]) -> Identity:
    """Describe a LoRA run of LLaVA: an adapter with a projector beside it."""
    said = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    base = said.get("base_model_name_or_path")
    missing = {"a LLaMA folder": _hub_of(base) or PLACES["a LLaMA folder"]}
    if not said:
        missing[ADAPTER_CONFIG] = "the training run that made it"
    tower, lacking, clip = _clip_of(folder)
    own = {"projector": NON_LORA_FILE, "vision": tower}
    options = export(lm="LLAMA", adapter=folder, clip=clip)
    title = "a LoRA run of LLaVA"
    return Identity(folder, "lora", title, {**facts, **own}, missing | lacking, options)


def _clip_of(folder: Path) -> tuple[str, dict[str, str], str | None]:
    """The CLIP tower of a LLaVA's configuration, for people; what is missing; what to name."""
    try:
        settings = llava_settings(folder)
    except CheckpointError as e:
        return f"cannot be used: {e}", {}, None
    if settings is None:
        return "a CLIP tower", need("a CLIP ViT-L/14"), "CLIP"
    if not settings.tower:
        return "CLIP, in the checkpoint", {}, None
    name = f"CLIP ({shown(settings.tower)}{', tuned' if settings.tuned else ''})"
    if find_tower(settings) or (settings.tuned and is_openai(settings.tower)):
        return name, {}, None
    return name, {shown(settings.tower): published_at(settings.tower)}, shown(settings.tower)


def _hub_of(name: object) -> str | None:
    """Where a model is published on the Hub, if its name can be an id there."""
    known = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name)
    return f"https://huggingface.co/{name}" if known else None


def _instructblip(path: Path, shapes: Shapes, _: object) -> Identity | None:
    """Recognizes InstructBLIP's file as LAVIS publishes it, or its projector alone."""
    if "llm_proj.weight" not in shapes:
        return None
    whole_one = any(k.startswith("visual_encoder.") for k in shapes)
    width = _size(shapes["llm_proj.weight"], 0)
    facts = {
        "vision": "EVA ViT-g + Q-Former that reads the question" if whole_one else "the projector",
        "language model": f"a Vicuna 1.1 of hidden size {width}, in a folder of its own",
        "licence": LICENCES["instructblip"],
    }
    missing = need("a Vicuna 1.1 folder", *(() if whole_one else (INSTRUCTBLIP,)))
    try:
        find_vocabulary(None, [path])
        words = None
    except CheckpointError:
        missing |= need(WORDS)
        words = WORDS
    rest = None if whole_one else INSTRUCTBLIP
    options = export(lm="VICUNA", qformer=rest, checkpoint=path, wordpiece=words)
    return Identity(path, "instructblip", "InstructBLIP", facts, missing, options)


def _minigpt4(path: Path, shapes: Shapes, _: object) -> Identity | None:
    """Recognizes MiniGPT-4's checkpoint; one that may be SEEChat's as well is left to _seechat."""
    projector = shapes.get("llama_proj.weight")
    buffers = any(k.startswith("llama_model.model.") for k in shapes)
    # only the form for Llama 2 takes more numbers a token than it gives: four joined patches
    joined = _size(projector, 1) > _size(projector, 0)
    if projector is None or not (buffers or joined):
        return None
    bridge = "four joined patches" if joined else "Q-Former"
    facts = {
        "vision": f"EVA ViT-g + {bridge}; here the projector",
        "language model": f"a LLaMA of hidden size {_size(projector, 0)}, in a folder of its own",
    }
    base = "a Llama 2 folder" if joined else "a Vicuna folder"
    missing = need(base, EVA, *(() if joined else (QFORMER,)))
    options = export(
        lm="LLAMA-2" if joined else "VICUNA",
        eva=EVA,
        qformer=None if joined else QFORMER,
        checkpoint=path,
    )
    title = f"MiniGPT-4{' for Llama 2' if joined else ''}"
    return Identity(path, "minigpt4", title, facts, missing, options)


def _seechat(path: Path, shapes: Shapes, _: object) -> Identity | None:
    """Recognizes SEEChat's checkpoint and BLIP-2's Q-Former file by their networks' prefixes."""
    parts = {
        "ViT": "visual_encoder.",
        "ln_vision": "ln_vision.",
        "Q-Former": "Qformer.bert.encoder.",
        "queries": "query_tokens",
        "projector": "llama_proj.",
        "language model": "llama_model.transformer.layers.0.mlp",
        "prefix encoder": "llama_model.transformer.prefix_encoder.",
    }
    held = [part for part, start in parts.items() if any(k.startswith(start) for k in shapes)]
    facts = {"holds": ", ".join(held)}
    if any(k.startswith(("llama_proj.", "llama_model.transformer.")) for k in shapes):
        if "language model" in held:
            facts["precision"] = shapes[
                next(k for k in shapes if k.startswith(parts["language model"]))
            ].dtype
        eva = None if "ViT" in held else EVA
        qformer = None if {"Q-Former", "queries", "ln_vision"} <= set(held) else QFORMER
        missing = need("a ChatGLM-6B folder", *filter(None, (eva, qformer)))
        options = export(eva=eva, qformer=qformer, checkpoint=path)
        return Identity(path, "seechat", "a checkpoint of SEEChat", facts, missing, options)
    if "Q-Former" not in held:
        return None
    queries = _size(shapes.get("query_tokens"), 1)
    facts["queries"] = str(queries)
    if any(k.startswith(("t5_proj.", "opt_proj.")) for k in shapes):
        facts["ignored"] = "BLIP-2's own projector"
    missing = need("a ChatGLM-6B folder", EVA, CHECKPOINT)
    options = export(eva=EVA, qformer=path, checkpoint=CHECKPOINT)
    return Identity(path, "qformer", "BLIP-2's Q-Former", facts, missing, options)


def _eva(path: Path, shapes: Shapes, _: object) -> Identity | None:
    if "blocks.0.attn.q_bias" not in shapes or "patch_embed.proj.weight" not in shapes:
        return None
    blocks = _layers(shapes, r"blocks\.(\d+)\.")
    patch, width = _size(shapes["patch_embed.proj.weight"], 2), _size(shapes.get("pos_embed"), 2)
    facts = {"vision": f"{blocks} blocks (SEEChat uses 39), width {width}, patches of {patch}"}
    missing = need("a ChatGLM-6B folder", QFORMER, CHECKPOINT)
    options = export(eva=path, qformer=QFORMER, checkpoint=CHECKPOINT)
    return Identity(path, "eva", "EVA ViT-g", facts, missing, options)


def _chinese_clip(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> Identity | None:
    """Recognizes Chinese-CLIP, which scores captions; its image tower is a CLIP's."""
    if not is_scorer(shapes):
        return None
    clip = _clip(path, shapes, config)
    facts = clip.facts if clip else {"vision": "a ResNet", "names": _CLIP_LIBRARIES["open_clip"]}
    facts = {name: fact for name, fact in facts.items() if name != "ignored"}
    for start in ("bert.", "text_model."):
        if layers := _layers(shapes, re.escape(start) + r"encoder\.layer\.(\d+)\."):
            words = shapes.get(f"{start}embeddings.word_embeddings.weight")
            facts["texts"] = f"BERT, {layers} layers, {_size(words, 0)} word pieces"
    folder = path if path.is_dir() else path.parent
    whole_words = (folder / WORDS).is_file()
    missing = {} if whole_words else {WORDS: CHINESE_CLIP_PLACE}
    options: dict[str, Path | str] = {"scorer": path}
    if missing:
        options["tokenizer"] = WORDS
    return Identity(
        path, "chinese-clip", "Chinese-CLIP, a scorer of captions", facts, missing, options
    )


def _clip(path: Path, shapes: Shapes, _: object) -> Identity | None:
    found = (f for f in CLIP_FORMS if f.prefix + f.patches in shapes and _layers(shapes, f.layer))
    form = next(found, None)
    if form is None:
        return None
    layers, patches = _layers(shapes, form.layer), shapes[form.prefix + form.patches]
    library = _CLIP_LIBRARIES[clip_library(form, shapes)]
    width, patch = _size(patches, 0), _size(patches, 2)
    facts = {"vision": f"{layers} layers, width {width}, patches of {patch}", "names": library}
    text = any(k.startswith(("token_embedding", "text_model.", "transformer.")) for k in shapes)
    if text:
        facts["ignored"] = "the text tower"
    missing = need("a ChatGLM-6B folder", "a projector")
    options = export(clip=path, projector="PROJECTOR")
    return Identity(path, "clip", "a CLIP vision tower", facts, missing, options)


def _projector(path: Path, shapes: Shapes, _: object) -> Identity | None:
    known = {kind: bridge_names(tensors, shapes) for kind, tensors in BRIDGE_TENSORS.items()}
    kind = next((k for k, names in known.items() if set(names.values()) == shapes.keys()), None)
    if kind is None:
        return None
    names = known[kind]
    first, last = names[min(names, key=_by_layer)], names[max(names, key=_by_layer)]
    facts = {"bridge": f"{kind}, {_size(shapes[first], 1)} to {_size(shapes[last], 0)}"}
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).is_file() and is_llava(read_json(folder / CONFIG)):
        tower, lacking, clip = _clip_of(folder)
        base = _hub_of(read_json(folder / CONFIG).get("_name_or_path"))
        missing = {"a LLaMA folder": base or "the model that it was trained with"} | lacking
        options = export(lm="LLAMA", clip=clip, projector=path)
        title = "a projector of LLaVA"
        return Identity(path, "projector", title, facts | {"vision": tower}, missing, options)
    missing = need("a ChatGLM-6B folder", "a CLIP ViT-L/14")
    options = export(clip="CLIP", projector=path)
    return Identity(path, "projector", "a projector", facts, missing, options)


def _by_layer(name: str) -> tuple[str, bool]:
    """A sort key: weights before biases, layer by layer; first an input, last an output."""
    return name.rpartition(".")[0], name.endswith("bias")


def _others(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> Any:
    """Recognizes, by name, models that people take for one of this family."""
    if any(k.startswith("transformer.encoder.layers.") for k in shapes):
        return later(path, config)
    return None


def _llama(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> Identity | None:
    """Recognizes a LLaMA as a Hugging Face folder, alone or with a vision network beside it."""
    layer = "layers.0.self_attn.q_proj"
    forms = (f for f in llama.FORMS if any(k.startswith(f"{f.body}{layer}.") for k in shapes))
    form = next(forms, None)
    if form is None:
        return None
    layers = _layers(shapes, rf"{re.escape(form.body)}layers\.(\d+)\.")
    embeddings = shapes.get(f"{form.body}embed_tokens.weight")
    weight = shapes.get(f"{form.body}{layer}.weight")
    facts = {
        "language model": f"{layers} layers, hidden {_size(embeddings, 1)}",
        "vocabulary": f"{_size(embeddings, 0)} ids",
        "precision": weight.dtype if weight else "integers in blocks",
    }
    seen = next((n for start, n in _SEEING.items() if any(start in k for k in shapes)), None)
    where = model_place(path)
    missing = llama_missing(where if where.is_dir() else where.parent, config)
    title = f"{seen}, on a LLaMA" if seen else "a LLaMA"
    clip = words = None
    if seen == "LLaVA":
        facts["vision"], lacking, clip = _clip_of(where if where.is_dir() else where.parent)
        missing |= lacking
    elif seen:
        facts["vision"] = "EVA ViT-g + Q-Former that reads the question"
        facts["licence"] = LICENCES["instructblip"]
        try:
            find_vocabulary(None, [where / "qformer_tokenizer", where])
        except CheckpointError:
            missing |= need(WORDS)
            words = WORDS
    options = export(lm=where, clip=clip, wordpiece=words)
    return Identity(path, "llama", title, facts, missing, options, runs=not missing)


# a part of the names of vision networks, and the model that has them
_SEEING = {"mm_projector": "LLaVA", "multi_modal_projector": "LLaVA", "qformer.": "InstructBLIP"}


def llama_missing(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What a LLaMA's folder lacks beside its weights, and where that is published.

    folder: the folder.
    config: its config.json, or nothing.
    """
    names, missing = LM_FAMILIES["llama"].tokenizers, {}
    if not (folder / CONFIG).is_file():
        missing[CONFIG] = llama_hub(config)
    if not any(whole(folder / name) for name in names):
        missing[" or ".join(names)] = llama_hub(config)
    return missing


def llama_hub(config: Mapping[str, Any]) -> str:
    """Where a LLaMA is published, as far as its configuration says it."""
    return _hub_of(config.get("_name_or_path")) or "its publisher"


def later(path: Path, config: Mapping[str, Any]) -> Identity:
    """Describe a later ChatGLM (ChatGLM2, ChatGLM3, GLM-4), which is not read.

    path: its folder or file.
    config: its config.json.
    """
    glm4 = config.get("padded_vocab_size") in (151552, 151343)
    name = "GLM-4" if glm4 else "ChatGLM2-6B or ChatGLM3-6B"
    title = f"{name}: another network than ChatGLM-6B under a like name, not of this family"
    return Identity(path, "other", title, missing=need("a ChatGLM-6B folder"), usable=False)


RECOGNIZERS = (
    *(_lm, _llama, _ptuning, _lora, _instructblip, _minigpt4, _seechat, _eva),
    *(_chinese_clip, _clip, _projector, _others),
)


def whole(path: Path) -> bool:
    """Whether a file is there and is not just a Git LFS pointer."""
    try:
        return bool(first_bytes(path))
    except CheckpointError:
        return False


def need(*names: str) -> dict[str, str]:
    """What is missing, and where it is published.

    names: keys of PLACES.
    """
    return {name: PLACES[name] for name in names}


def export(**options: Path | str | None) -> dict[str, Path | str]:
    """What an export is given, by argument: a path, or the name of what is still needed."""
    given: dict[str, Path | str] = {"lm": "CHATGLM-6B"}
    return given | {k: v for k, v in options.items() if v}


def _layers(shapes: Mapping[str, TensorInfo], pattern: str) -> int:
    compiled = re.compile(pattern)
    return len({m[1] for k in shapes if (m := compiled.match(k))})


def _size(info: TensorInfo | None, axis: int) -> int:
    return info.shape[axis] if info and len(info.shape) > axis else 0
