"""Computes rotary tables in numpy, for every engine and for the torch networks."""

import numpy as np

from seechat_weights.config import LMConfig


def rotary_tables(head_size: int, length: int, *, rounded: bool = False) -> np.ndarray:
    """Cosines and sines of ChatGLM-6B's rotary angles, float32 [2, length, head_size / 4].

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


def llama_tables(lm: LMConfig, length: int, *, rounded: bool = False) -> np.ndarray:
    """Cosines and sines of LLaMA's rotary angles, float32 [2, length, head_size / 2].

    The numbers i and i + head_size / 2 of a head are rotated by position / theta**(2i / head_size).
    Linear scaling divides the positions. LLaMA-3.1's divides the frequencies, but only the low
    ones, with a smooth passage between (transformers' modeling_rope_utils).

    lm: the decoder's shape.
    length: number of positions.
    rounded: round cosines and sines to half precision, as transformers 4.33 to 4.37 do for a model
        in half precision.
    """
    exponent = np.arange(0, lm.head_size, 2, dtype=np.float32) / np.float32(lm.head_size)
    frequency = 1 / np.float32(lm.rope_theta) ** exponent
    positions = np.arange(length, dtype=np.float32)
    if lm.rope_original:
        waves = lm.rope_original * frequency / (2 * np.pi)  # in the original context
        kept = np.clip((waves - lm.rope_low) / (lm.rope_high - lm.rope_low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / lm.rope_factor)
    else:
        positions /= np.float32(lm.rope_factor)
    angle = positions[:, None] * frequency.astype(np.float32)
    tables = np.stack([np.cos(angle), np.sin(angle)])
    return tables.astype(np.float16).astype(np.float32) if rounded else tables


def rotary_rows(
    tables: np.ndarray, positions: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of tokens, each float32 [tokens, width].

    Each row of positions belongs to an equal share of the width. Of ChatGLM the first half belongs
    to the position in the context, the second half to the position in the answer. This is the order
    of heads in a bundle (see seechat_weights.bundle.layout).

    tables: a family's.
    positions: int64 [rows, tokens].
    width: half the graph's head size; if it pads the pieces of a head, the shares are padded too.
    """
    padding = width // len(positions) - tables.shape[-1]
    rows = np.pad(tables[:, positions], ((0, 0), (0, 0), (0, 0), (0, padding)))
    # from [2, rows, tokens, share]
    cos, sin = rows.transpose(0, 2, 1, 3).reshape(2, -1, width)
    return cos, sin
