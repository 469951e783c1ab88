"""Checks that every tensor of a checkpoint is either used or ignored for a stated reason.

A tensor that is missing, surplus or of another shape than the configuration says is an error. A
model that silently skipped a tensor would still answer, and answer wrongly.
"""

import math
import re
from collections.abc import Iterable, Mapping

from seechat_weights.config import MAX_LAYERS
from seechat_weights.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, str]]  # a Checkpoint's `shapes`: name -> (shape, dtype)
FLOATS = ("float16", "bfloat16", "float32", "float64")

# Files of SEEChat, VisualGLM, LLaVA and InstructBLIP hold LM and vision; the start of a name says
# which it belongs to: the first of these that fits.
PARTS = {
    "vision": r"(visual_encoder|ln_vision|Qformer|llama_proj|image_encoder|mixins\.eva)\..*"
    r"|(model\.)?(mm_projector|multi_modal_projector|vision_tower|vision_model|qformer"
    r"|language_projection|llm_proj)\..*|(model\.)?(query_tokens|image_newline)",
    "lm": r"(llama_model|transformer|lm_head|mixins\.(chatglm-\w+|ptuning)|model|language_model)"
    r"\..*",
}


def part(shapes: Shapes, name: str, *, where: str) -> dict[str, tuple[Shape, str]]:
    """The tensors of one part of a checkpoint that may hold both LM and vision.

    The reader of a part accounts for all of it, so the two readers account for every tensor.

    shapes: all tensors of the checkpoint.
    name: "lm" or "vision".
    where: the checkpoint's path, for errors.

    Raises CheckpointError; it names tensors that belong to neither part.
    """
    parts = {k: next((n for n, p in PARTS.items() if re.fullmatch(p, k)), "") for k in shapes}
    unknown = [k for k, found in parts.items() if not found]
    if unknown:
        raise CheckpointError(
            f"{where}: tensors are {len(unknown)} not known ({few(unknown)}); expected those of "
            "ChatGLM-6B, a LLaMA, SEEChat or VisualGLM-6B: name the right checkpoint"
        )
    return {k: v for k, v in shapes.items() if parts[k] == name}


def account(
    shapes: Shapes,
    needed: Iterable[str],
    reasons: Iterable[tuple[str, str]],
    where: str,
    *,
    advice: str = "download the checkpoint again, or name the right one",
) -> dict[str, str]:
    """Check that every tensor is needed or has a reason to be ignored; returns the ignored ones.

    shapes: all tensors.
    needed: names that must be there.
    reasons: pairs of a pattern of names and why such tensors are ignored.
    where: the checkpoint's path, for errors.
    advice: what to do, for errors.

    Raises CheckpointError; it names tensors that are missing or have no reason.
    """
    needed = dict.fromkeys(needed)
    missing = [k for k in needed if k not in shapes]
    ignored, surplus = {}, []
    for key in shapes:
        if key in needed:
            continue
        reason = next((why for pattern, why in reasons if re.fullmatch(pattern, key)), None)
        if reason is None:
            surplus.append(key)
        else:
            ignored[key] = reason
    found = [
        f"{len(keys)} {what} ({few(keys)})"
        for what, keys in (("missing", missing), ("not known", surplus))
        if keys
    ]
    if found:
        raise CheckpointError(
            f"{where}: tensors are {' and '.join(found)}; expected exactly the {len(needed)} that "
            f"its configuration calls for: {advice}"
        )
    return ignored


def check_shapes(
    shapes: Shapes,
    expected: Mapping[str, Shape],
    where: str,
    *,
    dtypes: tuple[str, ...] = FLOATS,
) -> None:
    """Compare shapes and dtypes.

    shapes: what was found.
    expected: what each tensor should measure.
    where: the checkpoint's path, for errors.
    dtypes: the dtypes that are allowed.

    Raises CheckpointError; it names each wrong tensor, what it is and what it should be.
    """
    wrong = []
    for key, shape in expected.items():
        found, dtype = shapes[key]
        if tuple(found) != shape:
            wrong.append(f"{key} is {list(found)} instead of {list(shape)}")
        elif dtype not in dtypes:
            wrong.append(f"{key} is {dtype} instead of {' or '.join(dtypes)}")
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} of {len(expected)} tensors do not fit ({few(wrong)}); "
            "expected the sizes of its configuration: take both from the same model"
        )


def sizes_of(shapes: Shapes, key: str, rank: int, *, where: str, advice: str) -> Shape:
    """A tensor's shape, from which other sizes follow.

    shapes: all tensors.
    key: the tensor's name.
    rank: the number of dimensions it must have.
    where: the checkpoint's path, for errors.
    advice: what to do, for errors.

    Raises CheckpointError if the tensor has another rank.
    """
    found = shapes[key][0]
    if len(found) != rank or 0 in found:
        raise CheckpointError(
            f"{where}: {key} has shape {list(found)}, expected {rank} sizes above 0: {advice}"
        )
    return found


def count_layers(shapes: Shapes, pattern: str, *, where: str) -> int:
    """Count the layers of a network.

    shapes: all tensors.
    pattern: a regular expression of the start of a layer's names; its group is the number.
    where: the checkpoint's path, for errors.

    Raises CheckpointError for more layers than any network has, since they would fill the memory.
    """
    layer = re.compile(pattern)
    count = len({found[1] for key in shapes if (found := layer.match(key))})
    if count > MAX_LAYERS:
        raise CheckpointError(
            f"{where}: has {count} layers {pattern}; expected at most {MAX_LAYERS}: download it "
            "from its publisher"
        )
    return count


def patches_a_side(positions: int, *, where: str, advice: str) -> int:
    """The number of patches a side of a ViT.

    positions: its position embeddings, with that of the class token.
    where: the checkpoint's path, for errors.
    advice: what to do, for errors.
    """
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise CheckpointError(
            f"{where}: {positions} position embeddings, expected a square of patches and one more: "
            f"{advice}"
        )
    return side


def few(items: list[str]) -> str:
    """The first of some items, as words for a message."""
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"
