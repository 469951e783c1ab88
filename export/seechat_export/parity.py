"""Checks a written bundle against the torch networks, stage by stage.

The decoder is run in torch one layer at a time, so that the check of a 6B model needs the memory of
one layer. Two runs go side by side: one over the weights as the bundle stores them, which must
agree with the bundle, and one over the checkpoint's own, which tells what the precision cost.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_export.graphs import Item
from seechat_export.quantize import restored_tensor
from seechat_lite.engines.onnx import OnnxEngine
from seechat_lite.nn.chatglm import Block, prefix_mask
from seechat_lite.prompt import Prompt, position_ids
from seechat_lite.rotary import rotary_tables
from seechat_weights.bundle import LMConfig, Manifest, VisionConfig
from seechat_weights.errors import BundleError, CheckpointError
from seechat_weights.precisions import PRECISIONS

CONTEXT, ANSWER = 22, 5  # tokens of the check's prompt before [gMASK], and after <sop>

# Largest difference allowed, relative to the standard deviation of the torch result. Quantized
# products also round their inputs to 8 bits a block, and fp16 vision rounds its weights.
TOLERANCE = {"fp32": 2e-3, "fp16": 2e-3, "int8": 0.5, "int4": 0.5}
VISION_TOLERANCE = {"fp32": 2e-3, "fp16": 5e-2}


class Weights(Protocol):
    """Where tensors come from: seechat_export.export.Source."""

    config: LMConfig

    def tensor(self, key: str) -> Tensor: ...


class VisionCheck:
    """One fixed picture through the torch vision network, kept for comparison with the graph.

    Raises CheckpointError when the network's output does not fit the LM or its own description.
    """

    def __init__(self, module: nn.Module, config: VisionConfig, hidden: int) -> None:
        size = config.pixels.image_size
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(1, 3, size, size, generator=generator)
        with torch.inference_mode():
            self.expected = module(self.pixels)  # [1, tokens, hidden]
        found = list(self.expected.shape)
        if found != [1, config.tokens, hidden]:
            raise CheckpointError(
                f"the vision network gives embeddings {found}, the LM expects "
                f"[1, {config.tokens}, {hidden}]: projector and LM belong to different models"
            )

    def report(self, engine: OnnxEngine, precision: str) -> dict[str, float]:
        found = torch.from_numpy(engine.encode_image(self.pixels.numpy()))
        return _compare("vision", found, self.expected, VISION_TOLERANCE[precision])


def check(
    source: Weights,
    folder: Path,
    manifest: Manifest,
    items: Sequence[Item],
    vision: VisionCheck | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Run the bundle in `folder` and the torch networks on the same inputs; returns the report.

    Raises BundleError when they do not agree.
    """
    lm = source.config
    report: dict[str, Any] = {"precision": manifest.decoder.precision}
    engine = OnnxEngine(folder, manifest, device="cpu", context=CONTEXT + ANSWER + 2)
    try:
        if vision and manifest.vision:
            report["vision"] = vision.report(engine, manifest.vision.precision)
        generator = np.random.default_rng(0)
        words = generator.integers(5, min(lm.gmask_id, lm.mask_id), CONTEXT + ANSWER).tolist()
        ids = [*words[:CONTEXT], lm.gmask_id, lm.bos_id, *words[CONTEXT:]]
        prompt = ids[: CONTEXT + 2]
        rows = [engine.prefill(Prompt(ids=prompt)), *(engine.step(i) for i in ids[CONTEXT + 2 :])]
    finally:
        engine.close()
    found = torch.from_numpy(np.stack(rows))  # [1 + ANSWER, vocab]
    stored, original = _torch_logits(source, folder, manifest, items, ids, progress)
    tolerance = TOLERANCE[manifest.decoder.precision]
    report["decoder"] = _compare("decoder", found, stored, tolerance)
    log_p, log_q = original.log_softmax(-1), found.log_softmax(-1)
    report["against_checkpoint"] = {
        "kl_divergence": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((found.argmax(-1) == original.argmax(-1)).float().mean()),
        "max_difference": float((found - original).abs().max()),
    }
    return report


def _compare(stage: str, found: Tensor, expected: Tensor, tolerance: float) -> dict[str, float]:
    difference = float((found - expected).abs().max())
    deviation = float(expected.std())
    if not difference <= tolerance * deviation:  # catches NaN as well
        raise BundleError(
            f"the written {stage} graph differs from the torch network by {difference:.3g} where "
            f"{tolerance * deviation:.3g} is expected at most: the bundle is not to be trusted; "
            "please report this with your onnxruntime and torch versions"
        )
    return {"max_difference": difference, "standard_deviation": deviation}


@torch.inference_mode()
def _torch_logits(
    source: Weights,
    folder: Path,
    manifest: Manifest,
    items: Sequence[Item],
    ids: Sequence[int],
    progress: Callable[[str, int, int], None],
) -> tuple[Tensor, Tensor]:
    """Logits [1 + ANSWER, vocab] from <sop> on, over the stored and over the original weights."""
    lm, decoder = source.config, manifest.decoder
    precision = PRECISIONS[decoder.precision]
    by_key = {item.key: item for item in items}
    data = np.memmap(folder / f"{decoder.graph}.data", mode="r")

    def stored(key: str) -> Tensor:
        return restored_tensor(by_key[key], data, lm, precision)

    def original(key: str) -> Tensor:
        return source.tensor(key).float()

    positions = position_ids(ids, gmask_id=lm.gmask_id, mask_id=lm.mask_id, bos_id=lm.bos_id)
    tables = torch.from_numpy(rotary_tables(lm.head_size, len(ids)))
    cos, sin = (t[torch.from_numpy(positions)].transpose(0, 1)[None] for t in tables)
    mask = prefix_mask(torch.tensor([ids.index(lm.bos_id)]), len(ids))
    embeds = source.tensor("word_embeddings.weight")[list(ids)].float()[None]
    states = [(stored, embeds), (original, embeds)]
    for i in range(lm.num_layers):
        progress("check", i, lm.num_layers)
        after = []
        for read, x in states:
            with torch.device("meta"):
                block = Block(lm)
            weights = {k: read(f"layers.{i}.{k}") for k in block.state_dict()}
            block.load_state_dict(weights, assign=True)
            after.append((read, block(x, cos, sin, mask, None, 0)))
        states = after
    progress("check", lm.num_layers, lm.num_layers)
    logits = []
    for read, x in states:
        norm = [read(f"final_layernorm.{part}") for part in ("weight", "bias")]
        last = F.layer_norm(x[0, CONTEXT + 1 :], (lm.hidden_size,), *norm, lm.layernorm_epsilon)
        logits.append(last @ read("lm_head.weight").t())
    return logits[0], logits[1]
