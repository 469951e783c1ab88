"""Options that all commands which load a model share, and what they say to load()."""

import argparse
import io
import stat
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_weights.errors import SeechatError

if TYPE_CHECKING:
    from seechat_lite.eyes import EyeFiles

DTYPES = ("fp16", "bf16", "fp32")
QUANTIZATIONS = ("int4", "nf4", "fp4", "int8")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of load(), but for the bundle's name."""
    loading = parser.add_argument_group("loading")
    add = loading.add_argument
    add_engine_options(loading)
    add("--threads", type=int, default=0, metavar="N", help="on the CPU; 0: one a core (0)")
    add_memory_options(loading)
    add(
        "--max-memory",
        metavar="SIZE",
        help="refuse to load what may take more, such as 5GB; default: what is free",
    )
    add("--vision-device", metavar="DEVICE", help="where pictures are read; default: --device")
    add = parser.add_argument_group("torch engine").add_argument
    add("--quantize", choices=QUANTIZATIONS, help="float weights to fewer bits as they are loaded")
    add(
        "--rounded-rotary", action="store_true", help="positions as the authors' fp16 code has them"
    )
    add_eye_options(parser.add_argument_group("eyes of published weights (torch engine)"))


def add_engine_options(parser: Any) -> None:
    """Add what decides where and by what a model is executed."""
    add = parser.add_argument
    add(
        "--engine", default="auto", help="onnx (auto), or torch, which also reads published weights"
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, dml, … or a provider (auto)")
    add("--dtype", choices=DTYPES, help="to compute with; default: fp16 on a GPU, else fp32")


def add_memory_options(parser: Any) -> None:
    """Add what decides how much memory a bundle takes."""
    add = parser.add_argument
    add("--context", type=int, default=2048, metavar="N", help="tokens of prompt and answer (2048)")
    add(
        "--keep-vision",
        action=argparse.BooleanOptionalAction,
        help="hold the vision network between pictures; default: if it is small, or on a GPU",
    )


def add_model_option(parser: Any) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a bundle or, with --engine torch, published weights; default: built in",
    )


def add_eye_options(parser: Any) -> None:
    """Add the published files that a language model is to see with: fields of eyes.EyeFiles."""
    add = parser.add_argument
    add(
        "--clip",
        type=Path,
        metavar="PATH",
        help="CLIP ViT: an open_clip or Hugging Face folder, or OpenAI's ViT-L-14.pt",
    )
    add("--projector", type=Path, metavar="FILE", help="linear or MLP projector")
    add(
        "--clip-activation",
        choices=("quick_gelu", "gelu"),
        help="for a --clip file without a configuration beside it",
    )
    add("--eva", type=Path, metavar="FILE", help="SEEChat's vision tower: eva_vit_g.pth")
    add(
        "--qformer",
        type=Path,
        metavar="FILE",
        help="SEEChat's Q-Former: blip2_pretrained_flant5xxl.pth",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="SEEChat's checkpoint_N.pth, whose tensors take the place of the others'",
    )
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="pixels a side that --eva sees, if not the 224 of its weights",
    )


def eye_files(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> "EyeFiles | None":
    """What add_eye_options' options name, if anything; what does not go together is wrong usage."""
    from seechat_lite.eyes import EyeFiles

    given = {f.name: getattr(args, f.name) for f in fields(EyeFiles)}
    if not any(given.values()):
        return None
    try:
        return EyeFiles(**given)
    except SeechatError as e:
        return usage_error(str(e))


def load_options(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> dict[str, Any]:
    """What load() is to be called with; a value that no model would take is wrong usage."""
    from seechat_lite.engines import not_for
    from seechat_lite.memory import parse_size

    check_engine(args, usage_error)
    check_context(args, usage_error)
    eyes = eye_files(args, usage_error)
    own = {
        "quantize": ("--quantize goes", args.quantize),
        "rounded_rotary": ("--rounded-rotary goes", args.rounded_rotary),
        "bf16": ("--dtype bf16 goes", args.dtype == "bf16"),
        "eyes": ("eyes of published weights (--clip, --projector, --eva, …) go", eyes),
    }
    for name in not_for(args.engine, (name for name, (_, given) in own.items() if given)):
        usage_error(f"{own[name][0]} with --engine torch")
    if args.threads < 0:
        usage_error(f"--threads is {args.threads}; expected 0 or more")
    max_memory = None
    if args.max_memory is not None:
        try:
            max_memory = parse_size(args.max_memory)
        except SeechatError as e:
            usage_error(f"--max-memory: {e}")
    return {
        "engine": args.engine,
        "device": args.device,
        "context": args.context,
        "threads": args.threads,
        "vision_device": args.vision_device,
        "keep_vision": args.keep_vision,
        "max_memory": max_memory,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "rounded_rotary": args.rounded_rotary,
        "eyes": eyes,
    }


def picture_source(place: str) -> "str | io.BytesIO":
    """A picture named on the command line: a path as it is; of stdin and pipes what they hold.

    place: a path, or "-" for stdin. Raises ImageError.
    """
    from seechat_lite.errors import ImageError
    from seechat_lite.images import MAX_BYTES

    try:
        if place == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise ImageError("stdin is no file; expected the bytes of a picture: … - < cat.png")
            data, name = sys.stdin.buffer.read(MAX_BYTES + 1), "stdin"
        elif stat.S_ISFIFO(Path(place).stat().st_mode):
            with Path(place).open("rb") as pipe:
                data, name = pipe.read(MAX_BYTES + 1), place
        else:
            return place
    except (OSError, ValueError):  # what is wrong with it is said when it is read
        return place
    file = io.BytesIO(data)
    file.name = name  # pyright: ignore[reportAttributeAccessIssue]
    return file


def check_engine(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> None:
    """An engine that there is not is wrong usage."""
    from seechat_lite.engines import ENGINES

    if args.engine not in ("auto", *ENGINES):
        usage_error(f"--engine is {args.engine}; expected one of auto, {', '.join(ENGINES)}")


def check_context(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> None:
    """A context that holds no question is wrong usage."""
    from seechat_lite.memory import MIN_CONTEXT

    if args.context < MIN_CONTEXT:
        usage_error(f"--context is {args.context}; expected at least {MIN_CONTEXT}")
