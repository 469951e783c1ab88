"""Plans the memory that a model takes of a GPU, before anything is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from seechat_lite.engines.torch.linears import BLOCK, CHUNK, QUANTIZATIONS
from seechat_lite.lm_families import TRAITS
from seechat_lite.memory import Advice, MemoryPlan, smaller_context
from seechat_weights.bundle.layout import HEAD, decoder_layout
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.bundle.precisions import stored_precision

RUNTIME = 150 << 20  # cuBLAS' workspaces, recorded steps, memory that the allocator cannot use


@dataclass(frozen=True)
class TorchPlan(MemoryPlan):
    """A MemoryPlan for a torch device.

    device: the device whose memory it is.
    quantizable: whether fewer bits can be asked for.
    """

    device: str = "cpu"
    quantizable: bool = False

    @property
    def on_host(self) -> bool:
        return self.device == "cpu"


def device_plan(
    manifest: Manifest,
    *,
    context: int,
    dtype_bytes: int,
    quantize: str | None = None,
    blocks: Mapping[str, int] | None = None,
    vision: int = 0,
) -> TorchPlan:
    """The memory plan of a model on a torch device.

    manifest: describes the model.
    context: tokens that the cache has room for, with those of a prefix.
    dtype_bytes: of a number that is computed with.
    quantize: a name of engines.torch.linears.QUANTIZATIONS.
    blocks: bits of published weights that are in blocks (see
        engines.torch.weights.CheckpointWeights).
    vision: bytes of the vision network held beside the decoder. What a picture takes for a moment
        is less than a prompt takes.
    """
    blocks = blocks or {}
    lm, decoder = manifest.lm, manifest.decoder
    precision = stored_precision(
        decoder.precision, head_bits=decoder.head_bits, zeros=decoder.zeros
    )
    weights = 0.0
    for item in decoder_layout(lm, precision, decoder.block_size):
        if item.bits:
            weights += sum(s.nbytes for s in item.stored)
            if len(item.stored) > 2:  # zeros become floats, one a block as the scales are
                weights += item.stored[1].nbytes
        elif bits := blocks.get(item.key):
            (outputs, inputs), scales = item.shape, 1
            count = -(-inputs // BLOCK)
            if item.key == HEAD:  # only the head may be quantized here: others have one scale a row
                scales = count
            weights += outputs * (count * BLOCK * bits / 8 + 4 * scales)
        elif quantize and item.kind == "linear":
            weights += math.prod(item.shape) * QUANTIZATIONS[quantize] / 8
        else:
            weights += math.prod(item.shape) * dtype_bytes
    width, kv_width = (n * lm.padded_head_size for n in (lm.num_heads, lm.kv_heads))
    # what a layer of the longest prompt holds at once: that of the MLP, or of the attention
    mlp = TRAITS[lm.family].inner * lm.inner_size
    rows = context * (4 * lm.hidden_size + max(mlp, 8 * width))
    in_blocks = decoder.block_size or quantize or blocks
    made = CHUNK if in_blocks else 0  # a weight that is made from blocks
    return TorchPlan(
        weights=round(weights),
        cache=2 * lm.num_layers * kv_width * context * dtype_bytes,
        vision=vision,
        workspace=RUNTIME + (rows + made) * dtype_bytes,
        context=context,
    )


def advice(plan: TorchPlan, room: int, *, last: str) -> Advice:
    """The next smaller setting that fits.

    plan: the plan.
    room: bytes that it may take.
    last: returned if no setting fits.
    """
    if plan.vision and plan.total - plan.vision <= room:
        return Advice.load("keep_vision", False)
    per_token = (plan.cache + plan.workspace - RUNTIME) / plan.context
    fixed = plan.total - per_token * plan.context
    if smaller := smaller_context(plan.context, lambda n: fixed + per_token * n <= room):
        return Advice.load("context", smaller)
    if plan.quantizable:
        smaller = Advice.load("quantize", "int4")
        return replace(smaller, text=f"{smaller.text}, or export it with precision int4")
    return Advice(last if plan.on_host else f"{last}, or take a GPU with more memory")
