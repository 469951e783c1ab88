"""Rounds an LM's weights for what its layers really see, one layer at a time.

Texts (and pictures) run through the layers as the published network computes them. Of each
linear's inputs the second moments are taken; with these its weights are rounded (see
error_feedback). Then the texts run through the rounded layer, so that the next one is fitted to
what it will be given. Nothing holds more than one layer.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_export.calibration_texts import DIALOGUES
from seechat_export.error_feedback import ROWS, SPAN, Moments, rounded_blocks
from seechat_export.parity import HEAD_ROWS, REFERENCES
from seechat_export.quantize import restored_tensor
from seechat_export.reference_chatglm import prefix_mask
from seechat_lite.conversation import FORMATS, Turn, render
from seechat_lite.images import load_image, pixels
from seechat_lite.lm_families import TRAITS, framed
from seechat_lite.prompt import Prompt, build
from seechat_lite.tokenizers import TextTokenizer
from seechat_weights.bundle.layout import HEAD, TensorLayout, head_order, reordered
from seechat_weights.config import LMConfig, VisionConfig
from seechat_weights.errors import CheckpointError, ImageError
from seechat_weights.files.untrusted import read_file
from seechat_weights.lm.checkpoint import ALL, LM, Rows

log = logging.getLogger(__name__)

WINDOW = 256  # tokens of a text that run together
MOST_TOKENS = 8192  # of all texts; the memory and the time of an export grow with them
MOST_BYTES = 1 << 20  # read of one text
TEXTS = (".txt", ".md")
QUESTION = "描述这张图片。"  # asked about every picture
_WORK = 260_000_000  # bytes of Python and torch themselves

Stored = Callable[[TensorLayout], Sequence[np.ndarray]]  # an item's arrays, as they were written


class Weights(Protocol):
    """A source of tensors: seechat_export.export.Source."""

    config: LMConfig
    lm: LM

    def tensor(self, key: str, rows: Rows = ALL) -> Tensor: ...


@dataclass(frozen=True)
class Example:
    """What runs through the network once.

    ids: of its tokens, those of a prompt and of what follows it.
    images: as of a Prompt.
    """

    ids: list[int]
    images: tuple[tuple[int, np.ndarray], ...] = ()


def examples(
    place: Path | None,
    *,
    tokenizer: TextTokenizer,
    lm: LMConfig,
    conversation: str,
    network: nn.Module | None = None,
    vision: VisionConfig | None = None,
) -> list[Example]:
    """What an export is calibrated with, MOST_TOKENS at most.

    place: a text or a picture, or a folder of them; None for the dialogues that come with this.
    tokenizer: the LM's.
    lm: its shape.
    conversation: the format that it speaks.
    network, vision: the vision network and its description, for pictures.

    Raises CheckpointError if there is nothing to read.
    """
    found: list[Example] = []
    tokens = 0
    if place is None:
        made = _dialogues(tokenizer, lm, conversation)
    else:
        made = _of_files(_files(place), tokenizer, lm, conversation, network, vision)
    for example in made:
        tokens += len(example.ids)
        if tokens > MOST_TOKENS:
            log.info("calibration: the first %d tokens are taken", MOST_TOKENS)
            break
        found.append(example)
    if not found:
        raise CheckpointError(
            f"{place}: nothing to calibrate with; expected texts ({', '.join(TEXTS)}) or, for a "
            "model that sees, pictures: name other files"
        )
    return found


def _dialogues(tokenizer: TextTokenizer, lm: LMConfig, conversation: str) -> Iterator[Example]:
    for question, answer in DIALOGUES:
        prompt = build(tokenizer, render(FORMATS[conversation], [Turn(question)]), {})
        yield Example([*prompt.ids, *tokenizer.encode(answer, specials=False), lm.eos_id])


def _files(place: Path) -> Iterator[Path]:
    """The files that are named, in an order that is the same everywhere."""
    if not place.is_dir():
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _of_files(
    files: Iterable[Path],
    tokenizer: TextTokenizer,
    lm: LMConfig,
    conversation: str,
    network: nn.Module | None,
    vision: VisionConfig | None,
) -> Iterator[Example]:
    seeing = network if vision and not vision.question else None
    for file in files:
        if file.suffix.lower() in TEXTS:
            yield from _windows(tokenizer.encode(_text(file), specials=False), lm)
        elif seeing and vision:
            try:
                picture = load_image(file)
            except ImageError as e:
                log.warning("calibration: %s", e)  # a folder may hold other things
                continue
            values = torch.from_numpy(pixels(picture.image, vision.pixels))[None]
            with torch.inference_mode():
                embeds = seeing(values)[0].float().numpy()
            turn = Turn(QUESTION, images=(picture.key,))
            prompt: Prompt = build(
                tokenizer, render(FORMATS[conversation], [turn]), {picture.key: embeds}
            )
            yield Example(prompt.ids, tuple(prompt.images))


def _text(file: Path) -> str:
    try:
        return read_file(file, limit=MOST_BYTES).decode("utf-8", "replace")
    except OSError as e:
        raise CheckpointError(
            f"{file}: {e.strerror or e}; expected a text to calibrate with, of {MOST_BYTES:,} "
            "bytes at most: name another one"
        ) from None


def _windows(ids: Sequence[int], lm: LMConfig) -> Iterator[Example]:
    """A text as examples; where a family sees its prompt both ways, that is half of each."""
    around = len(framed([], lm))
    size = min(WINDOW, lm.max_sequence_length) - around
    for start, end in pairwise([*range(0, len(ids), size), len(ids)]):
        words = list(ids[start:end])
        asked = len(words) // 2 if around > 1 else len(words)
        yield Example([*framed(words[:asked], lm), *words[asked:]])


@dataclass
class _Running:
    """An example between two layers."""

    x: Tensor  # float32 [1, tokens, hidden]
    cos: Tensor
    sin: Tensor
    mask: Tensor


class Calibrator:
    """Rounds the weights of one layer after another.

    source: the LM.
    found: what runs through it.
    items: the tensors of the bundle.
    block_size: inputs that share a scale.
    """

    def __init__(
        self,
        source: Weights,
        found: Sequence[Example],
        items: Sequence[TensorLayout],
        block_size: int,
    ) -> None:
        self.source, self.lm, self.block_size = source, source.config, block_size
        self.examples = found
        self.items = {item.key: item for item in items}
        self.network = REFERENCES[self.lm.family]
        self._running: list[_Running] = []
        self._next = 0  # the layer that is rounded next
        self._rounded: dict[str, list[Tensor]] = {}

    @property
    def tokens(self) -> int:
        """How many tokens run through the network."""
        return sum(len(e.ids) for e in self.examples)

    def described(self) -> dict[str, object]:
        """What a bundle's manifest says of it."""
        pictures = sum(len(e.images) for e in self.examples)
        return {"tokens": self.tokens, "pictures": pictures, "examples": self.fingerprint()}

    def fingerprint(self) -> str:
        """Tells whether another run is calibrated with the same."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.array(example.ids).tobytes())
            for start, image in example.images:
                digest.update(b"%d" % start + image.tobytes())
        return digest.hexdigest()

    def memory(self) -> int:
        """The peak, in bytes."""
        linears = [item for item in self.items.values() if item.bits]
        layer = [item for item in linears if item.key.startswith("layers.0.")]
        weights = 4 * sum(_weights(item) for item in layer)
        moments = sum(4 * size**2 for item in layer for size in _spans(item.shape[1]))
        longest = max(len(e.ids) for e in self.examples)
        widest = max(max(item.shape) for item in layer)
        threads = torch.get_num_threads()
        work = threads * 8 * ROWS * min(SPAN, widest) + 3 * 4 * SPAN**2
        copies = 8 * max(_weights(item) for item in layer)  # read, put in order, and its codes
        states = 4 * self.lm.hidden_size * self.tokens + 4 * 4 * longest * widest
        return _WORK + weights + moments + work + copies + states

    def seconds(self, *, layers: int | None = None) -> float:
        """How long it takes, by a product of matrices that is timed now.

        layers: how many are left; None for all.
        """
        matrix = torch.ones(1024, 1024)
        torch.mm(matrix, matrix)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        speed = 2 * 1024**3 / (time.perf_counter() - start)
        layers = self.lm.num_layers if layers is None else layers
        work = 0.0
        for item in self.items.values():
            if not item.bits or (item.key != HEAD and not item.key.startswith("layers.0.")):
                continue
            spans = sum(size**2 for size in _spans(item.shape[1]))
            cubes = sum(size**3 for size in _spans(item.shape[1]))
            here = (
                2 * self.tokens * (2 * _weights(item) + spans) + 2 * item.shape[0] * spans + cubes
            )
            work += here * (1 if item.key == HEAD else layers)
        return 1.5 * work / speed

    def arrays(self, item: TensorLayout, stored: Stored) -> list[Tensor]:
        """An item's codes and scales.

        item: a linear in blocks, of the layer last asked for or the one after it.
        stored: returns what was written of earlier layers, where a run continues another one.
        """
        layer = self.lm.num_layers if item.key == HEAD else int(item.key.split(".")[1])
        if not self._running:
            self._begin()
        while self._next < layer:  # they were rounded by an earlier run
            self._continue(stored)
        if item.key == HEAD:
            return self._head(item)
        if self._next == layer:
            self._layer()
        return self._rounded.pop(item.key)

    def _begin(self) -> None:
        traits, key = TRAITS[self.lm.family], "word_embeddings.weight"
        self.source.lm.audit(key)
        for example in self.examples:
            ids = example.ids
            x = self.source.tensor(key, np.array(ids)).float()
            for start, image in example.images:
                x[start : start + len(image)] = torch.from_numpy(image)
            tables = torch.from_numpy(traits.tables(self.lm, len(ids)))
            positions = torch.from_numpy(traits.positions(ids, self.lm))
            cos, sin = self.network.angles(tables, positions)
            mask = prefix_mask(torch.tensor([traits.context(ids, self.lm)]), len(ids))
            self._running.append(_Running(x[None], cos, sin, mask))

    @torch.no_grad()
    def _layer(self) -> None:
        """Round the next layer, and move all examples through it."""
        block = self._block(lambda key: self._published(key).float())
        prefix = f"layers.{self._next}."
        linears = {
            f"{prefix}{name}.weight": module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        moments = {key: Moments(linear.in_features) for key, linear in linears.items()}
        hooks = []
        for key, linear in linears.items():

            def note(_: nn.Module, given: tuple[Tensor], key: str = key) -> None:
                moments[key].add(given[0])

            hooks.append(linear.register_forward_pre_hook(note))
        for example in self._running:
            self._run(block, example)
        for hook in hooks:
            hook.remove()
        for key, linear in linears.items():
            item = self.items[key]
            arrays = self._round(item, linear.weight, moments.pop(key))
            self._rounded[key] = arrays
            restored = restored_tensor(item, [a.numpy() for a in arrays], self.lm)
            linear.weight.data.copy_(restored)
        self._move(block)

    @torch.no_grad()
    def _continue(self, stored: Stored) -> None:
        """Move all examples through the next layer as it was written."""

        def read(key: str) -> Tensor:
            item = self.items[key]
            return restored_tensor(item, stored(item), self.lm)

        self._move(self._block(read))

    @torch.no_grad()
    def _head(self, item: TensorLayout) -> list[Tensor]:
        with torch.device("meta"):
            norm = self.network.final_norm(self.lm)
        names = {key: f"final_layernorm.{key}" for key in norm.state_dict()}
        norm.load_state_dict({k: self._published(n).float() for k, n in names.items()}, assign=True)
        moments = Moments(item.shape[1])
        for example in self._running:
            moments.add(norm(example.x[0]))
        self._running.clear()
        parts = []
        for start in range(0, item.shape[0], HEAD_ROWS):  # rows do not depend on each other
            rows = self.source.tensor(item.key, slice(start, start + HEAD_ROWS))
            parts.append(self._round(item, rows, moments))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _published(self, key: str) -> Tensor:
        self.source.lm.audit(key)
        return self.source.tensor(key)

    def _block(self, read: Callable[[str], Tensor]) -> nn.Module:
        with torch.device("meta"):
            block = self.network.Block(self.lm)
        weights = {key: read(f"layers.{self._next}.{key}") for key in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        return block.requires_grad_(False)

    def _run(self, block: nn.Module, example: _Running) -> Tensor:
        cache, before, mask = None, 0, example.mask
        if self.source.lm.prefix is not None:
            prefix = torch.from_numpy(self.source.lm.prefix[self._next]).float()
            before, room = prefix.shape[2], (0, 0, 0, example.x.shape[1])
            cache = tuple(F.pad(part[None], room) for part in prefix)
            mask = F.pad(mask, (before, 0), value=True)
        return block(example.x, example.cos, example.sin, mask, cache, before)

    def _move(self, block: nn.Module) -> None:
        for example in self._running:
            example.x = self._run(block, example)
        self._next += 1

    def _round(self, item: TensorLayout, weight: Tensor, moments: Moments) -> list[Tensor]:
        if item.heads:
            order = head_order(self.lm, item.heads)
            weight = reordered(weight, order, axis=1 if item.heads == "columns" else 0)
            if item.heads == "columns":
                moments = moments.reordered(torch.from_numpy(order))
        return list(rounded_blocks(weight, moments, bits=item.bits, block_size=self.block_size))


def _weights(item: TensorLayout) -> int:
    return torch.Size(item.shape).numel()


def _spans(inputs: int) -> list[int]:
    return [min(SPAN, inputs - i) for i in range(0, inputs, SPAN)]
