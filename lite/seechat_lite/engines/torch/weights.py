"""Brings a decoder's weights to the device tensor by tensor, from a bundle or a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.engines.torch.decoder import Decoder
from seechat_lite.engines.torch.linears import (
    BLOCK,
    CHUNK,
    QUANTIZATIONS,
    BlockLinear,
    bitsandbytes_linear,
)
from seechat_lite.lm_families import TRAITS
from seechat_lite.nn.block_quantization import quantize_blocks, unpack_zeros
from seechat_lite.source import Source
from seechat_weights.bundle.arrays import BundleArrays
from seechat_weights.bundle.layout import HEAD, head_order, reordered_prefix
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.config import LMConfig
from seechat_weights.errors import EngineError
from seechat_weights.files.audit import Place, check_half
from seechat_weights.lm.checkpoint import ALL, LM


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of ours: an array [outputs, inputs] or [size], or codes, scales, and zeros if any.

    Zeros are those of blocks, uint8 [outputs, blocks].

    bits: of the blocks that a weight is in; for one array, of the blocks that it is to be put into.
    place: where it comes from, for errors.
    """

    key: str
    arrays: Sequence[np.ndarray | Tensor]
    bits: int = 0
    place: Place | None = None


class Weights(Protocol):
    """A source of a decoder's weights, with the heads in a bundle's order."""

    @property
    def head(self) -> int:
        """Size of a head, padded or not."""
        ...

    @property
    def prefix(self) -> np.ndarray | None:
        """A P-tuning prefix, [layers, 2 (key, value), heads, tokens, head]."""
        ...

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Word embeddings, [tokens, hidden].

        ids: token ids.
        """
        ...

    def tensors(self) -> Iterator["LoadedTensor"]:
        """Yield every tensor except the word embeddings; weights come before their biases."""
        ...


@dataclass(frozen=True)
class BundleWeights:
    """The weights, embeddings and prefix of a bundle, all mapped."""

    folder: Path
    manifest: Manifest

    @property
    def head(self) -> int:
        return self.manifest.lm.padded_head_size

    @cached_property
    def _arrays(self) -> BundleArrays:
        return BundleArrays(self.folder, self.manifest)

    @property
    def prefix(self) -> np.ndarray | None:
        return self._arrays.prefix

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        return self._arrays.rows(ids)

    def tensors(self) -> Iterator[LoadedTensor]:
        file = self.folder / f"{self.manifest.decoder.graph}.data"
        for item in self._arrays.items:
            arrays = self._arrays.stored(item)
            if item.kind == "linear" and not item.bits:  # stored transposed
                arrays = [arrays[0].T]
            codes = arrays[0]
            if len(arrays) > 2:
                zeros = torch.from_numpy(arrays[2].copy())
                zeros = unpack_zeros(zeros, bits=item.bits, blocks=codes.shape[1])
                arrays = [codes, arrays[1], zeros.numpy()]
            yield LoadedTensor(item.key, arrays, item.bits, Place(file, item.key))


@dataclass(frozen=True)
class CheckpointWeights:
    """Published weights, put into a bundle's order as they are read.

    lm: the published weights.
    blocks: bits of the tensors that are to be in blocks: the authors' integers if they have as many
        bits, else blocks made of floats.
    """

    lm: LM
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def head(self) -> int:
        return self.lm.config.head_size

    @property
    def prefix(self) -> np.ndarray | None:
        if self.lm.prefix is None:
            return None
        return reordered_prefix(self.lm.prefix, self.lm.config, padded=False)

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        return self.lm.read("word_embeddings.weight", np.asarray(ids))

    def tensors(self) -> Iterator[LoadedTensor]:
        order = head_order(self.lm.config, "rows", padded=False)
        for key in self.lm.shapes:
            self.lm.audit(key)
            rows, bits = order if "query_key_value" in key else ALL, self.blocks.get(key, 0)
            if bits and bits == self.lm.bits(key):
                published = self.lm.quantized(key, rows)
                size = published.group or BLOCK
                blocks = [published.blocks(size), published.block_scales(size)]
                if published.zeros is not None:
                    blocks.append(published.block_zeros(size))
                yield LoadedTensor(key, blocks, bits)
            elif key != "word_embeddings.weight":
                yield LoadedTensor(key, [self.lm.read(key, rows)], bits, self.lm.place(key))


def weights_of(source: Source, *, quantize: str | None, exact: bool) -> Weights:
    """The weights of a bundle or of published files.

    The integers of a checkpoint's authors stay as they are. A head that they left as floats gets 8
    bits, as in an export, unless all is to be `exact`.

    source: the model.
    quantize: a name of engines.torch.linears.QUANTIZATIONS, or None.
    exact: keep a head of floats as it is.

    Raises EngineError if the weights do not have more bits than `quantize` makes.
    """
    decoder, lm = source.manifest.decoder, source.lm
    stored = decoder.precision if decoder.block_size else ""
    weights: Weights = BundleWeights(source.path, source.manifest)
    if lm:
        bits = {key: lm.bits(key) for key in lm.shapes if key != "word_embeddings.weight"}
        blocks = {key: n for key, n in bits.items() if n}
        if quantize and blocks:
            most = max(blocks.values())
            stored = f"int{most}" if most < QUANTIZATIONS[quantize] else ""
        elif blocks and not exact:
            blocks = {HEAD: 8, **blocks}
        weights = CheckpointWeights(lm, {} if quantize else blocks)
    if quantize and stored:
        raise EngineError(
            f"{source.path}: its weights are {stored} already; expected more bits to make "
            f"{quantize} of: load it without quantize"
        )
    return weights


def build(
    config: LMConfig,
    weights: Weights,
    *,
    positions: int,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    rounded_rotary: bool = False,
) -> Decoder:
    """Build the decoder with its weights on a device; one tensor at a time is brought there.

    config: its shape.
    weights: its weights.
    positions: rows of the rotary table.
    dtype: what it computes in.
    device: where it runs.
    quantize: how to quantize float weights: a name of engines.torch.linears.QUANTIZATIONS.
    rounded_rotary: see rotary.rotary_tables.

    Raises EngineError, CheckpointError for numbers that are too large for `dtype`.
    """
    traits = TRAITS[config.family]
    tables = torch.from_numpy(traits.tables(config, positions, rounded=rounded_rotary))
    padding = weights.head // 2 // traits.rows - tables.shape[-1]  # rotates zeros
    with torch.device("meta"):
        decoder = Decoder(config, weights.head, torch.empty(0))
    decoder.rotary = F.pad(tables, (0, padding)).to(device)
    few_bits = bitsandbytes_linear(quantize, dtype) if quantize not in (None, "int4") else None

    def tensor(array: np.ndarray | Tensor) -> Tensor:
        if isinstance(array, Tensor):
            return array
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def placed(array: np.ndarray | Tensor, to: torch.dtype = dtype) -> Tensor:
        # moved to the device as it is stored; converted and reordered only there
        stored = tensor(array)
        if stored.is_contiguous():
            return stored.to(device).to(to)
        made = torch.empty(stored.shape, dtype=to, device=device)
        columns = max(1, CHUNK // len(stored))  # columns of a transposed matrix lie side by side
        for i in range(0, stored.shape[1], columns):
            made[:, i : i + columns] = stored[:, i : i + columns].to(device)
        return made

    def numbers(given: LoadedTensor) -> Tensor:
        made = placed(given.arrays[0])
        if dtype == torch.float16 and given.place and not made.isfinite().all():
            check_half(made.cpu().numpy(), given.place)
        return made

    for given in weights.tensors():
        name, _, kind = given.key.rpartition(".")
        module = decoder.get_submodule(name)
        linear, bits = len(given.arrays[0].shape) > 1, given.bits
        if quantize == "int4" and linear:
            bits = 4
        if bits:
            zeros = None
            if len(given.arrays) == 1:
                (weight,) = given.arrays
                stored = quantize_blocks(tensor(weight), bits=bits, block_size=BLOCK, device=device)
            else:
                codes, scales, *more = given.arrays
                stored = placed(codes, torch.uint8), placed(scales, torch.float32)
                zeros = placed(more[0], torch.uint8) if more else None
            inputs = cast(nn.Linear, module).in_features
            linear_ = BlockLinear(*stored, inputs=inputs, bits=bits, zeros=zeros)
            decoder.set_submodule(name, linear_)
        elif few_bits and linear:
            decoder.set_submodule(name, few_bits(numbers(given)))
        else:
            parameter = nn.Parameter(numbers(given), requires_grad=False)
            setattr(module, kind, parameter)
    return decoder.eval().requires_grad_(False)
