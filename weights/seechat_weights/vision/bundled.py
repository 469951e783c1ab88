"""Reads a bundle's vision weights by the names of the network's parameters."""

from pathlib import Path

import numpy as np

from seechat_weights.bundle.manifest import Manifest
from seechat_weights.errors import BundleError, CheckpointError
from seechat_weights.files.accounting import FLOATS, Shape, Shapes, account, check_shapes
from seechat_weights.files.checkpoint import Checkpoint, open_checkpoint
from seechat_weights.vision.network import BRIDGE, parameters
from seechat_weights.vision.weights import VisionWeights

# suffixes of a parameter's name: how it is stored
TRANSPOSED, HALF, CODES, SCALES = ".T", ".fp16", ".codes", ".scales"
BLOCK_SIZE = 32  # numbers that share a scale in 8 bits


def bundled_vision(folder: Path, manifest: Manifest) -> VisionWeights | None:
    """A bundle's vision network and weights; None if it has none, or only the graph describes it.

    Weights in 8 bits are read as the floats that they stand for.

    folder: the bundle's folder.
    manifest: its manifest.

    Raises BundleError.
    """
    config = manifest.vision
    if config is None or config.network is None:
        return None
    outputs = manifest.lm.hidden_size
    sizes = parameters(config, outputs)
    try:
        parts = {config.weights: sizes}
        if config.question:  # the bridge has a graph of its own
            bridge = {k: s for k, s in sizes.items() if k.startswith(BRIDGE)}
            tower = {k: s for k, s in sizes.items() if k not in bridge}
            parts = {config.weights: tower, config.question.weights: bridge}
        found = [_open(folder / name, part) for name, part in parts.items()]
    except CheckpointError as e:
        raise BundleError(f"{e}, or export the bundle again") from None
    places = {name: (file, key) for file, keys in found for name, key in keys.items()}

    def read(name: str) -> np.ndarray:
        file, key = places[name]
        stored = file.read(key)
        if key.endswith(CODES):  # [outputs, blocks, block]; 128 stands for zero
            scales = file.read(_scales(key)).astype(np.float32)
            floats = (stored.astype(np.float32) - 128) * scales[..., None]
            return floats.reshape(len(floats), -1)[:, : sizes[name][1]]
        return stored.T if TRANSPOSED in key else stored

    return VisionWeights(config, outputs, sizes, read)


def _open(path: Path, sizes: dict[str, Shape]) -> tuple[Checkpoint, dict[str, str]]:
    """Open a file of weights; returns it with the name of each parameter in it."""
    file = open_checkpoint(path)
    keys = {name: _stored_as(name, file.shapes) for name in sizes}
    expected: dict[str, Shape] = {}
    for name, (rows, *others) in sizes.items():
        key = keys[name]
        if key.endswith(CODES):
            blocks = -(-others[0] // BLOCK_SIZE)
            expected |= {key: (rows, blocks, BLOCK_SIZE), _scales(key): (rows, blocks)}
        else:
            expected[key] = (*others, rows) if TRANSPOSED in key else (rows, *others)
    account(file.shapes, expected, (), str(file.path))
    check_shapes(file.shapes, expected, str(file.path), dtypes=(*FLOATS, "uint8"))
    return file, keys


def _stored_as(name: str, shapes: Shapes) -> str:
    kinds = (HALF, TRANSPOSED, TRANSPOSED + HALF, TRANSPOSED + CODES)
    return next((name + kind for kind in kinds if name + kind in shapes), name)


def _scales(codes: str) -> str:
    return codes.removesuffix(CODES) + SCALES + HALF
