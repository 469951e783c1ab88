"""What a model takes of a GPU's memory, known before anything is loaded."""

import math
from dataclasses import replace

from seechat_lite.memory import MemoryPlan, smaller_context
from seechat_lite.nn.linears import CHUNK, QUANTIZATIONS
from seechat_weights.bundle import Manifest
from seechat_weights.layout import decoder_layout
from seechat_weights.precisions import PRECISIONS

RUNTIME = 150 << 20  # cuBLAS' workspaces, recorded steps, what an allocator cannot use


def device_plan(
    manifest: Manifest, *, context: int, dtype_bytes: int, quantize: str | None = None
) -> MemoryPlan:
    """Bytes of the decoder at a context of `context` tokens, those of a prefix included.

    dtype_bytes: of a number that is computed with. quantize: a name of nn.linears.QUANTIZATIONS.
    """
    lm, decoder = manifest.lm, manifest.decoder
    precision = replace(PRECISIONS[decoder.precision], head_bits=decoder.head_bits)
    weights = 0.0
    for item in decoder_layout(lm, precision, decoder.block_size):
        if item.bits:
            weights += sum(s.nbytes for s in item.stored)
        elif quantize and item.kind == "linear":
            weights += math.prod(item.shape) * QUANTIZATIONS[quantize] / 8
        else:
            weights += math.prod(item.shape) * dtype_bytes
    width = lm.num_heads * lm.padded_head_size
    # what a layer of the longest prompt holds at once: the MLP's, or the attention's
    rows = context * (4 * lm.hidden_size + max(2 * lm.inner_size, 8 * width))
    made = CHUNK if decoder.block_size or quantize else 0  # a weight that is made of blocks
    return MemoryPlan(
        weights=round(weights),
        cache=2 * lm.num_layers * width * context * dtype_bytes,
        vision=0,
        workspace=RUNTIME + (rows + made) * dtype_bytes,
        context=context,
    )


def advice(plan: MemoryPlan, manifest: Manifest, room: int, quantize: str | None) -> str:
    """The next smaller setting that fits `room` bytes, in words."""
    per_token = (plan.cache + plan.workspace - RUNTIME) / plan.context
    fixed = plan.total - per_token * plan.context
    if smaller := smaller_context(plan.context, lambda n: fixed + per_token * n <= room):
        return f"load it with context={smaller} (--context {smaller})"
    if manifest.decoder.block_size == 0 and quantize is None:
        return 'load it with quantize="nf4" (--quantize nf4), or export it with --precision int4'
    return "close other programs, or take a card with more memory"
