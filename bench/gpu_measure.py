"""The stages of bench/gpu.py: correctness first, then speeds and memory at full size."""

import contextlib
import gc
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_shapes import (
    BLOCK,
    FORMS,
    FORMS_OF,
    FULL,
    ROOT,
    Blocks,
    RandomWeights,
    Shape,
    cache_bytes,
    manifest_of,
    parameter_bytes,
    picture,
    random_vision,
)
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.engines import Engine, create
from seechat_lite.engines.base import EngineOptions
from seechat_lite.engines.torch.engine import TorchEngine
from seechat_lite.engines.torch.linears import Linear
from seechat_lite.engines.torch.vision import TorchVision
from seechat_lite.engines.torch.weights import CheckpointWeights, Weights
from seechat_lite.prompt import Prompt
from seechat_lite.prompt_lookup import LONGEST
from seechat_lite.source import Source, open_source
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.layout import decoder_layout
from seechat_weights.bundle.manifest import Manifest, read_manifest
from seechat_weights.bundle.precisions import PRECISIONS
from seechat_weights.config import ALPHA, LMConfig
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.vision.blip_names import BlipSettings
from seechat_weights.vision.weights import VisionWeights, load_clip, load_seechat

DATA = ROOT / "tests/data"
PATIENCE = 4  # seconds for the runs of one figure
# what writes a bundle of random weights imports
WRITING = ("onnx_ir", "safetensors", "sentencepiece", "filelock", "tqdm")
MEMORY = Path("/dev/shm")


def in_memory(shape: LMConfig, precision: str) -> Path | None:
    """A folder whose files are in memory, with room for a bundle of this shape; else None.

    Small bundles may lie anywhere.
    """
    size = decoder_layout(shape, PRECISIONS[precision], BLOCK if PRECISIONS[precision].block else 0)
    needed = 1.2 * (size[-1].end + 2 * shape.vocab_size * shape.hidden_size)  # with embeddings
    if needed < 1 << 30:
        return Path(tempfile.gettempdir())
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > needed else None


class Measuring:
    """The stages. What each finds goes to `found`, and `save` is called after every figure.

    save: called with nothing; a stage that is ended from outside has lost what came after it.
    """

    def __init__(
        self, device: torch.device, shape: Shape, found: dict[str, Any], save: Callable[[], None]
    ) -> None:
        self.device = device
        self.shape = shape
        self.found = found
        self.save = save
        self.skipped: dict[str, str] = found.setdefault("skipped", {})  # what, and why
        self.failed = False  # a part of the stage
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.float16 if self.on_gpu else torch.float32

    def run(self, stage: str) -> None:
        if stage == "correctness":
            self._rows("correctness", self.correctness())
            with self._part("both engines"):
                self._rows("correctness", self.both_engines())
            return
        if stage == "budgets":
            self._rows("budgets", self.budgets())
            return
        self.found["rates"] = self.rates()
        self.save()
        if stage == "vision":
            with self._part("vision"):
                self.pictures_at_full_size()
        elif stage == "onnx":
            with self._part("a bundle"):
                self.bundle()
        else:
            for form in FORMS_OF[stage]:
                if self.installed(form):
                    with self._part(form):
                        self.model(form)

    def _rows(self, key: str, rows: Iterable[dict[str, Any]]) -> None:
        kept = self.found.setdefault(key, [])
        for row in rows:
            kept.append(row)
            self.save()

    @contextlib.contextmanager
    def _part(self, what: str) -> Iterator[None]:
        """A fault in one part does not cost the others their figures."""
        try:
            yield
        except Exception as e:
            traceback.print_exc()
            self.failed = True
            self.skipped[what] = f"{type(e).__name__}: {(str(e) or '?').splitlines()[0]}"
        self.save()

    @cached_property
    def vision(self) -> VisionWeights | None:
        """The vision network that goes with the language model; None without transformers."""
        if not find_spec("transformers"):
            self.skipped["vision"] = "transformers is not installed"
            return None
        config = next(iter(self.shape.vision.values()))
        return random_vision(config, self.shape.config.hidden_size, self.device)

    def installed(self, form: str) -> bool:
        if form.startswith("bitsandbytes") and not find_spec("bitsandbytes"):
            self.skipped[form] = "bitsandbytes is not installed"
        return form not in self.skipped

    def correctness(self) -> Iterator[dict[str, Any]]:
        """Each precision on the device against plain float32 on the CPU, the same weights."""
        lm = open_lm(DATA / "chatglm_tiny")
        files = [DATA / f"chatglm_tiny/case_{name}.safetensors" for name in ("p1", "p8_long")]
        cases = [open_checkpoint(file).read("input_ids")[0].tolist() for file in files]
        rows: list[tuple[str, Weights, dict[str, Any], float]] = [
            ("fp32", CheckpointWeights(lm), {"dtype": "fp32"}, 5e-4),
            ("fp16", CheckpointWeights(lm), {"dtype": "fp16"}, 0.1),
            ("bf16", CheckpointWeights(lm), {"dtype": "bf16"}, 0.6),
        ]
        for bits in (8, 4):
            blocks = Blocks(CheckpointWeights(lm), bits)
            rows.append((f"int{bits} fp32", blocks, {"dtype": "fp32"}, 5e-4))
            rows.append((f"int{bits} fp16", blocks, {"dtype": "fp16"}, 0.1))
        rows.append(("quantize int4", CheckpointWeights(lm), {"quantize": "int4"}, 0.1))
        # 4 bits are few for a model of width 64, whose logits deviate by 2.5
        for kind, bar in (("int8", 1.0), ("nf4", 6.0), ("fp4", 8.0)):
            if self.installed(f"bitsandbytes {kind}"):
                rows.append(
                    (f"bitsandbytes {kind}", CheckpointWeights(lm), {"quantize": kind}, bar)
                )
        if find_spec("transformers"):
            yield from self.small_pictures()
        manifest = manifest_of(lm.config, "fp16")
        for name, weights, chosen, bar in rows:
            with self._part(name):
                row = self.compared(manifest, weights, chosen, cases)
                yield {"what": name, **row, "bar": bar, "ok": row["error"] <= bar}

    def small_pictures(self) -> Iterator[dict[str, Any]]:
        """Small published vision networks on the device, against recorded embeddings."""
        folder = DATA / "vision"
        clip = load_clip(
            clip=folder / "clip_open_clip", projector=folder / "mm_projector_linear.bin"
        )
        eva = load_seechat(
            eva=folder / "eva_vit_tiny.pth",
            qformer=folder / "blip2_tiny_flant5.pth",
            checkpoint=folder / "checkpoint_100.pth",
            settings=BlipSettings(blocks=3, heads=4, query_heads=4),
        )
        for name, vision, file, key in (
            ("CLIP, linear", clip, "case", "projected_linear"),
            ("EVA, Q-Former", eva, "seechat_case_q32", "encode_img"),
        ):
            case = open_checkpoint(folder / f"{file}.safetensors")
            image, expected = case.read("image"), case.read(key)
            for kind, dtype, bar in (("fp32", torch.float32, 5e-4), ("fp16", torch.float16, 0.1)):
                what = f"a picture: {name}, {kind}"
                sees = TorchVision(vision, device=self.device, dtype=dtype, keep=True)
                with self._part(what):
                    error = float(np.abs(sees.encode(image) - expected).max())
                    yield {"what": what, "error": error, "bar": bar, "ok": error <= bar}

    def compared(
        self, manifest: Manifest, weights: Weights, chosen: dict[str, Any], cases: list[list[int]]
    ) -> dict[str, float]:
        """How far an engine on the device is from float32 on the CPU, on the same weights."""
        errors, same = [], []
        source = Source(ROOT, manifest, ROOT)
        # our own blocks are the same everywhere; bitsandbytes' are set against the float weights
        same_blocks = "int4" if chosen.get("quantize") == "int4" else None
        for ids in cases:
            expected, found = (
                answers(TorchEngine(source, context=300, options=o, weights=weights), ids)
                for o in (
                    EngineOptions(device="cpu", dtype="fp32", quantize=same_blocks),
                    EngineOptions(device=self.device.type, **chosen),
                )
            )
            errors.append(float(np.abs(expected - found).max()))
            same += list(expected.argmax(-1) == found.argmax(-1))
        return {"error": max(errors), "same token": sum(same) / len(same)}

    def both_engines(self) -> Iterator[dict[str, Any]]:
        """Bundles through ONNX Runtime and through torch, against torch on the CPU."""
        for name, folder in self.small_bundles():
            manifest = read_manifest(folder)
            lm = manifest.lm
            ids = [*range(20, 60), lm.gmask_id, lm.bos_id]

            def run(
                engine: str,
                device: str,
                dtype: str | None,
                folder: Path = folder,
                manifest: Manifest = manifest,
                ids: list[int] = ids,
            ) -> np.ndarray:
                options = EngineOptions(device=device, dtype=dtype)
                return answers(
                    create(engine, open_source(folder), context=100, options=options), ids
                )

            expected = run("torch", "cpu", "fp32")
            runs: list[tuple[str, str, str | None]] = [("torch", self.device.type, "fp32")]
            if find_spec("onnxruntime"):
                runs.append(("onnx", "cpu", None))
            if self.onnx_device() == "cuda":
                runs += [("onnx", "cuda", None), ("onnx", "cuda", "fp32")]
            for engine, device, dtype in runs:
                found = run(engine, device, dtype)
                error = float(np.abs(found - expected).max() / expected.std())
                yield {
                    "what": f"{name}, {engine} on {device} {dtype or ''}".strip(),
                    "error": error,
                    "bar": 0.2,  # of a deviation: integer products round what they multiply
                    "same token": float((found.argmax(-1) == expected.argmax(-1)).mean()),
                    "ok": error <= 0.2,
                }

    def small_bundles(self) -> Iterator[tuple[str, Path]]:
        """Names and folders."""
        yield "built-in bundle", BUILTIN
        shape = replace(FULL, hidden_size=512, num_heads=4, inner_size=2048, num_layers=2)
        for precision in ("fp16", "int8", "int4"):
            with self.synthetic(shape, precision) as folder:
                if folder:
                    yield f"{precision} bundle", folder

    @contextlib.contextmanager
    def synthetic(self, shape: LMConfig, precision: str) -> Iterator[Path | None]:
        """A folder with a bundle of random weights; None where what writes it is missing."""
        if missing := [name for name in WRITING if not find_spec(name)]:
            self.skipped["bundles of random weights"] = f"{', '.join(missing)}: not installed"
            yield None
            return
        if not (place := in_memory(shape, precision)):
            self.skipped[f"{precision} bundle"] = "/dev/shm has no room, and nothing goes to a disk"
            yield None
            return
        from seechat_export.synthetic import write_synthetic_bundle

        with tempfile.TemporaryDirectory(dir=place) as temporary:
            folder = Path(temporary) / "bundle"
            layers = shape.num_layers
            write_synthetic_bundle(folder, precision=precision, layers=layers, shape=shape)
            yield folder

    def onnx_device(self) -> str | None:
        """Where ONNX Runtime is measured: beside the torch engine, or nowhere."""
        if not find_spec("onnxruntime"):
            self.skipped["onnxruntime"] = "it is not installed"
            return None
        if not self.on_gpu:
            return "cpu"
        from seechat_lite.onnx_runtime import ort

        if "CUDAExecutionProvider" in ort.get_available_providers():
            return "cuda"
        self.skipped["onnxruntime on CUDA"] = "this ONNX Runtime has no CUDA provider"
        return None

    def rates(self) -> dict[str, float]:
        """Copy bandwidth, bytes read and written in GB/s, and the matrix product in TFLOP/s."""
        count, side = self.shape.copied, self.shape.side
        a = torch.empty(count, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        copy = self.median(lambda: b.copy_(a))
        x = torch.randn((side, side), device=self.device).to(self.dtype)
        product = self.median(lambda: x @ x)
        return {"GB/s": 2 * count / copy / 1e9, "TFLOP/s": 2 * side**3 / product / 1e12}

    def pictures_at_full_size(self) -> None:
        """Each vision network by itself: seconds a picture, and those of the first; bytes held."""
        if not find_spec("transformers"):
            self.skipped["vision"] = "transformers is not installed"
            return
        found = self.found["vision"] = {}
        for name, config in self.shape.vision.items():
            weights = random_vision(config, self.shape.config.hidden_size, self.device)
            sees = TorchVision(weights, device=self.device, dtype=self.dtype, keep=True)
            pixels = picture(config)
            start = time.perf_counter()
            sees.encode(pixels)
            first = time.perf_counter() - start
            seconds = self.median(lambda s=sees, p=pixels: s.encode(p))
            sees.close()
            released = TorchVision(weights, device=self.device, dtype=self.dtype, keep=False)
            found[name] = {
                "seconds": seconds,
                "first seconds": first,
                "bytes": sees.held,
                "released seconds": self.median(lambda s=released, p=pixels: s.encode(p)),
            }
            self.save()

    def look(self, engine: TorchEngine) -> np.ndarray:
        """A picture's embeddings, float32 [tokens, hidden], as the prompt takes them."""
        assert self.vision is not None
        return engine.encode_image(picture(self.vision.config))[0]

    def open(self, form: str, *, context: int = 0, budget: int | None = None) -> TorchEngine:
        precision, quantize, _ = FORMS[form]
        config, vision = self.shape.config, self.vision
        manifest = replace(manifest_of(config, precision), vision=vision.config if vision else None)
        return TorchEngine(
            Source(ROOT, manifest, ROOT, published_vision=vision),
            context=context or self.shape.context,
            options=EngineOptions(device=self.device.type, quantize=quantize, max_memory=budget),
            weights=RandomWeights(config, precision, self.device),
        )

    def model(self, form: str) -> None:
        """All figures of one precision."""
        self.clean()
        shape = self.shape
        found = self.found.setdefault("models", {})[form] = {}
        start = time.perf_counter()
        engine = self.open(form)
        self.wait()
        found["made seconds"] = time.perf_counter() - start
        found["weights bytes"] = stored = parameter_bytes(engine._opened())
        self.speeds(engine, stored, found)
        together = 1 + LONGEST  # a token and as many as are ever guessed

        def extend() -> None:
            engine.extend([5] * together)
            engine.rewind(together)

        engine.prefill(self.prompt(shape.decodes[0]))
        found["tokens at once"] = self.median(extend)
        if self.vision is not None:
            prompt = self.prompt(shape.question)

            def first_token() -> None:
                engine.prefill(Prompt(prompt.ids, [(1, self.look(engine))]))

            found["first token seconds"] = self.median(first_token)
        self.save()
        if self.on_gpu:
            engine.prefill(self.prompt(shape.context - 8))
            engine.step(5)
            found["peak bytes"] = torch.cuda.max_memory_allocated()
            found["peak reserved bytes"] = torch.cuda.max_memory_reserved()
            self.save()
            found["flat"] = self.turns(engine)
            self.save()
        if form == "fp16" or form.startswith("bitsandbytes"):
            found["eager loop"] = self.eager(engine)
        engine.close()

    def speeds(self, engine: Engine, stored: int, found: dict[str, Any]) -> None:
        """Of prompts and steps; stored: bytes that a step reads of the weights."""
        config, rates = self.shape.config, self.found["rates"]
        numbers = sum(
            np.prod(i.shape)
            for i in decoder_layout(config, PRECISIONS["fp16"], 0)
            if len(i.shape) > 1
        )
        found |= {"prefill": {}, "decode": {}}
        for tokens in self.shape.decodes:
            engine.prefill(self.prompt(tokens))
            seconds = self.median(lambda: engine.step(5), runs=16)
            read = stored + tokens * cache_bytes(config) * self.dtype.itemsize / 2
            found["decode"][tokens] = {
                "seconds": seconds,
                "tokens/s": 1 / seconds,
                "share": read / seconds / 1e9 / rates["GB/s"],
            }
            self.save()
        for tokens in self.shape.prefills:
            seconds = self.median(lambda n=tokens: engine.prefill(self.prompt(n)))
            work = 2 * (numbers - config.vocab_size * config.hidden_size) * tokens
            found["prefill"][tokens] = {
                "seconds": seconds,
                "tokens/s": tokens / seconds,
                "share": work / seconds / 1e12 / rates["TFLOP/s"],
            }
            self.save()

    def turns(self, engine: TorchEngine) -> dict[str, int]:
        """Bytes that torch holds after the fifth and after the last of many turns."""
        held = []
        for turn in range(self.shape.turns):
            if self.vision is not None:
                self.look(engine)
            engine.prefill(self.prompt(16 + 17 * turn % (self.shape.context // 2)))
            for _ in range(4):
                engine.step(5)
            engine.reset()
            held.append(torch.cuda.memory_allocated())
        return {"after 5": held[4], f"after {len(held)}": held[-1]}

    @torch.inference_mode()
    def eager(self, engine: TorchEngine) -> dict[str, Any]:
        """The same weights in the loop that people write: a cache that is concatenated, a mask,
        logits of every position, sums of small operations."""
        tokens = self.shape.decodes[1]
        hidden = self.shape.config.hidden_size
        x = torch.randn((tokens, hidden), device=self.device).to(self.dtype)
        past: list[tuple[Tensor, Tensor]] = []

        def prefill() -> Tensor:
            past.clear()
            return eager_forward(engine, x, past)[-1].float().cpu()

        def step() -> Tensor:
            return eager_forward(engine, x[:1], past)[-1].float().cpu()

        found = {"prefill seconds": self.median(prefill), "tokens": tokens}
        return {**found, "decode seconds": self.median(step, runs=16)}

    def bundle(self) -> None:
        """An int4 bundle's files, which lie in memory: seconds to load them with each engine;
        ONNX Runtime's speeds, and what it takes of the GPU."""
        with self.synthetic(self.shape.config, "int4") as folder:
            devices = {"onnx": self.onnx_device(), "torch": self.device.type}
            for name, device in devices.items():
                if not folder or not device:
                    continue
                self.clean()
                found = self.found.setdefault("bundle", {})[name] = {}
                free = torch.cuda.mem_get_info()[0] if self.on_gpu else 0
                manifest, options = read_manifest(folder), EngineOptions(device=device)
                start = time.perf_counter()
                engine = create(
                    name, open_source(folder), context=self.shape.context, options=options
                )
                self.wait()
                found["load seconds"] = time.perf_counter() - start
                self.save()
                if name == "onnx":
                    stored = (folder / f"{manifest.decoder.graph}.data").stat().st_size
                    self.speeds(engine, stored, found)
                    engine.prefill(self.prompt(self.shape.context - 8))
                    if self.on_gpu:
                        found["bytes"] = free - torch.cuda.mem_get_info()[0]
                engine.close()
                self.save()

    def budgets(self) -> Iterator[dict[str, Any]]:
        """Does it run with so much of the GPU's memory?"""
        if not self.on_gpu:
            self.skipped["budgets"] = "they are of a GPU's memory"
            return
        context = self.shape.context
        rows = [(8, "int4", context), (6, "int4", context // 2), (12, "int8", context)]
        rows += [(24, form, context) for form in FORMS if self.installed(form)]
        for budget, form, context in rows:
            self.clean()
            row = {"GB": budget, "form": form, "context": context}
            engine = None
            try:
                engine = self.open(form, context=context, budget=budget * 10**9)
                if self.vision is not None:
                    self.look(engine)
                engine.prefill(self.prompt(context - 8))
                engine.step(5)
                yield {**row, "runs": True, "peak bytes": torch.cuda.max_memory_allocated()}
            except Exception as e:  # a fault in one must not cost the others their figures
                yield {**row, "runs": False, "error": (str(e) or repr(e)).splitlines()[0]}
            finally:
                if engine:
                    engine.close()

    def prompt(self, tokens: int) -> Prompt:
        lm = self.shape.config
        return Prompt([*(5 + i % 400 for i in range(tokens - 2)), lm.gmask_id, lm.bos_id])

    def median(self, call: Callable[[], object], runs: int = 5) -> float:
        """Seconds of a call that has been made twice before, in not much more than PATIENCE."""
        times: list[float] = []
        begin = time.perf_counter()
        for done in range(2 + runs):
            if done > 2 and time.perf_counter() - begin > PATIENCE:
                break  # few runs of something so slow say enough
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def eager_forward(engine: TorchEngine, x: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of all rows of x [rows, hidden]; `past` grows by their keys and values."""
    decoder = engine._opened()
    before = past[0][0].shape[1] if past else 0
    at = torch.arange(before, before + len(x), device=x.device)
    cos, sin = (t[at].repeat(1, 2)[None].to(x.dtype) for t in decoder.rotary)
    mask = torch.ones((len(x), before + len(x)), dtype=torch.bool, device=x.device).tril(before)
    for i, layer in enumerate(decoder.layers):
        x = layer.input_layernorm(x)
        qkv = plain(layer.attention["query_key_value"], x).unflatten(-1, (3, -1, layer.head))
        q, k, v = (t.transpose(0, 1) for t in qkv.unbind(1))

        def turned(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k = turned(q), turned(k)
        if i < len(past):
            k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], 1)
            past[i] = k, v
        else:
            past.append((k, v))
        scores = (q @ k.transpose(1, 2)) * layer.scale
        scores = scores.masked_fill(~mask, -10000.0).float()
        seen = (F.softmax(scores, -1).to(x.dtype) @ v).transpose(0, 1).flatten(1)
        x = x * ALPHA + plain(layer.attention["dense"], seen)
        x = layer.post_attention_layernorm(x)
        wide = plain(layer.mlp["dense_h_to_4h"], x)
        wide = F.gelu(wide, approximate="tanh")  # one kernel, as the published code's is fused
        x = x * ALPHA + plain(layer.mlp["dense_4h_to_h"], wide)
    return plain(decoder.lm_head, decoder.final_layernorm(x))


def plain(linear: nn.Module, x: Tensor) -> Tensor:
    """Without kernels of ours."""
    return F.linear(x, linear.weight, linear.bias) if isinstance(linear, Linear) else linear(x)


def answers(engine: Any, ids: list[int]) -> np.ndarray:
    """Logits of a prompt, of steps, and of as many tokens at once as are ever guessed."""
    together = list(range(20, 21 + LONGEST))
    steps = (engine.step(token) for token in (7, 9, 50, 8))  # ONNX Runtime records the third
    found = [engine.prefill(Prompt(ids)), *steps, *engine.extend(together)]
    engine.close()
    return np.stack(found)
