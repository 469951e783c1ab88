"""Rounds weights to blocks so that a layer's outputs stay, not so that each weight does.

What counts is the error of the product: (w - q) H (w - q), with H the second moments of the inputs.
Inputs are taken in order. Each is rounded, and its error is made up for by the inputs after it, as
far as these go along with it (the optimal brain surgeon's update; GPTQ). The scale of a block is
fitted when its turn comes, to the weights as they are by then, each weighted by what its error
would cost after all that can be made up for.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from seechat_lite.nn.block_quantization import block_codes, block_scales

SPAN = 4096  # inputs whose moments are taken together; those of others count as independent
DAMPING = 0.1  # of the mean second moment, added to each: what was never seen may still come
ATTEMPTS = 5  # with ten times the damping each
ROWS = 1024  # outputs rounded at a time by a core
STRIP = 32  # inputs whose errors are handed on one by one; to those behind, together


class Moments:
    """Second moments of a linear's inputs, of spans of them.

    inputs: the linear's width.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        sizes = [min(SPAN, inputs - i) for i in range(0, inputs, SPAN)]
        self.spans = [torch.zeros(size, size) for size in sizes]
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count inputs in.

        x: float32 [..., inputs].
        """
        x = x.flatten(0, -2)
        self.tokens += len(x)
        for i, span in enumerate(self.spans):
            part = x[:, i * SPAN : (i + 1) * SPAN]
            span.addmm_(part.t(), part)

    def reordered(self, order: Tensor) -> "Moments":
        """The same, of inputs in another order.

        order: the old place of each new one; -1 for one that is always 0. What goes from one span
            to another counts as independent.
        """
        moved = Moments(len(order))
        moved.tokens = self.tokens
        for span, places in zip(moved.spans, order.split(SPAN), strict=True):
            for i, old in enumerate(self.spans):
                here = ((places >= i * SPAN) & (places < i * SPAN + len(old))).nonzero()[:, 0]
                taken = places[here] - i * SPAN
                span[here[:, None], here] = old[taken[:, None], taken]
        return moved


def rounded_blocks(
    weight: Tensor, moments: Moments, *, bits: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Quantize a weight for inputs with these moments; returns what quantize_blocks returns.

    weight: [outputs, inputs].
    moments: of its inputs.
    bits: 8 or 4.
    block_size: inputs that share a scale.
    """
    outputs, inputs = weight.shape
    blocks, width = -(-inputs // block_size), block_size * bits // 8
    codes = torch.empty((outputs, blocks, width), dtype=torch.uint8)
    scales = torch.empty((outputs, blocks))
    threads = torch.get_num_threads()
    for start, span in zip(range(0, inputs, SPAN), moments.spans, strict=True):
        columns = slice(start, start + len(span))
        places = slice(start // block_size, -(-columns.stop // block_size))
        factor = _factor(span)

        def work(i: int, columns: slice = columns, places: slice = places) -> None:
            part = weight[i : i + ROWS, columns].float()
            found = _round_rows(part, factor, bits, block_size)  # noqa: B023  ended below
            codes[i : i + ROWS, places], scales[i : i + ROWS, places] = found

        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            deque(pool.map(work, range(0, outputs, ROWS)), maxlen=0)
        torch.set_num_threads(threads)
    return codes, scales


def _factor(moments: Tensor) -> Tensor:
    """The upper triangle U with U^T U the inverse of the damped moments.

    Row j, over its diagonal, is how an error of input j is spread over those behind it; the
    diagonal's inverse square is what an error costs then.
    """
    size = len(moments)
    diagonal = moments.diag()
    mean = float(diagonal.mean()) or 1.0
    if not math.isfinite(mean):
        return torch.eye(size)
    damping = DAMPING * mean
    never = torch.where(diagonal > 0, 0.0, mean)  # an input that is always 0 could be anything
    for _ in range(ATTEMPTS):
        # mirrored: the Cholesky factor of the inverse is the inverse of that of the mirror image
        damped = moments + (never + damping).diag()
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            break
        damping *= 10
    else:  # inputs beyond all bounds tell nothing: each weight is rounded for itself
        return torch.eye(size)
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(size), upper=True)


def _round_rows(
    weight: Tensor, factor: Tensor, bits: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Codes [rows, blocks, bytes] and scales [rows, blocks] of some rows."""
    rows, inputs = weight.shape
    middle = 2 ** (bits - 1)
    left = weight.t().contiguous()  # [inputs, rows]: what is still to be rounded
    codes, scales = [], []
    for begin in range(0, inputs, block_size):
        end = min(begin + block_size, inputs)
        padding = (0, begin + block_size - end)
        costs = F.pad(factor.diagonal()[begin:end].square().reciprocal(), padding)
        block = F.pad(left[begin:end].t(), padding)[:, None].contiguous()
        scale = block_scales(block, bits=bits, weights=costs)[:, 0, 0]  # [rows]
        values = torch.zeros(block_size, rows)
        errors = torch.empty(end - begin, rows)
        for strip in range(begin, end, STRIP):
            last = min(strip + STRIP, end)
            for j in range(strip, last):
                value = (left[j] / scale).round_().clamp_(-middle, middle - 1)
                values[j - begin] = value
                error = (left[j] - value * scale) / factor[j, j]
                errors[j - begin] = error
                if j + 1 < last:
                    left[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
            if last < end:
                spread = factor[strip:last, last:end].t()
                left[last:end].addmm_(spread, errors[strip - begin : last - begin], alpha=-1)
        if end < inputs:
            left[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
        codes.append(block_codes(values.t().contiguous(), bits=bits))
        scales.append(scale)
    return torch.stack(codes, 1), torch.stack(scales, 1)
