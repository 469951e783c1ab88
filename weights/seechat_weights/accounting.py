"""Every tensor of a checkpoint is either used or ignored for a stated reason.

One that is missing, surplus or of another shape than the configuration says is an error: a model
loaded with a tensor silently skipped would answer, and answer wrongly.
"""

import re
from collections.abc import Iterable, Mapping

from seechat_weights.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, str]]  # a Checkpoint's `shapes`: name -> (shape, dtype)


def account(
    shapes: Shapes, needed: Iterable[str], reasons: Iterable[tuple[str, str]], where: str
) -> dict[str, str]:
    """See that every tensor is needed or has a reason (pattern, why); returns the ignored ones."""
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
            "its configuration calls for: download the checkpoint again, or name the right one"
        )
    return ignored


def check_shapes(shapes: Shapes, expected: Mapping[str, Shape], where: str) -> None:
    wrong = []
    for key, shape in expected.items():
        found, dtype = shapes[key]
        if tuple(found) != shape:
            wrong.append(f"{key} is {list(found)} instead of {list(shape)}")
        elif dtype not in ("float16", "bfloat16", "float32", "float64"):
            wrong.append(f"{key} is {dtype} instead of float16 or float32")
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} of {len(expected)} tensors do not fit ({few(wrong)}); "
            "expected the sizes of its configuration: take both from the same model"
        )


def few(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"
