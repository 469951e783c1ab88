"""Every tensor of a checkpoint is either used or ignored for a stated reason.

One that is missing, surplus or of another shape than the configuration says is an error: a model
loaded with a tensor silently skipped would answer, and answer wrongly.
"""

import math
import re
from collections.abc import Iterable, Mapping

from seechat_weights.config import MAX_LAYERS
from seechat_weights.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, str]]  # a Checkpoint's `shapes`: name -> (shape, dtype)
FLOATS = ("float16", "bfloat16", "float32", "float64")

# Files of SEEChat and VisualGLM hold LM and vision together; a name's beginning says whose it is.
PARTS = {
    "lm": r"(llama_model|transformer|lm_head|mixins\.(chatglm-\w+|ptuning))\..*",
    "vision": r"(visual_encoder|ln_vision|Qformer|llama_proj|image_encoder|mixins\.eva)\..*"
    r"|query_tokens",
}


def part(shapes: Shapes, name: str, *, where: str) -> dict[str, tuple[Shape, str]]:
    """The tensors of a part, "lm" or "vision", of a checkpoint that may hold both.

    Who reads a part accounts for all of it, so that both together account for every tensor.
    Raises CheckpointError naming tensors that belong to neither.
    """
    unknown = [k for k in shapes if not any(re.fullmatch(p, k) for p in PARTS.values())]
    if unknown:
        raise CheckpointError(
            f"{where}: tensors are {len(unknown)} not known ({few(unknown)}); expected those of "
            "ChatGLM-6B, SEEChat or VisualGLM-6B: name the right checkpoint"
        )
    return {k: v for k, v in shapes.items() if re.fullmatch(PARTS[name], k)}


def account(
    shapes: Shapes,
    needed: Iterable[str],
    reasons: Iterable[tuple[str, str]],
    where: str,
    *,
    advice: str = "download the checkpoint again, or name the right one",
) -> dict[str, str]:
    """See that every tensor is needed or has a reason (pattern, why); returns the ignored ones.

    Raises CheckpointError naming those that are missing or have no reason.
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
    """Compare sizes and dtypes; CheckpointError naming each tensor, what it is and should be."""
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
    """A tensor's shape, from which other sizes follow; CheckpointError if it is of another rank."""
    found = shapes[key][0]
    if len(found) != rank or 0 in found:
        raise CheckpointError(
            f"{where}: {key} has shape {list(found)}, expected {rank} sizes above 0: {advice}"
        )
    return found


def count_layers(shapes: Shapes, pattern: str, *, where: str) -> int:
    """How many layers a network has, of whose names `pattern` finds the beginning and the number.

    Raises CheckpointError for more than any network has, which would take the memory.
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
    """Of a ViT with `positions` position embeddings, the class token's among them."""
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise CheckpointError(
            f"{where}: {positions} position embeddings, expected a square of patches and one more: "
            f"{advice}"
        )
    return side


def few(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"
