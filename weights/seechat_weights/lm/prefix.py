"""Reads a P-tuning v2 prefix: trained keys and values that stand before every prompt.

The prefix encoder of ChatGLM-6B computes the prefix from the numbers 0, 1, ... Each number selects
a row of an embedding table. A row is as wide as the keys and values of all layers, or a small
network (prefix_projection) makes it so. Training starts the prefix at random, so a prefix without
weights is never made up.
"""

from collections.abc import Mapping

import numpy as np

from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, account, check_shapes
from seechat_weights.files.checkpoint import Checkpoint

_ROWS = 4096  # outputs of the projection computed at a time: all of them would take 3.8 GB


def read_prefix(
    checkpoint: Checkpoint, names: Mapping[str, str], config: LMConfig, *, where: str
) -> np.ndarray:
    """Read a prefix, float32 [layers, 2 (key, value), heads, tokens, head_size].

    The heads are as published.

    checkpoint: holds the encoder's tensors.
    names: a name within the prefix encoder -> published tensor; SAT's are the published ones.
    config: the LM's shape.
    where: the checkpoint's path, for errors.

    Raises CheckpointError; it names missing, surplus and misshapen tensors.
    """
    if any(name.startswith("mixins.") for name in names):
        return _sat_prefix(checkpoint, names, config, where)
    shapes = {key: checkpoint.shapes[key] for key in names.values()}
    name, key = next(iter(names.items()))
    encoder = key.removesuffix(name)
    hidden, width = config.hidden_size, 2 * config.num_layers * config.hidden_size
    expected: dict[str, Shape] = {"embedding.weight": (0, width)}
    if any(name.startswith("trans.") for name in names):
        expected = {
            "embedding.weight": (0, hidden),
            "trans.0.weight": (hidden, hidden),
            "trans.0.bias": (hidden,),
            "trans.2.weight": (width, hidden),
            "trans.2.bias": (width,),
        }
    account(shapes, [encoder + k for k in expected], (), where)
    tokens = _tokens(shapes[f"{encoder}embedding.weight"].shape, 0, config, where)
    expected["embedding.weight"] = (tokens, expected["embedding.weight"][1])
    check_shapes(shapes, {encoder + k: shape for k, shape in expected.items()}, where)

    def read(name: str) -> np.ndarray:
        return checkpoint.read(names[name])

    rows = read("embedding.weight").astype(np.float32)
    if "trans.0.weight" in names:
        first = read("trans.0.weight").astype(np.float32)
        inner = np.tanh(rows @ first.T + read("trans.0.bias").astype(np.float32))
        last, bias = read("trans.2.weight"), read("trans.2.bias").astype(np.float32)
        rows = np.concatenate(
            [inner @ last[i : i + _ROWS].astype(np.float32).T for i in range(0, width, _ROWS)], 1
        )
        rows += bias
    # [tokens, layers, 2, heads, head_size]
    split = rows.reshape(tokens, config.num_layers, 2, config.num_heads, config.head_size)
    return np.ascontiguousarray(split.transpose(1, 2, 3, 0, 4))


def _sat_prefix(
    checkpoint: Checkpoint, names: Mapping[str, str], config: LMConfig, where: str
) -> np.ndarray:
    """Read SAT's prefix: one tensor a layer, [2, heads, tokens, head_size]."""
    keys = [f"mixins.ptuning.prefix.{i}" for i in range(config.num_layers)]
    shapes = {key: checkpoint.shapes[key] for key in names.values()}
    account(shapes, keys, (), where)
    tokens = _tokens(shapes[keys[0]].shape, 2, config, where)
    shape = (2, config.num_heads, tokens, config.head_size)
    check_shapes(shapes, dict.fromkeys(keys, shape), where)
    return np.stack([checkpoint.read(key).astype(np.float32) for key in keys])


def _tokens(shape: Shape, axis: int, config: LMConfig, where: str) -> int:
    tokens = shape[axis] if len(shape) > axis else 0
    if not 0 < tokens < config.max_sequence_length:
        raise CheckpointError(
            f"{where}: the prefix has {tokens} tokens; expected 1 to "
            f"{config.max_sequence_length - 1}: name the right checkpoint"
        )
    return tokens
