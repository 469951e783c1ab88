"""What a published LM's tensors are mapped to: shared by the families."""

from dataclasses import dataclass

from seechat_weights.files.accounting import Shape
from seechat_weights.lm.packed import Packed


@dataclass(frozen=True)
class Published:
    """A published tensor that one of our parameters comes from, whole or in part."""

    key: str
    scale: str = ""  # name of the tensor with the scales of its rows, if it is quantized
    bits: int = 0  # of a quantized weight: 8 or 4
    packed: Packed | None = None  # integers in groups; `key` is then their first tensor

    @property
    def keys(self) -> tuple[str, ...]:
        """All published tensors that it is."""
        if self.packed:
            return self.packed.names
        return (self.key, self.scale) if self.scale else (self.key,)


@dataclass(frozen=True)
class Part:
    """The published tensor of some rows of one of our parameters; several follow each other."""

    key: str  # its published name
    shape: Shape


@dataclass(frozen=True)
class LMNames:
    """The tensors of the LM found in a checkpoint.

    used: our parameter -> the published tensors that its rows come from, in their order.
    prefix: a P-tuning prefix: name within its encoder -> published tensor.
    loras: our linear -> its pairs A [r, in], B [out / n, r].
    ignored: published tensor -> reason.
    """

    used: dict[str, tuple[Published, ...]]
    prefix: dict[str, str]
    loras: dict[str, list[tuple[str, str]]]
    ignored: dict[str, str]


def whole(parts: tuple[Part, ...]) -> Shape:
    """The shape of our parameter that these parts make."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
