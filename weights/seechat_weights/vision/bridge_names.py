"""Maps published names of bridges between vision tower and language model to ours."""

from collections.abc import Iterable
from dataclasses import dataclass

from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, Shapes, account, check_shapes, few
from seechat_weights.vision.network import BRIDGE_TENSORS, bridge_parameters
from seechat_weights.vision.part import TensorMapping

_PREFIXES = ("model.mm_projector.", "mm_projector.", "llama_proj.", "")  # LLaVA, SEEChat
# buffers of frozen networks that a training run of SEEChat leaves beside its projector
_REASONS = ((r".*\.(position_ids|rotary_emb\.inv_freq)", "a computed buffer"),)


@dataclass(frozen=True)
class BridgeNames:
    """A bridge between vision tower and LM, found in a checkpoint."""

    name: str  # a key of BRIDGE_TENSORS
    inputs: int
    outputs: int
    used: dict[str, TensorMapping]  # our parameter -> where it comes from
    sizes: dict[str, Shape]  # our parameter -> its shape
    ignored: dict[str, str]  # published tensor -> reason


def bridge_prefix(names: Iterable[str]) -> str:
    """The prefix of the names of a bridge's tensors.

    names: all names of the file.
    """
    names = list(names)
    return next(p for p in _PREFIXES if any(k.startswith(p) for k in names) or not p)


def map_bridge(shapes: Shapes, *, where: str) -> BridgeNames:
    """Find the bridge in a projector file by the names of its tensors.

    shapes: the file's tensors.
    where: its path, for errors.

    Raises CheckpointError; it names missing, surplus and misshapen tensors.
    """
    prefix = bridge_prefix(shapes)
    found = [
        (name, tensors)
        for name, tensors in BRIDGE_TENSORS.items()
        if prefix + next(iter(tensors)) in shapes
    ]
    if not found:
        raise CheckpointError(
            f"{where}: holds no known bridge ({few(list(shapes))}); expected a projector, one of "
            f"{', '.join(BRIDGE_TENSORS)}, as mm_projector.*, llama_proj.* or plain weight and "
            "bias: name the file that holds it as projector",
            options={"projector": None},
        )
    name, tensors = found[0]
    keys = {k: prefix + k for k in tensors}
    ignored = account(shapes, keys.values(), _REASONS, where)
    first = shapes[keys[next(iter(tensors))]][0]
    if len(first) != 2 or 0 in first:
        raise CheckpointError(
            f"{where}: {prefix}{next(iter(tensors))} has shape {list(first)}, expected "
            "[outputs, inputs]: name the file that holds a projector as projector",
            options={"projector": None},
        )
    outputs, inputs = first
    sizes = bridge_parameters(name, inputs, outputs)
    check_shapes(shapes, {keys[k]: shape for k, shape in sizes.items()}, where)
    used = {k: TensorMapping((key,)) for k, key in keys.items()}
    return BridgeNames(name, inputs, outputs, used, sizes, ignored)
