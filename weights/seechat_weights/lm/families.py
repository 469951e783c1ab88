"""Lists what differs between the decoders that can be read, one row a family.

A new family needs a row here with a file of its names, a graph in seechat_export, its prompt in
seechat_lite, and the contract tests.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, Shapes
from seechat_weights.lm import chatglm, llama
from seechat_weights.lm.names import LMNames, Part, whole


@dataclass(frozen=True)
class LMTensor:
    """One of our tensors of a decoder, as a bundle stores it.

    key: our name of the tensor.
    shape: [outputs, inputs] of a linear, or [size]; heads are padded.
    heads: the axis that runs over heads: "rows" (query_key_value), "columns" (the attention's
        dense) or "" for neither.
    """

    key: str
    shape: Shape
    heads: str = ""


class Layout(Protocol):
    def __call__(self, config: LMConfig) -> Iterator[LMTensor]: ...


class Names(Protocol):
    def __call__(
        self, shapes: Shapes, config: LMConfig, *, where: str, settings: Mapping[str, Any]
    ) -> LMNames: ...


@dataclass(frozen=True)
class LMFamily:
    """How a family's decoder is published, and how it lies in a bundle.

    title: its name for people.
    model_types: what its config.json may say.
    config: reads its shape from a config.json; raises CheckpointError.
    parts: for each form of names that a fine-tuning may have met, our parameters and the published
        tensors that each is made of.
    names: finds it in a checkpoint; raises CheckpointError.
    laid: the same for a SEEChat checkpoint that is laid over a base.
    tokenizers: the file names of its tokenizer, the first choice first.
    layout: its tensors in file order, without word embeddings and lm_head.
    turned: the order in a bundle of the pieces of a head of q and k whose numbers rotate together.
        If the rotary embedding takes pairs from the two halves, nothing moves.
    by_head: whether query_key_value is published as [head][q | k | v], not [q | k | v][head].
    causal: whether every token sees only those before it, those of a prompt too; then keys and
        values stay valid when a prompt grows.
    formats: the conversation format that it speaks, alone and with vision.
    begin, end: the names in LMConfig of the ids that stand before and behind the text of a prompt.
    """

    title: str
    model_types: tuple[str, ...]
    config: Callable[..., LMConfig]
    parts: Callable[[LMConfig], list[dict[str, tuple[Part, ...]]]]
    names: Names
    laid: Names
    tokenizers: tuple[str, ...]
    layout: Layout
    turned: tuple[int, ...]
    by_head: bool
    causal: bool
    formats: tuple[str, str]
    begin: tuple[str, ...]
    end: tuple[str, ...]

    def shapes(self, config: LMConfig) -> dict[str, Shape]:
        """Our parameters of the decoder and their shapes.

        config: the decoder's shape.
        """
        return {ours: whole(parts) for ours, parts in self.parts(config)[0].items()}

    def conversation(self, *, seeing: bool) -> str:
        """The conversation format of a checkpoint that says no other.

        seeing: whether it holds a vision tower, too.
        """
        return self.formats[seeing]


def _chatglm_layout(config: LMConfig) -> Iterator[LMTensor]:
    hidden, inner = config.hidden_size, config.inner_size
    width = config.num_heads * config.padded_head_size
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        yield LMTensor(f"{layer}.input_layernorm.weight", (hidden,))
        yield LMTensor(f"{layer}.input_layernorm.bias", (hidden,))
        yield LMTensor(f"{layer}.attention.query_key_value.weight", (3 * width, hidden), "rows")
        yield LMTensor(f"{layer}.attention.query_key_value.bias", (3 * width,), "rows")
        yield LMTensor(f"{layer}.attention.dense.weight", (hidden, width), "columns")
        yield LMTensor(f"{layer}.attention.dense.bias", (hidden,))
        yield LMTensor(f"{layer}.post_attention_layernorm.weight", (hidden,))
        yield LMTensor(f"{layer}.post_attention_layernorm.bias", (hidden,))
        yield LMTensor(f"{layer}.mlp.dense_h_to_4h.weight", (inner, hidden))
        yield LMTensor(f"{layer}.mlp.dense_h_to_4h.bias", (inner,))
        yield LMTensor(f"{layer}.mlp.dense_4h_to_h.weight", (hidden, inner))
        yield LMTensor(f"{layer}.mlp.dense_4h_to_h.bias", (hidden,))
    yield LMTensor("final_layernorm.weight", (hidden,))
    yield LMTensor("final_layernorm.bias", (hidden,))


def _llama_layout(config: LMConfig) -> Iterator[LMTensor]:
    over_heads = {"query_key_value": "rows", "dense": "columns"}
    layer = list(llama.llama_layer(config, config.padded_head_size))
    for i in range(config.num_layers):
        for key, parts in layer:
            heads = over_heads.get(key.split(".")[-2], "")
            yield LMTensor(f"layers.{i}.{key}", whole(parts), heads)
    yield LMTensor("final_layernorm.weight", (config.hidden_size,))


def _chatglm_names(form: str) -> Names:
    def names(
        shapes: Shapes, config: LMConfig, *, where: str, settings: Mapping[str, Any]
    ) -> LMNames:
        return chatglm.map_lm(shapes, config, where=where, form=form)

    return names


def _llama_laid(
    shapes: Shapes, config: LMConfig, *, where: str, settings: Mapping[str, Any]
) -> LMNames:
    return llama.map_llama(shapes, config, where=where, form=llama.LAID)


LM_FAMILIES = {
    "chatglm": LMFamily(
        title="ChatGLM-6B",
        model_types=("chatglm",),
        config=chatglm.lm_config,
        parts=lambda config: [chatglm.chatglm_parts(config)],
        names=_chatglm_names("huggingface"),
        laid=_chatglm_names("seechat"),
        tokenizers=("ice_text.model",),
        layout=_chatglm_layout,
        # two-dimensional positions: the quarters [a1 a2 b1 b2] become [a1 b1 a2 b2]
        turned=(0, 2, 1, 3),
        by_head=True,
        causal=False,
        formats=("chatglm", "visualglm"),
        begin=(),
        end=("gmask_id", "bos_id"),
    ),
    "llama": LMFamily(
        title="a LLaMA",
        model_types=llama.MODEL_TYPES,
        config=llama.llama_config,
        parts=lambda config: [llama.llama_parts(config, form) for form in llama.FORMS],
        names=llama.map_llama,
        laid=_llama_laid,
        tokenizers=("tokenizer.model", "tokenizer.json"),
        layout=_llama_layout,
        turned=(0, 1),
        by_head=False,
        causal=True,
        formats=("vicuna_v1", "vicuna_v1"),
        begin=("bos_id",),
        end=(),
    ),
}


def family_of(settings: Mapping[str, Any], *, where: str) -> LMFamily:
    """The family that a config.json describes.

    settings: the JSON object.
    where: the file's name, for errors.

    Raises CheckpointError for any other model.
    """
    kind = settings.get("model_type")
    for family in LM_FAMILIES.values():
        if kind in family.model_types:
            return family
    known = ", ".join(repr(name) for f in LM_FAMILIES.values() for name in f.model_types)
    raise CheckpointError(
        f"{where}: model_type is {kind!r:.80}; expected one of {known}: name a ChatGLM-6B or "
        "LLaMA checkpoint"
    )
