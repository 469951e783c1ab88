"""The torch engine on a GPU, measured: one command writes a table and JSON to docs/benchmarks/.

    python bench/gpu.py              # everything, in some minutes, on a card of 24 GB or more
    python bench/gpu.py --tiny       # the same code at a tiny size, also without a GPU

Needs torch and numpy; with triton (comes with torch on Linux) the engine's kernels run, with
transformers the vision network, with bitsandbytes its precisions, with onnxruntime the default
engine, on CUDA if it is onnxruntime-gpu. What is missing is said and left out. Weights are random;
no network, no downloads. First, every precision is held to the CPU on the small models in
tests/data; then ChatGLM-6B's full shape is timed. Times are medians and include what a caller waits
for: embeddings going in, logits coming back. Shares are of rates measured on the same card: of the
copy bandwidth (a step reads all weights and the cache once), of the fp16 matrix product.
"""

import argparse
import contextlib
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / room) for room in ("weights", "lite", "export")]
for name in ("sentencepiece", "psutil"):  # imported by what is imported here, and not used
    if find_spec(name) is None:
        print(f"{name} is not installed: not needed here", file=sys.stderr)
        sys.modules[name] = ModuleType(name)

from seechat_lite.engines import Engine, create  # noqa: E402
from seechat_lite.engines.base import EngineOptions  # noqa: E402
from seechat_lite.engines.torch import TorchEngine  # noqa: E402
from seechat_lite.engines.torch_vision import TorchVision  # noqa: E402
from seechat_lite.engines.torch_weights import CheckpointWeights, Given, Weights  # noqa: E402
from seechat_lite.eyes import Eyes, load_clip, load_seechat, vision_sizes  # noqa: E402
from seechat_lite.nn.blocks import quantize_blocks  # noqa: E402
from seechat_lite.nn.linears import Linear  # noqa: E402
from seechat_lite.prompt import Prompt  # noqa: E402
from seechat_lite.source import Source, open_source  # noqa: E402
from seechat_lite.speculation import LONGEST  # noqa: E402
from seechat_weights.blip_names import BlipSettings  # noqa: E402
from seechat_weights.builtin import BUILTIN  # noqa: E402
from seechat_weights.bundle import (  # noqa: E402
    ALPHA,
    Decoder,
    LMConfig,
    Manifest,
    PixelSpec,
    TokenizerConfig,
    VisionConfig,
    VisionNetwork,
    read_manifest,
)
from seechat_weights.checkpoints import open_checkpoint  # noqa: E402
from seechat_weights.layout import decoder_layout  # noqa: E402
from seechat_weights.lm import open_lm  # noqa: E402
from seechat_weights.precisions import PRECISIONS  # noqa: E402
from seechat_weights.published_vision import PUBLISHED_VISION  # noqa: E402

DATA = ROOT / "tests/data"
FULL = LMConfig()
TINY = LMConfig(
    vocab_size=512,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    inner_size=256,
    pad_id=3,
    mask_id=496,
    gmask_id=497,
    bos_id=498,
    eos_id=499,
)
# stored precision, what it is quantized to when it is loaded, and the most GB at a context of 2048,
# with eyes
FORMS = {
    "fp16": ("fp16", None, 14.5),
    "int8": ("int8", None, 8.5),
    "int4": ("int4", None, 5.5),
    "int4 of fp16": ("fp16", "int4", 5.5),
    "bitsandbytes int8": ("fp16", "int8", 8.5),
    "bitsandbytes nf4": ("fp16", "nf4", 5.5),
}
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """What is measured, at full size or tiny."""

    config: LMConfig
    context: int
    prefills: tuple[int, ...]
    decodes: tuple[int, ...]
    question: int  # tokens of a question with a picture
    copied: int  # bytes that are copied to know the bandwidth
    turns: int  # over which memory must not grow
    side: int  # of the square matrices whose product tells the card's rate
    eyes: dict[str, VisionConfig]  # the first goes with the language model


SHAPES = {
    False: Shape(
        FULL,
        2048,
        (128, 512, 1024),
        (32, 512, 1920),
        300,
        1 << 30,
        50,
        8192,
        {
            "CLIP ViT-L/14, linear": PUBLISHED_VISION["clip"],
            "EVA ViT-g, Q-Former": PUBLISHED_VISION["eva"],
        },
    ),
    True: Shape(
        TINY,
        64,
        (16, 32),
        (8, 40),
        30,
        1 << 22,
        6,
        256,
        {
            "CLIP, linear": VisionConfig(
                "",
                16,
                "clip",
                "linear",
                PixelSpec(image_size=56),
                network=VisionNetwork(14, 64, 128, 2, 2, "quick_gelu", 1e-5),
            ),
            "EVA, Q-Former": VisionConfig(
                "",
                8,
                "eva",
                "qformer",
                PixelSpec(image_size=56),
                network=VisionNetwork(14, 64, 128, 2, 2, "gelu", 1e-6, 32, 64, 2, 2),
            ),
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("no GPU is here: use --tiny to try the program")
    shape = SHAPES[args.tiny]
    report: dict[str, Any] = {"machine": machine(device), "tiny": args.tiny, "skipped": {}}
    bench = Bench(device, shape, report["skipped"])
    start = time.perf_counter()
    report["correctness"] = list(bench.correctness())
    both = bench.tried("both engines", lambda: {"rows": list(bench.both_engines())})
    report["correctness"] += both["rows"] if both else []
    report["card"] = card = bench.card()
    report["vision"] = bench.tried("vision", bench.vision) or {}
    report["models"] = {}
    for form in FORMS:
        if bench.installed(form):
            say(f"{form}: {time.perf_counter() - start:.0f} s")
            found = bench.tried(form, lambda form=form: bench.model(form, card))
            if found:
                report["models"][form] = found
    report["bundle"] = bench.tried("a bundle", lambda: bench.bundle(card)) or {}
    report["budgets"] = list(bench.budgets())
    report["seconds"] = round(time.perf_counter() - start)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in report["machine"]["device"].lower())
    path = args.out / f"gpu-{name}{'-tiny' if args.tiny else ''}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report, shape))
    print(table(report, shape))
    say(f"written to {path}.md and .json")


class Bench:
    def __init__(self, device: torch.device, shape: Shape, skipped: dict[str, str]) -> None:
        self.device = device
        self.shape = shape
        self.skipped = skipped  # what, and why
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.float16 if self.on_gpu else torch.float32
        self.eyes: Eyes | None = None

    def installed(self, form: str) -> bool:
        if form.startswith("bitsandbytes") and not find_spec("bitsandbytes"):
            self.skipped[form] = "bitsandbytes is not installed"
        return form not in self.skipped

    def tried(self, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What is measured, or None: a fault in one part must not cost the others their figures."""
        try:
            return measure()
        except Exception as e:
            traceback.print_exc()
            self.skipped[what] = f"{type(e).__name__}: {(str(e) or '?').splitlines()[0]}"
            return None

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
            yield from self.pictures()
        manifest = manifest_of(lm.config, "fp16")
        for name, weights, chosen, bar in rows:
            row = self.tried(name, lambda w=weights, c=chosen: self.compared(manifest, w, c, cases))
            if row:
                yield {"what": name, **row, "bar": bar, "ok": row["error"] <= bar}

    def pictures(self) -> Iterator[dict[str, Any]]:
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
        for name, eyes, file, key in (
            ("CLIP, linear", clip, "case", "projected_linear"),
            ("EVA, Q-Former", eva, "seechat_case_q32", "encode_img"),
        ):
            case = open_checkpoint(folder / f"{file}.safetensors")
            image, expected = case.read("image"), case.read(key)
            for kind, dtype, bar in (("fp32", torch.float32, 5e-4), ("fp16", torch.float16, 0.1)):
                what = f"a picture: {name}, {kind}"
                sees = TorchVision(eyes, device=self.device, dtype=dtype, keep=True)
                row = self.tried(what, lambda s=sees, i=image: {"found": s.encode(i)})
                if row:
                    error = float(np.abs(row["found"] - expected).max())
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
                return answers(create(engine, folder, manifest, context=100, options=options), ids)

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
        if missing := [name for name in ("onnx_ir", "safetensors") if not find_spec(name)]:
            self.skipped["bundles of random weights"] = f"{missing[0]} is not installed"
            yield None
            return
        from seechat_export.synthetic import write_synthetic_bundle

        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "bundle"
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

    def card(self) -> dict[str, float]:
        """Copy bandwidth, bytes read and written in GB/s, and the matrix product in TFLOP/s."""
        count, side = self.shape.copied, self.shape.side
        a = torch.empty(count, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        copy = self.median(lambda: b.copy_(a))
        x = torch.randn((side, side), device=self.device).to(self.dtype)
        product = self.median(lambda: x @ x)
        return {"GB/s": 2 * count / copy / 1e9, "TFLOP/s": 2 * side**3 / product / 1e12}

    def vision(self) -> dict[str, Any]:
        """Each of SHAPES' eyes by itself: seconds a picture, and those of the first; bytes held."""
        if not find_spec("transformers"):
            self.skipped["vision"] = "transformers is not installed"
            return {}
        found = {}
        for name, config in self.shape.eyes.items():
            eyes = random_eyes(config, self.shape.config.hidden_size)
            sees = TorchVision(eyes, device=self.device, dtype=self.dtype, keep=True)
            pixels = picture(config)
            start = time.perf_counter()
            sees.encode(pixels)
            first = time.perf_counter() - start
            seconds = self.median(lambda s=sees, p=pixels: s.encode(p))
            sees.close()
            released = TorchVision(eyes, device=self.device, dtype=self.dtype, keep=False)
            found[name] = {
                "seconds": seconds,
                "first seconds": first,
                "bytes": sees.held,
                "released seconds": self.median(lambda s=released, p=pixels: s.encode(p)),
            }
            self.eyes = self.eyes or eyes
        return found

    def look(self, engine: TorchEngine) -> np.ndarray:
        """A picture's embeddings, float32 [tokens, hidden], as the prompt takes them."""
        assert self.eyes is not None
        return engine.encode_image(picture(self.eyes.config))[0]

    def open(self, form: str, *, context: int = 0, budget: int | None = None) -> TorchEngine:
        precision, quantize, _ = FORMS[form]
        config = self.shape.config
        vision = self.eyes.config if self.eyes else None
        manifest = replace(manifest_of(config, precision), vision=vision)
        return TorchEngine(
            Source(ROOT, manifest, ROOT, published_vision=self.eyes),
            context=context or self.shape.context,
            options=EngineOptions(device=self.device.type, quantize=quantize, max_memory=budget),
            weights=RandomWeights(config, precision, self.device),
        )

    def model(self, form: str, card: dict[str, float]) -> dict[str, Any]:
        """All figures of one precision."""
        self.clean()
        shape = self.shape
        start = time.perf_counter()
        engine = self.open(form)
        made = time.perf_counter() - start
        stored = parameter_bytes(engine._opened())
        found: dict[str, Any] = {"made seconds": made, "weights bytes": stored}
        found |= self.speeds(engine, stored, card)

        together = 1 + LONGEST  # a token and as many as are ever guessed

        def extend() -> None:
            engine.extend([5] * together)
            engine.forget(together)

        engine.prefill(self.prompt(shape.decodes[0]))
        found["tokens at once"] = {together: self.median(extend)}
        if self.eyes is not None:
            prompt = self.prompt(shape.question)

            def first_token() -> None:
                engine.prefill(Prompt(prompt.ids, [(1, self.look(engine))]))

            found["first token seconds"] = self.median(first_token)
        if self.on_gpu:
            engine.prefill(self.prompt(shape.context - 8))
            engine.step(5)
            found["peak bytes"] = torch.cuda.max_memory_allocated()
            found["peak reserved bytes"] = torch.cuda.max_memory_reserved()
            found["flat"] = self.turns(engine)
        if form == "fp16" or form.startswith("bitsandbytes"):
            found["eager loop"] = self.eager(engine)
        engine.close()
        return found

    def speeds(self, engine: Engine, stored: int, card: dict[str, float]) -> dict[str, Any]:
        """Of prompts and steps; stored: bytes that a step reads of the weights."""
        config = self.shape.config
        numbers = sum(
            np.prod(i.shape)
            for i in decoder_layout(config, PRECISIONS["fp16"], 0)
            if len(i.shape) > 1
        )
        found: dict[str, Any] = {"prefill": {}, "decode": {}}
        for tokens in self.shape.prefills:
            seconds = self.median(lambda n=tokens: engine.prefill(self.prompt(n)))
            work = 2 * (numbers - config.vocab_size * config.hidden_size) * tokens
            found["prefill"][tokens] = {
                "seconds": seconds,
                "tokens/s": tokens / seconds,
                "share": work / seconds / 1e12 / card["TFLOP/s"],
            }
        for tokens in self.shape.decodes:
            engine.prefill(self.prompt(tokens))
            seconds = self.median(lambda: engine.step(5), runs=16)
            read = stored + tokens * cache_bytes(config) * self.dtype.itemsize / 2
            found["decode"][tokens] = {
                "seconds": seconds,
                "tokens/s": 1 / seconds,
                "share": read / seconds / 1e9 / card["GB/s"],
            }
        return found

    def turns(self, engine: TorchEngine) -> dict[str, int]:
        """Bytes that torch holds after the fifth and after the last of many turns."""
        held = []
        for turn in range(self.shape.turns):
            if self.eyes is not None:
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

    def bundle(self, card: dict[str, float]) -> dict[str, Any]:
        """An int4 bundle's files, which the system has in memory: seconds to load them with each
        engine; ONNX Runtime's speeds, and what it takes of the card."""
        found: dict[str, Any] = {}
        with self.synthetic(self.shape.config, "int4") as folder:
            devices = {"torch": self.device.type, "onnx": self.onnx_device()}
            for name, device in devices.items():
                if not folder or not device:
                    continue
                self.clean()
                free = torch.cuda.mem_get_info()[0] if self.on_gpu else 0
                manifest, options = read_manifest(folder), EngineOptions(device=device)
                start = time.perf_counter()
                engine = create(
                    name, open_source(folder), context=self.shape.context, options=options
                )
                self.wait()
                found[name] = {"load seconds": time.perf_counter() - start}
                if name == "onnx":
                    stored = (folder / f"{manifest.decoder.graph}.data").stat().st_size
                    found[name] |= self.speeds(engine, stored, card)
                    engine.prefill(self.prompt(self.shape.context - 8))
                    if self.on_gpu:
                        found[name]["bytes"] = free - torch.cuda.mem_get_info()[0]
                engine.close()
        return found

    def budgets(self) -> Iterator[dict[str, Any]]:
        """Does it run with so much of the card's memory?"""
        if not self.on_gpu:
            self.skipped["budgets"] = "they are of a GPU's memory"
            return
        rows = [(24, form, self.shape.context) for form in FORMS if self.installed(form)]
        rows += [(8, "int4", self.shape.context), (6, "int4", self.shape.context // 2)]
        for budget, form, context in rows:
            self.clean()
            row = {"GB": budget, "form": form, "context": context}
            engine = None
            try:
                engine = self.open(form, context=context, budget=budget * 10**9)
                if self.eyes is not None:
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
        """Seconds of a call that has been made twice before."""
        times = []
        for _ in range(2 + runs):
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


@dataclass(frozen=True)
class RandomWeights:
    """Weights that keep the scale of what they take, made on the device as they are asked for."""

    config: LMConfig
    precision: str
    device: torch.device
    prefix: np.ndarray | None = None

    @property
    def head(self) -> int:
        return self.config.padded_head_size

    @cached_property
    def words(self) -> np.ndarray:
        draw = np.random.default_rng(0).standard_normal((512, self.config.hidden_size))
        return draw.astype(np.float16)  # as a bundle's

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        return self.words[np.asarray(ids) % 512]

    def tensors(self) -> Iterator[Given]:
        on = {"device": self.device}
        for item in decoder_layout(
            self.config, PRECISIONS[self.precision], block_of(self.precision)
        ):
            if item.kind == "vector":
                one = "norm" in item.key and item.key.endswith("weight")
                yield Given(item.key, [torch.full(item.shape, float(one), **on)])
            elif item.bits:
                shape, scales = (s.shape for s in item.stored)
                codes = torch.randint(0, 256, shape, dtype=torch.uint8, **on)
                spread = 2**item.bits / 12**0.5 * item.shape[1] ** 0.5
                yield Given(item.key, [codes, torch.full(scales, 1 / spread, **on)], item.bits)
            else:
                kind = torch.float16 if self.device.type == "cuda" else torch.float32
                weight = torch.randn(item.shape, dtype=kind, **on)
                yield Given(item.key, [weight.mul_(item.shape[1] ** -0.5)])


def random_eyes(config: VisionConfig, outputs: int) -> Eyes:
    """Unit layer norms, no biases, matrices that keep the scale of what they take."""
    sizes = vision_sizes(config, outputs)
    pool = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)

    def read(name: str) -> np.ndarray:
        shape = sizes[name]
        if len(shape) == 1 and not name.endswith("embedding"):
            return np.full(shape, float("norm" in name.lower() and name.endswith("weight")))
        return (np.resize(pool, shape) * np.prod(shape[1:]) ** -0.5).astype(np.float16)

    # kept in memory, as the system keeps a file's pages
    return Eyes(config, outputs, sizes, cache(read))


@cache
def picture(config: VisionConfig) -> np.ndarray:
    size = config.pixels.image_size
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


@dataclass(frozen=True)
class Blocks:
    """Another source's linears in blocks of 32, as an export would store them."""

    weights: Weights
    bits: int

    @property
    def head(self) -> int:
        return self.weights.head

    @property
    def prefix(self) -> np.ndarray | None:
        return self.weights.prefix

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        return self.weights.rows(ids)

    def tensors(self) -> Iterator[Given]:
        for given in self.weights.tensors():
            array = np.array(given.arrays[0], np.float32)
            if array.ndim < 2:
                yield given
                continue
            stored = quantize_blocks(torch.from_numpy(array), bits=self.bits, block_size=32)
            yield replace(given, arrays=stored, bits=self.bits)


def eager_forward(engine: TorchEngine, x: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of all rows of x [rows, hidden]; `past` grows by their keys and values."""
    decoder = engine._opened()
    before = past[0][0].shape[1] if past else 0
    at = torch.arange(before, before + len(x), device=x.device)
    cos, sin = (t[at].repeat(1, 2)[None].to(x.dtype) for t in decoder.rotary)
    mask = torch.ones((len(x), before + len(x)), dtype=torch.bool, device=x.device).tril(before)
    for i, layer in enumerate(decoder.layers):
        x = layer.input_layernorm(x)
        qkv = plain(layer.attention["query_key_value"], x).unflatten(-1, layer.split)
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


def manifest_of(config: LMConfig, precision: str) -> Manifest:
    decoder = Decoder("decoder.onnx", "e", precision=precision, block_size=block_of(precision))
    return Manifest("random", config, decoder, TokenizerConfig(), "chatglm")


def block_of(precision: str) -> int:
    return BLOCK if PRECISIONS[precision].block else 0


def parameter_bytes(module: nn.Module) -> int:
    """What a step reads of the weights, the scales of bitsandbytes aside."""
    tensors = [*module.parameters(), *(b for n, b in module.named_buffers() if n != "rotary")]
    return sum(t.numel() * t.element_size() for t in tensors)


def cache_bytes(config: LMConfig) -> int:
    """Of a token, in half precision."""
    return 2 * 2 * config.num_layers * config.hidden_size


def machine(device: torch.device) -> dict[str, str]:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "triton", "transformers", "bitsandbytes", "onnxruntime")
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        **{p: installed(p) for p in packages},
    }


def table(report: dict[str, Any], shape: Shape) -> str:
    """The report as Markdown."""
    card, size = report["card"], shape.config
    lines = [
        f"# The torch engine on {report['machine']['device']}",
        "",
        f"`python bench/gpu.py{' --tiny' if report['tiny'] else ''}` · "
        + " · ".join(f"{k} {v}" for k, v in report["machine"].items() if k != "device"),
        "",
        f"Random weights, {size.num_layers} layers of {size.hidden_size}, int8 and int4 in blocks "
        f"of {BLOCK}, context {shape.context}. Measured here: {card['GB/s']:.0f} GB/s copied, "
        f"{card['TFLOP/s']:.1f} TFLOP/s of matrix product.",
        "",
        "| | "
        + " | ".join(f"prefill {n}, tokens/s (share)" for n in shape.prefills)
        + " | "
        + " | ".join(f"decode at {n}, tokens/s (share)" for n in shape.decodes)
        + f" | {1 + LONGEST} tokens at once, steps | first token, ms | peak GB (at most) "
        "| eager loop, tokens/s |",
        "|---" * (len(shape.prefills) + len(shape.decodes) + 5) + "|",
    ]
    rows = dict(report["models"])
    if "onnx" in report["bundle"]:
        rows["int4, ONNX Runtime"] = report["bundle"]["onnx"]
    for form, found in rows.items():
        cells = [
            f"{row['tokens/s']:.0f} ({row['share']:.0%})"
            for part in ("prefill", "decode")
            for row in found[part].values()
        ]
        step = found["decode"][shape.decodes[0]]["seconds"]
        together = found.get("tokens at once", {}).values()
        cells.append(" ".join(f"{seconds / step:.1f}" for seconds in together) or "–")
        first = found.get("first token seconds")
        peak = found.get("peak bytes", found.get("bytes"))
        limit = f" ({FORMS[form][2]})" if form in FORMS else ""
        eager = found.get("eager loop")
        cells.append(f"{first * 1e3:.1f}" if first else "–")
        cells.append(f"{peak / 1e9:.2f}{limit}" if peak else "–")
        cells.append(f"{1 / eager['decode seconds']:.1f}" if eager else "–")
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    for name, row in report["vision"].items():
        lines += [
            "",
            f"A picture, {name}: {row['seconds'] * 1e3:.1f} ms, the first "
            f"{row['first seconds']:.2f} s, {row['bytes'] / 1e9:.2f} GB held; with nothing held "
            f"{row['released seconds'] * 1e3:.0f} ms.",
        ]
    for name, row in report["bundle"].items():
        lines += ["", f"int4 from files in memory, {name}: {row['load seconds']:.1f} s."]
    for row in report["budgets"]:
        how = f"{row['peak bytes'] / 1e9:.2f} GB" if row["runs"] else row["error"]
        lines.append(f"Budget {row['GB']} GB, {row['form']}, context {row['context']}: {how}.")
    lines += [
        "",
        "| against float32 on the CPU | largest error | bar | same token |",
        "|---|---|---|---|",
    ]
    for row in report["correctness"]:
        mark = "" if row["ok"] else " **wrong**"
        same = f"{row['same token']:.0%}" if "same token" in row else "–"
        lines.append(f"| {row['what']} | {row['error']:.2g}{mark} | {row['bar']} | {same} |")
    lines += ["", *(f"Left out: {what} ({why})." for what, why in report["skipped"].items())]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
