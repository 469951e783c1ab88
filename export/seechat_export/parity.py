"""Checks a written bundle against the torch networks, stage by stage.

The decoder runs one layer at a time, cut out of its graph, beside the torch network's layer. So the
check of a 6B model needs the memory of one layer. The torch network runs twice. Over the weights as
the bundle stores them, it must agree with the graph after every layer. Over the checkpoint's own
weights, it tells what the precision cost.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_export import reference_chatglm, reference_llama
from seechat_export.decoder_graph import hidden_name
from seechat_export.quantize import restored_tensor
from seechat_export.reference_chatglm import prefix_mask
from seechat_lite.lm_families import TRAITS, framed, ordinary_ids
from seechat_lite.nn.layer_streaming import Streamed
from seechat_lite.onnx_runtime import ort
from seechat_lite.rotary import rotary_rows
from seechat_weights.bundle.arrays import BundleArrays
from seechat_weights.bundle.layout import reordered_prefix
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.bundle.precisions import PRECISIONS, VISION_PRECISIONS, VisionPrecision
from seechat_weights.config import LMConfig, VisionConfig
from seechat_weights.errors import BundleError, CheckpointError
from seechat_weights.lm.checkpoint import ALL, LM, Rows
from seechat_weights.lm.families import LM_FAMILIES

CONTEXT, ANSWER = 22, 5  # words of the check's prompt, and of what follows it
REFERENCES = {"chatglm": reference_chatglm, "llama": reference_llama}
HEAD_ROWS = 8192  # rows of lm_head multiplied at a time


class Weights(Protocol):
    """A source of tensors: seechat_export.export.Source."""

    config: LMConfig
    lm: LM

    def tensor(self, key: str, rows: Rows = ALL) -> Tensor: ...


class VisionCheck:
    """One fixed picture and the torch vision network's embeddings of it, to compare the graph with.

    module: the network, in eval mode.
    config: describes it.
    hidden: the LM's hidden size.

    Raises CheckpointError if the network's output does not fit the LM or its own description.
    """

    def __init__(self, module: nn.Module, config: VisionConfig, hidden: int) -> None:
        size = config.pixels.image_size
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(1, 3, size, size, generator=generator)
        self.question = config.question
        with torch.inference_mode():
            if self.question and isinstance(module, Streamed) and config.network:
                words = config.network.query_words
                self.ids = torch.randint(words, (1, 7), generator=generator)
                self.seen = module.part("tower")(self.pixels)  # [1, positions, width]
                self.expected = module.part("bridge")(self.seen, self.ids)
            else:
                self.expected = module(self.pixels)  # [1, tokens, hidden]
        found = list(self.expected.shape)
        if found != [1, config.tokens, hidden]:
            raise CheckpointError(
                f"the vision network gives embeddings {found}; the LM expected "
                f"[1, {config.tokens}, {hidden}]: projector and LM belong to different models, "
                "name two that were trained together"
            )

    def report(self, path: Path, precision: str) -> dict[str, float]:
        """Compare with the written graph's embeddings of the same picture.

        path: the graph.
        precision: a name of a vision precision.

        Raises BundleError if they do not agree.
        """
        form = VISION_PRECISIONS[precision]
        if self.question is None:
            result = self._run(path, form, {"pixel_values": self.pixels})
            return compare("vision", result, self.expected, form.tolerance)
        result = self._run(path, form, {"pixel_values": self.pixels})
        tower = compare("vision", result, self.seen, form.tolerance)
        feeds = {"seen": self.seen, "question_ids": self.ids}
        result = self._run(path.with_name(self.question.graph), form, feeds)
        bridge = compare("question", result, self.expected, form.tolerance)
        return {**bridge, "tower_max_difference": tower["max_difference"]}

    def _run(self, path: Path, form: VisionPrecision, feeds: dict[str, Tensor]) -> Tensor:
        options = ort.SessionOptions()
        if not form.integers:
            # as written: weights stay in their mapped file and are widened one matrix at a time.
            # Not int8: onnxruntime 1.31 then gives numbers that have nothing to do with the weights
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (found,) = session.run(["image_embeds"], {k: v.numpy() for k, v in feeds.items()})
        return torch.from_numpy(np.asarray(found))


def check(
    source: Weights,
    folder: Path,
    manifest: Manifest,
    vision: VisionCheck | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Run a bundle and the torch networks on the same inputs; returns the report.

    source: the LM that was exported.
    folder: the bundle.
    manifest: the bundle's.
    vision: the check of its vision network, if it has one.
    progress: called with what is being done, how much is done, and how much there is.

    Raises BundleError if they do not agree.
    """
    lm, decoder = source.config, manifest.decoder
    report: dict[str, Any] = {"precision": decoder.precision}
    if vision and manifest.vision:
        path = folder / manifest.vision.graph
        report["vision"] = vision.report(path, manifest.vision.precision)
    generator = np.random.default_rng(0)
    known = ordinary_ids(lm)
    words = generator.integers(known.start, known.stop, CONTEXT + ANSWER).tolist()
    prompt = framed(words[:CONTEXT], lm)
    prefix = None if source.lm.prefix is None else torch.from_numpy(source.lm.prefix).float()
    precision = PRECISIONS[decoder.precision]
    cache = np.dtype(precision.cache_dtype)
    ids = [*prompt, *words[CONTEXT:]]
    stages = _Stages(folder / decoder.graph, lm, ids, len(prompt) - 1, prefix, cache)
    arrays = BundleArrays(folder, manifest)
    by_key = {item.key: item for item in arrays.items}

    def stored(key: str, rows: slice = ALL) -> Tensor:
        return restored_tensor(by_key[key], arrays.stored(by_key[key]), lm, rows=rows)

    def original(key: str, rows: slice = ALL) -> Tensor:
        return source.tensor(key, rows).float()

    tolerance = precision.tolerance
    embeds = source.tensor("word_embeddings.weight", np.array(ids)).float()[None]
    found = x_stored = x_original = embeds  # [1, tokens, hidden]
    report["layers"] = []
    for i in range(lm.num_layers):
        progress("check", i, lm.num_layers)
        found = stages.layer(i, found)
        x_stored = stages.torch_layer(i, x_stored, stored)
        x_original = stages.torch_layer(i, x_original, original)
        report["layers"].append(compare(f"layer {i}", found, x_stored, tolerance))
    progress("check", lm.num_layers, lm.num_layers)
    logits = stages.head(found)  # [1 + ANSWER, vocab]
    report["logits"] = compare("logits", logits, stages.torch_head(x_stored, stored), tolerance)
    truth = stages.torch_head(x_original, original)
    log_p, log_q = truth.double().log_softmax(-1), logits.double().log_softmax(-1)
    report["against_checkpoint"] = {
        "kl_divergence": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((logits.argmax(-1) == truth.argmax(-1)).float().mean()),
        "max_difference": float((logits - truth).abs().max()),
    }
    return report


def compare(stage: str, found: Tensor, expected: Tensor, tolerance: float) -> dict[str, float]:
    """Compare what a graph gives with what its torch network does; returns the difference.

    stage: what is compared, for the error.
    found, expected: of the same shape.
    tolerance: the largest allowed difference, in standard deviations of a token of `expected`.

    Raises BundleError if they differ by more.
    """
    apart = found - expected
    differences = apart.abs().amax(-1)  # of each token
    # A LLaMA's first tokens have single numbers a thousand times those of others, so the deviation
    # is that of most tokens: with that of all, any other token could be wrong unnoticed. Such a
    # token is held to its own length. Differences reach about four times their mean square
    deviation = float(expected.std(-1).median())
    allowed = tolerance * deviation
    near = apart.norm(dim=-1) <= tolerance / 4 * expected.norm(dim=-1)
    difference = float(differences.max())
    if not bool(((differences <= allowed) | near).all()):  # catches NaN too
        raise BundleError(
            f"the written {stage} graph differs from the torch network by {difference:.3g} where "
            f"{allowed:.3g} is expected at most: the bundle is not to be trusted; "
            "please report this with your onnxruntime and torch versions"
        )
    return {"max_difference": difference, "standard_deviation": deviation}


class _Stages:
    """The decoder's stages, cut out of the graph, beside those of the torch network."""

    def __init__(
        self,
        graph: Path,
        lm: LMConfig,
        ids: Sequence[int],
        split: int,
        prefix: Tensor | None,
        cache: np.dtype[Any],
    ) -> None:
        """Prepare.

        split: how many of the ids run in a call of their own, before the rest.
        prefix: as published, [layers, 2, heads, tokens, head_size].
        cache: the type of the cache.
        """
        self.folder = graph.parent
        self.graph = ir.load(graph).graph
        self.lm = lm
        self.split = split
        self.network, traits = REFERENCES[lm.family], TRAITS[lm.family]
        positions, tables = traits.positions(ids, lm), traits.tables(lm, len(ids))
        self.rows = rotary_rows(tables, positions, lm.padded_head_size // 2)
        tables, positions = torch.from_numpy(tables), torch.from_numpy(positions)
        self.cos, self.sin = self.network.angles(tables, positions)
        self.prefix, self.cache = prefix, cache
        self.before = 0 if prefix is None else prefix.shape[3]  # all tokens see the prefix
        mask = prefix_mask(torch.tensor([traits.context(ids, lm)]), len(ids))
        self.mask = F.pad(mask, (self.before, 0), value=True)

    def layer(self, i: int, x: Tensor) -> Tensor:
        """Run one layer of the graph in two calls, of the ids before the split and of the rest."""
        past = [f"past_{part}_{i}" for part in ("key", "value")]
        present = [f"present_{part}_{i}" for part in ("key", "value")]
        shared = ["rotary_cos", "rotary_sin", "rotary_row", "last_index", "total_length"]
        if not LM_FAMILIES[self.lm.family].causal:
            shared.append("bidirectional")
        session = self._cut([hidden_name(i), *shared, *past], [hidden_name(i + 1), *present])
        tokens, before = x.shape[1], self.before
        buffers = np.zeros(
            (2, 1, self.lm.kv_heads, before + tokens, self.lm.padded_head_size), self.cache
        )
        if self.prefix is not None:
            buffers[:, 0, :, :before] = reordered_prefix(self.prefix[i : i + 1].numpy(), self.lm)[0]
        cache = [ort.OrtValue.ortvalue_from_numpy(buffer) for buffer in buffers]
        parts = []
        for start, end in ((0, self.split), (self.split, tokens)):
            binding = session.io_binding()
            for name, value in zip(past, cache, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name, value in zip(present, cache, strict=True):
                binding.bind_ortvalue_output(name, value)
            feeds = (
                x[:, start:end].numpy(),
                *(rows[start:end] for rows in self.rows),
                np.arange(end - start)[None],
                np.array([before + end - 1], np.int32),
                np.array(before + end, np.int32),
                np.array(start == 0),
            )
            for name, value in zip((hidden_name(i), *shared), feeds, strict=False):
                binding.bind_cpu_input(name, np.ascontiguousarray(value).reshape(value.shape))
            binding.bind_output(hidden_name(i + 1))
            session.run_with_iobinding(binding)
            parts.append(torch.from_numpy(binding.get_outputs()[-1].numpy()))
        return torch.cat(parts, 1)

    def head(self, x: Tensor) -> Tensor:
        """The graph's logits from the prompt's last id on, [1 + ANSWER, vocab]."""
        name = hidden_name(self.lm.num_layers)
        session = self._cut([name, "logit_rows"], ["logits"])
        rows = np.arange(self.split, x.shape[1])
        (logits,) = session.run(["logits"], {name: x.numpy(), "logit_rows": rows})
        return torch.from_numpy(np.asarray(logits))

    @torch.inference_mode()
    def torch_layer(self, i: int, x: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Run one layer of the torch network over the weights that `read` returns."""
        with torch.device("meta"):
            block = self.network.Block(self.lm)
        weights = {key: read(f"layers.{i}.{key}") for key in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        cache = None
        if self.prefix is not None:
            room = (0, 0, 0, x.shape[1])
            cache = tuple(F.pad(part[None], room) for part in self.prefix[i])
        return block(x, self.cos, self.sin, self.mask, cache, self.before)

    @torch.inference_mode()
    def torch_head(self, x: Tensor, read: Callable[..., Tensor]) -> Tensor:
        """The torch network's logits [1 + ANSWER, vocab], some rows of lm_head at a time."""
        with torch.device("meta"):
            norm = self.network.final_norm(self.lm)
        weights = {key: read(f"final_layernorm.{key}") for key in norm.state_dict()}
        norm.load_state_dict(weights, assign=True)
        last = norm(x[0, self.split :])
        starts = range(0, self.lm.vocab_size, HEAD_ROWS)
        head = "lm_head.weight"
        return torch.cat([last @ read(head, slice(i, i + HEAD_ROWS)).t() for i in starts], -1)

    def _cut(self, inputs: Sequence[str], outputs: Sequence[str]) -> ort.InferenceSession:
        part = ir.Model(ir.convenience.extract(self.graph, inputs, outputs), ir_version=10)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder)
        )
        proto = ir.to_proto(part).SerializeToString()
        return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
