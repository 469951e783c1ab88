"""Maps published names of bridges between vision tower and language model to ours."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, Shapes, account, check_shapes, few
from seechat_weights.vision.network import BRIDGE_TENSORS, bridge_parameters
from seechat_weights.vision.part import TensorMapping

# LLaVA, a LoRA run of it, its Hugging Face form, SEEChat and MiniGPT-4, InstructBLIP
_PREFIX = re.compile(
    r"((base_model\.model\.)?(model\.)?mm_projector|(model\.)?multi_modal_projector"
    r"|llama_proj|llm_proj|language_projection)\."
)
_HUGGING_FACE = (("0.", "linear_1."), ("2.", "linear_2."))  # ours, and LLaVA's names there
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
    return next((m[0] for name in names if (m := _PREFIX.match(name))), "")


def bridge_names(tensors: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Our name of each of a bridge's tensors -> what it would be called among `names`.

    tensors: our names, without a prefix.
    names: all names of the file.
    """
    names = set(names)
    prefix = bridge_prefix(names)
    renamed = _HUGGING_FACE if any(k.startswith(prefix + "linear_1.") for k in names) else ()
    found = {}
    for ours in tensors:
        theirs = ours
        for old, new in renamed:
            theirs = new + ours.removeprefix(old) if ours.startswith(old) else theirs
        found[ours] = prefix + theirs
    return found


def map_bridge(shapes: Shapes, *, where: str) -> BridgeNames:
    """Find the bridge in a projector file by the names of its tensors.

    shapes: the file's tensors.
    where: its path, for errors.

    Raises CheckpointError; it names missing, surplus and misshapen tensors.
    """
    published = {name: bridge_names(tensors, shapes) for name, tensors in BRIDGE_TENSORS.items()}
    found = [
        (name, keys) for name, keys in published.items() if next(iter(keys.values())) in shapes
    ]
    if not found:
        raise CheckpointError(
            f"{where}: holds no known bridge ({few(list(shapes))}); expected a projector, one of "
            f"{', '.join(BRIDGE_TENSORS)}, as mm_projector.*, llama_proj.* or plain weight and "
            "bias: name the file that holds it as projector",
            options={"projector": None},
        )
    name, keys = found[0]
    ignored = account(shapes, keys.values(), _REASONS, where)
    weight = next(iter(keys.values()))
    first = shapes[weight][0]
    if len(first) != 2 or 0 in first:
        raise CheckpointError(
            f"{where}: {weight} has shape {list(first)}, expected "
            "[outputs, inputs]: name the file that holds a projector as projector",
            options={"projector": None},
        )
    outputs, inputs = first
    sizes = bridge_parameters(name, inputs, outputs)
    check_shapes(shapes, {keys[k]: shape for k, shape in sizes.items()}, where)
    used = {k: TensorMapping((key,)) for k, key in keys.items()}
    return BridgeNames(name, inputs, outputs, used, sizes, ignored)
