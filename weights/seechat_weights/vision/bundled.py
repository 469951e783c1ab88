"""Reads a bundle's vision weights by the names of the network's parameters."""

from pathlib import Path

import numpy as np

from seechat_weights.bundle.manifest import Manifest
from seechat_weights.errors import BundleError, CheckpointError
from seechat_weights.files.accounting import FLOATS, Shape, Shapes, account, check_shapes
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.vision.network import parameters
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
        file = open_checkpoint(folder / config.weights)
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
    except CheckpointError as e:
        raise BundleError(f"{e}, or export the bundle again") from None

    def read(name: str) -> np.ndarray:
        key, found = keys[name], file.read(keys[name])
        if key.endswith(CODES):  # [outputs, blocks, block]; 128 stands for zero
            scales = file.read(_scales(key)).astype(np.float32)
            floats = (found.astype(np.float32) - 128) * scales[..., None]
            return floats.reshape(len(floats), -1)[:, : sizes[name][1]]
        return found.T if TRANSPOSED in key else found

    return VisionWeights(config, outputs, sizes, read)


def _stored_as(name: str, shapes: Shapes) -> str:
    kinds = (HALF, TRANSPOSED, TRANSPOSED + HALF, TRANSPOSED + CODES)
    return next((name + kind for kind in kinds if name + kind in shapes), name)


def _scales(codes: str) -> str:
    return codes.removesuffix(CODES) + SCALES + HALF
