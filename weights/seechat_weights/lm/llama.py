"""LLaMA-shaped decoders: their config.json, and which published tensor becomes which parameter.

LLaMA-1 to 3, Vicuna, and the LMs of LLaVA, MiniGPT-4 and InstructBLIP: RMSNorm, a rotary embedding
over whole heads, a SiLU gate, no biases; fewer heads of keys and values than of queries where the
configuration says so.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from seechat_weights.config import MAX_LAYERS, LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, Shapes, account, check_shapes
from seechat_weights.lm.names import LMNames, Part, Published
from seechat_weights.lm.packed import find_packed

MODEL_TYPES = ("llama", "llava", "llava_llama", "instructblip")
_MOST = 1 << 24  # of any size; what is beyond would only fill the memory before it is refused
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "inner_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
}
# what transformers' LlamaConfig takes if a file does not say it
_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
# settings that make another network, and the value that does not
_OTHERWISE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
Refuse = Callable[[str, str, str], CheckpointError]


def llama_config(config: Mapping[str, Any], *, where: str = "config.json") -> LMConfig:
    """Read the decoder's shape from a config.json; missing settings are as transformers has them.

    config: the JSON object: of a LLaMA, of a LLaVA as its authors publish it, or of a model whose
        "text_config" describes a LLaMA.
    where: the file's name, for errors.

    Raises CheckpointError for other networks, a scaling of positions that is not known, and
    impossible values.
    """

    def refuse(found: str, expected: str, do: str) -> CheckpointError:
        return CheckpointError(f"{where}: {found}; expected {expected}: {do}")

    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
        kind = config.get("model_type", "llama")
        if kind != "llama":
            raise refuse(
                f"its text_config's model_type is {kind!r:.80}",
                "'llama'",
                "name a model with a LLaMA inside",
            )
    for name, value in _OTHERWISE.items():
        if config.get(name, value) != value:
            raise refuse(
                f"{name} is {config[name]!r:.80}", f"{value!r}", "this variant is not supported"
            )
    values: dict[str, Any] = {}
    for ours, published in _FIELDS.items():
        value = config.get(published)
        value = _DEFAULTS.get(published) if value is None else value
        if value is None:  # heads of keys and values: as many as of queries
            continue
        limit = MAX_LAYERS if ours == "num_layers" else _MOST
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise refuse(
                f"{published} is {value!r:.80}",
                f"a whole number from 1 to {limit}",
                "download the file again",
            )
        values[ours] = value
    epsilon = config.get("rms_norm_eps", _DEFAULTS["rms_norm_eps"])
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise refuse(
            f"rms_norm_eps is {epsilon!r:.80}", "between 0 and 1", "download the file again"
        )
    rope = _rope(config, refuse)
    if not rope.get("rope_original"):  # the stated length is that before the scaling
        stretched = values["max_sequence_length"] * rope["rope_factor"]
        values["max_sequence_length"] = min(int(stretched), _MOST)
    bos, *_ = _tokens(config, "bos_token_id", 1, refuse)
    eos, *others = _tokens(config, "eos_token_id", 2, refuse)
    lm = LMConfig(
        **values,
        **rope,
        family="llama",
        layernorm_epsilon=float(epsilon),
        pad_id=0,
        mask_id=0,
        gmask_id=0,
        bos_id=bos,
        eos_id=eos,
        other_eos=tuple(others),
    )
    if lm.hidden_size % lm.num_heads or lm.head_size % 2 or lm.num_heads % lm.kv_heads:
        raise refuse(
            f"hidden_size {lm.hidden_size} with {lm.num_heads} heads, {lm.kv_heads} of keys",
            "heads of an even size, as many for each head of keys",
            "download the file again",
        )
    head = config.get("head_dim") or lm.head_size
    if head != lm.head_size:
        raise refuse(
            f"head_dim is {head!r:.80}",
            f"{lm.head_size}, the hidden size over the heads",
            "this variant is not supported",
        )
    for name, i in [("bos_token_id", bos), *(("eos_token_id", i) for i in (eos, *others))]:
        if i >= lm.vocab_size:
            raise refuse(
                f"{name} is {i} in a vocabulary of {lm.vocab_size}",
                f"less than {lm.vocab_size}",
                "download the file again",
            )
    return lm


def _rope(config: Mapping[str, Any], refuse: Refuse) -> dict[str, Any]:
    """The fields of LMConfig that say how positions become angles."""
    newer = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or newer
    theta = config.get("rope_theta")
    if not isinstance(newer, dict) or not isinstance(scaling, dict):
        raise refuse(f"rope_scaling is {scaling!r:.80}", "an object", "download the file again")
    theta = newer.get("rope_theta", 10000.0) if theta is None else theta
    if not _within(theta, 1, 1e12):
        raise refuse(f"rope_theta is {theta!r:.80}", "more than 1", "download the file again")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": float(theta), "rope_factor": 1.0}
    if kind in ("default", None):
        return found
    fields = {
        "rope_factor": ("factor", 1, 1024),
        "rope_original": ("original_max_position_embeddings", 1, _MOST),
        "rope_low": ("low_freq_factor", 1e-3, 1e3),
        "rope_high": ("high_freq_factor", 1e-3, 1e3),
    }
    if kind == "linear":
        del fields["rope_original"], fields["rope_low"], fields["rope_high"]
    sound = kind in ("linear", "llama3")
    for ours, (name, least, most) in fields.items():
        found[ours] = value = scaling.get(name)
        sound = sound and _within(value, least, most)
    if not sound or not found.get("rope_low", 0) < found.get("rope_high", 1):
        raise refuse(
            f"rope_scaling is {scaling!r:.120}",
            "none, linear by a factor from 1 to 1024, or llama3 with its factors",
            "this variant is not supported",
        )
    whole = ("rope_original",)
    return {n: int(v) if n in whole else float(v) for n, v in found.items()}


def _within(value: Any, least: float, most: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and least <= value <= most


def _tokens(config: Mapping[str, Any], name: str, default: int, refuse: Refuse) -> list[int]:
    """The ids of a special token; of ends, LLaMA-3 has several."""
    value = config.get(name)
    found = [default] if value is None else value if isinstance(value, list) else [value]
    sound = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < _MOST for i in found)
    if not found or len(found) > 64 or not sound:
        raise refuse(f"{name} is {value!r:.80}", "an id", "download the file again")
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Form:
    """How some files name the decoder's tensors: `body` before its modules, and the head's name."""

    body: str
    head: str
    partial: bool = False  # it may hold any subset of the tensors, laid over a base


# the first one whose word embeddings are there is the one
FORMS = (
    Form("model.", "lm_head.weight"),  # LLaMA itself, and LLaVA as its authors publish it
    Form("language_model.model.", "language_model.lm_head.weight"),  # Hugging Face's LLaVA
    Form("model.language_model.", "lm_head.weight"),  # the same since 2025
)
LAID = Form("llama_model.model.", "llama_model.lm_head.weight", partial=True)
_EMBEDDINGS, _HEAD = "word_embeddings.weight", "lm_head.weight"
_REASONS = ((r"(.*\.)?rotary_emb\.inv_freq", "computed from the head size"),)
_PACKED_REASONS = ((r".*_proj\.bias", "zeros, which GPTQ writes for linears without a bias"),)


def llama_layer(config: LMConfig, head: int) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Our parameters of one layer, and the published ones that each is made of, in its order.

    config: the decoder's shape.
    head: numbers of a head, padded or not.
    """
    h, inner = config.hidden_size, config.inner_size
    queries, keys = config.num_heads * head, config.kv_heads * head
    yield "input_layernorm.weight", (Part("input_layernorm.weight", (h,)),)
    yield (
        "attention.query_key_value.weight",
        (
            Part("self_attn.q_proj.weight", (queries, h)),
            Part("self_attn.k_proj.weight", (keys, h)),
            Part("self_attn.v_proj.weight", (keys, h)),
        ),
    )
    yield "attention.dense.weight", (Part("self_attn.o_proj.weight", (h, queries)),)
    yield "post_attention_layernorm.weight", (Part("post_attention_layernorm.weight", (h,)),)
    yield (
        "mlp.gate_up.weight",
        (Part("mlp.gate_proj.weight", (inner, h)), Part("mlp.up_proj.weight", (inner, h))),
    )
    yield "mlp.down.weight", (Part("mlp.down_proj.weight", (h, inner)),)


def llama_parts(config: LMConfig, form: Form = FORMS[0]) -> dict[str, tuple[Part, ...]]:
    """Our parameters of the decoder, and the published tensors that each is made of.

    config: the decoder's shape.
    form: how the tensors are named.
    """
    h, vocab = config.hidden_size, config.vocab_size
    layer = list(llama_layer(config, config.head_size))
    found: dict[str, tuple[Part, ...]] = {}
    found[_EMBEDDINGS] = (Part(f"{form.body}embed_tokens.weight", (vocab, h)),)
    for i in range(config.num_layers):
        for ours, parts in layer:
            named = tuple(Part(f"{form.body}layers.{i}.{p.key}", p.shape) for p in parts)
            found[f"layers.{i}.{ours}"] = named
    found["final_layernorm.weight"] = (Part(f"{form.body}norm.weight", (h,)),)
    found[_HEAD] = (Part(form.head, (vocab, h)),)
    return found


def map_llama(
    shapes: Shapes,
    config: LMConfig,
    *,
    where: str,
    settings: Mapping[str, Any] | None = None,
    form: Form | None = None,
) -> LMNames:
    """Find a LLaMA in a checkpoint.

    shapes: the tensors of its LM.
    config: the shape that it must have.
    where: its path, for errors.
    settings: its config.json, which says whether the word embeddings serve as the head (tied).
    form: how they are named; None for the one of FORMS that fits.

    Raises CheckpointError; it names missing, surplus and misshapen tensors.
    """
    if form is None:
        fits = (f for f in FORMS if f"{f.body}embed_tokens.weight" in shapes)
        form = next(fits, FORMS[0])
    parts, tied = llama_parts(config, form), False
    if form.partial:
        parts = {ours: ps for ours, ps in parts.items() if any(p.key in shapes for p in ps)}
    elif tied := _tied(settings or {}):
        parts[_HEAD] = parts[_EMBEDDINGS]
    needed: dict[str, Shape] = {}
    used: dict[str, tuple[Published, ...]] = {}
    packed: list[str] = []
    for ours, found in parts.items():
        places = [_published(shapes, part, settings or {}, where) for part in found]
        used[ours] = tuple(places)
        for place, part in zip(places, found, strict=True):
            if place.packed:
                packed += place.keys
            else:
                needed[part.key] = part.shape
    reasons = [*_REASONS, *(_PACKED_REASONS if packed else ())]
    if tied:
        reasons.append((re.escape(form.head), "tied to the word embeddings"))
    ignored = account(shapes, [*needed, *packed], reasons, where)
    check_shapes(shapes, needed, where)
    return LMNames(used, {}, {}, ignored)


def _published(shapes: Shapes, part: Part, settings: Mapping[str, Any], where: str) -> Published:
    """Where a part comes from: a tensor of floats, or integers in groups."""
    packed = None
    if len(part.shape) == 2:
        module = part.key.removesuffix(".weight")
        packed = find_packed(shapes, module, part.shape, settings, where)
    if packed is None:
        return Published(part.key)
    return Published(packed.names[0], bits=packed.bits, packed=packed)


def _tied(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the word embeddings are the head, too."""
    inner = settings.get("text_config")
    said = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
    return (settings.get("tie_word_embeddings") if said is None else said) is True
