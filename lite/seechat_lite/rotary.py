"""Computes ChatGLM-6B's rotary tables in numpy, for every engine and for the torch network."""

import numpy as np


def rotary_tables(head_size: int, length: int, *, rounded: bool = False) -> np.ndarray:
    """Cosines and sines of the rotary angles, float32 [2, length, head_size / 4].

    Each half of a head (head_size / 2 numbers) is rotated in pairs (i, i + head_size / 4) by
    position * 10000**(-4i / head_size). The inverse frequencies are rounded to half precision, as
    the published model's buffers are.

    head_size: numbers in a head, without padding.
    length: number of positions.
    rounded: also round the angles and their cosines and sines, as the published code does in half
        precision. Far from the beginning of a context the cosines are then quite different; real
        weights have been served with these.
    """
    half = head_size // 2
    frequency = 10000.0 ** (-np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    frequency = frequency.astype(np.float16).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    if not rounded:
        return np.stack([np.cos(angle), np.sin(angle)])
    angle = angle.astype(np.float16).astype(np.float32)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float16).astype(np.float32)


def rotary_rows(
    tables: np.ndarray, positions: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of tokens, each float32 [tokens, width].

    The first half of a row belongs to the position in the context, the second half to the position
    in the answer. This is the order of heads in a bundle (see seechat_weights.bundle.layout).

    tables: from rotary_tables.
    positions: int64 [2, tokens].
    width: half the graph's head size; if it pads the quarters of a head, the rows are padded too.
    """
    padding = width // 2 - tables.shape[-1]
    rows = np.pad(tables[:, positions], ((0, 0), (0, 0), (0, 0), (0, padding)))
    cos, sin = rows.transpose(0, 2, 1, 3).reshape(2, -1, width)  # from [2, 2, tokens, width / 2]
    return cos, sin
