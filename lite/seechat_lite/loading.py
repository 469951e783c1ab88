"""Loads a model from a path: finds it, plans its memory, checks its files, then reads it.

(Not called load.py: a module of that name would hide the function seechat_lite.load.)
"""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from seechat_lite.cache_folder import verify_once
from seechat_lite.chat import IMAGE_CACHE, Model
from seechat_lite.conversation import FORMATS
from seechat_lite.engines import EngineOptions, engine_class, not_for
from seechat_lite.memory import DEFAULT_CONTEXT, MIN_CONTEXT, MemoryPlan
from seechat_lite.source import Source, open_source
from seechat_lite.tokenizers import open_tokenizer
from seechat_weights.arguments import MAX_INTEGER, check_integer, check_type
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.errors import BundleError, ContextError, OptionError
from seechat_weights.vision.weights import VisionFiles

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def load(
    path: str | Path | Source | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    context: int = DEFAULT_CONTEXT,
    threads: int = 0,
    vision_device: str | None = None,
    keep_vision: bool | None = None,
    kept_cache: int | None = None,
    max_memory: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    rounded_rotary: bool = False,
    vision: VisionFiles | None = None,
    eyes: VisionFiles | None = None,
    image_cache: int = IMAGE_CACHE,
    announce: Callable[[MemoryPlan], None] = lambda plan: None,
    progress: Progress | None = None,
) -> Model:
    """Load a bundle: a folder written by `seechat export`, or with None the built-in model.

    The engine "torch" also loads published weights: a folder of ChatGLM-6B, or of VisualGLM-6B with
    its vision.

    path: a bundle, published weights, or what open_source returned; None for the built-in model. A
        Hub id, "owner/name", is downloaded if no such path exists (with the extra "download").
    engine: "auto" or a name of engines.ENGINES.
    device: "auto", "cpu", "cuda:1", … or the name of an ONNX Runtime execution provider.
    context: tokens that prompt and answer may take together; the cache grows with it. More than
        the model was trained with is allowed, and logged as a warning.
    threads: threads on the CPU; 0 for one a core.
    vision_device: where the vision network runs, if not on `device`.
    keep_vision: hold the vision network in memory, or release it after every picture; None keeps a
        small one.
    kept_cache: bytes of keys and values that may be kept between answers, so that the next question
        of a conversation is read alone; 0 keeps none; None keeps those of one full context. Only
        models whose every token is causal (LLaMA) keep any. The torch engine keeps one
        conversation's, whatever the number.
    max_memory: bytes that the model may take at most; on a GPU, of the GPU's memory. If it may need
        more, loading is refused (see engines.base.Engine.plan).
    dtype: "fp16", "fp32" or, for torch, "bf16"; None for what suits the device.
    quantize: for torch: "int4" makes blocks of float weights as an export does; "nf4", "fp4" and
        "int8" use bitsandbytes.
    rounded_rotary: for torch: see rotary.rotary_tables.
    vision: for torch: files of the vision network for published weights.
    eyes: the older name of `vision`; it warns and will go.
    image_cache: bytes of embeddings kept for pictures that no chat shows any more.
    announce: called with the memory plan once it fits, before the work begins.
    progress: called in this thread with a stage, how much of it is done, and how much there is. The
        stages are "checking" (bytes of the bundle) and "loading". An exception that it raises ends
        the loading and leaves nothing open.

    Raises BundleError (missing, damaged or newer bundle), CheckpointError (the same of published
    weights), OptionError (a wrong argument, or what the engine cannot do), EngineError (a device
    that is not there, a library that is not installed), MemoryPlanError (would not fit),
    ContextError (context too small to be of use).
    """
    check_integer("context", context, least=-MAX_INTEGER, expected="a whole number of tokens")
    check_integer("image_cache", image_cache, expected="a whole number of bytes")
    if context < MIN_CONTEXT:
        raise ContextError(
            f"context is {context} tokens; expected at least {MIN_CONTEXT}: load the model with "
            "more",
            options={"context": None},
        )
    if eyes is not None:
        warnings.warn("load(eyes=…) is now load(vision=…)", DeprecationWarning, stacklevel=2)
        vision = vision or eyes
    check_type("vision", vision, VisionFiles | None, "VisionFiles")
    options = EngineOptions(
        device=device,
        threads=threads,
        vision_device=vision_device,
        keep_vision=keep_vision,
        kept_cache=kept_cache,
        dtype=dtype,
        quantize=quantize,
        max_memory=max_memory,
        rounded_rotary=rounded_rotary,
    )
    chosen = engine_class(engine)
    extras = {
        "quantize": quantize,
        "rounded_rotary": rounded_rotary,
        "vision": vision,
        "bf16": dtype == "bf16",
    }
    if refused := not_for(engine, (name for name, given in extras.items() if given)):
        raise OptionError(
            f"{', '.join(refused)}: not for the engine {engine!r}; expected an engine that does "
            "it, such as torch: choose that, or leave it out"
        )
    source = path
    if not isinstance(source, Source):
        source = open_source(source, vision=vision, only_bundles=not chosen.reads_checkpoints)
    manifest = source.manifest
    if manifest.conversation not in FORMATS:
        raise BundleError(
            f"{source.path}: conversation format {manifest.conversation!r} is unknown; expected "
            f"one of {', '.join(FORMATS)}: upgrade seechat-lite or export the model again"
        )
    warn_of_context(context, manifest)
    plan = chosen.plan(source, context=context, options=options)
    log.info("%s: %s", manifest.name, plan)
    chosen.check(plan, source, options=options)
    announce(plan)
    if manifest.files:  # a bundle's
        verify_once(source.path, manifest, partial(progress, "checking") if progress else None)
    tokenizer = open_tokenizer(source.tokenizer, manifest.tokenizer, manifest.lm)
    if progress:
        progress("loading", 0, 1)
    executor = chosen(source, context=context, options=options, plan=plan)
    model = Model(
        manifest, tokenizer, executor, image_cache=image_cache, vocabulary=source.vocabulary
    )
    try:
        if progress:
            progress("loading", 1, 1)
    except BaseException:
        model.close()
        raise
    return model


def warn_of_context(context: int, manifest: Manifest) -> None:
    """Log a warning if somebody asks for a longer context than the model was trained with.

    context: tokens; the default is nobody's wish.
    manifest: the model's.
    """
    trained = manifest.lm.max_sequence_length
    if context > trained and context != DEFAULT_CONTEXT:
        log.warning(
            "%s: a context of %d tokens, but the model was trained with %d: its answers get worse "
            "where a conversation is longer than that",
            manifest.name,
            context,
            trained,
        )
