"""Defines options that several commands share; makes arguments of load() and stream() from them."""

import argparse
import io
import json
import stat
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from seechat_lite.cli.hints import as_usage
from seechat_lite.cli.terminal import say
from seechat_lite.conversation import FORMATS
from seechat_lite.generation import DEFAULTS, HELP, Generation
from seechat_lite.memory import DEFAULT_CONTEXT, MIN_CONTEXT, parse_size
from seechat_weights.bundle.precisions import DTYPES, QUANTIZATIONS
from seechat_weights.errors import SeechatError
from seechat_weights.files.untrusted import read_file
from seechat_weights.plain_text import one_line

if TYPE_CHECKING:
    from seechat_lite.chat import Model
    from seechat_lite.memory import MemoryPlan
    from seechat_weights.vision.weights import VisionFiles

WORTH_A_PLAN = 1_000_000_000  # bytes; for a model that takes more, people are told the sums


class UsageError(Protocol):
    """Ends the process with exit code 2, as a parser's `error` does."""

    def __call__(self, message: str) -> NoReturn: ...


def add_answer_options(
    parser: argparse.ArgumentParser,
    *,
    stats: str = "print on stderr how many tokens and seconds it took",
) -> None:
    """Add the model's name, the options of answers and those of load().

    parser: the command's.
    stats: the help of --stats.
    """
    add_model_option(parser)
    parser.add_argument("--stats", action="store_true", help=stats)
    answering = parser.add_argument_group("answering")
    add_format_option(answering)
    add = answering.add_argument
    for name, default in DEFAULTS.items():
        flag, words = f"--{name.replace('_', '-')}", HELP[name]
        if isinstance(default, bool):
            add(flag, action=argparse.BooleanOptionalAction, default=default, help=words)
        elif isinstance(default, tuple):
            more = f"{words}; may be repeated"
            add(flag, action="append", default=[], metavar="TEXT", help=more)
        elif name == "schema":
            add(flag, type=_schema, metavar="FILE", help=words)
        else:
            kind = type(default)
            letter = "N" if kind is int else "X"
            add(flag, type=kind, default=default, metavar=letter, help=f"{words} (%(default)g)")
    add_load_options(parser)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of load(), without the bundle's name."""
    loading = parser.add_argument_group("loading")
    add = loading.add_argument
    add_engine_options(loading)
    add("--threads", type=int, default=0, metavar="N", help="of the CPU; 0: one a core (0)")
    add_memory_options(loading)
    add(
        "--max-memory",
        metavar="SIZE",
        help="refuse a model that may take more, such as 5GB; default: what is free",
    )
    add(
        "--vision-device",
        metavar="DEVICE",
        help="where the vision network runs; default: as --device",
    )
    add = parser.add_argument_group("torch engine").add_argument
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        help="turn float weights into these smaller ones while loading",
    )
    add(
        "--rounded-rotary",
        action="store_true",
        help="round the angles of positions as the published fp16 code does",
    )
    add_vision_options(parser.add_argument_group("vision of published weights (torch engine)"))


def add_engine_options(parser: Any) -> None:
    """Add the options that say where and with what a model is executed."""
    add = parser.add_argument
    add(
        "--engine",
        default="auto",
        metavar="NAME",
        help="what computes: onnx (the default), or torch, which also reads published weights",
    )
    add(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, dml, … or the name of an ONNX Runtime provider (auto)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="the numbers to compute with; default: fp16 on a GPU, else fp32",
    )


def add_memory_options(parser: Any) -> None:
    """Add the options that say how much memory a bundle takes."""
    add = parser.add_argument
    add(
        "--context",
        type=int,
        default=DEFAULT_CONTEXT,
        metavar="N",
        help="most tokens of prompt and answer together (%(default)s)",
    )
    add(
        "--keep-vision",
        action=argparse.BooleanOptionalAction,
        help="keep the vision network in memory between pictures; default: if it is small, or on "
        "a GPU",
    )
    add(
        "--kept-cache",
        metavar="SIZE",
        help="memory for what LLaMA models have read, so that the next question of a conversation "
        "is read alone; 0: none; default: that of one full context",
    )


def add_format_option(parser: Any) -> None:
    """Add the option of the conversation format."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        metavar="FORMAT",
        help="how a conversation is written for the model; default: as the model learnt it; one of "
        + ", ".join(FORMATS),
    )


def add_model_option(parser: Any) -> None:
    """Add the option of the model's name."""
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a bundle or, with --engine torch, published weights; default: the built-in model",
    )


def add_vision_options(parser: Any) -> None:
    """Add the options for published files of a vision network: fields of VisionFiles."""
    add = parser.add_argument
    add(
        "--clip",
        type=Path,
        metavar="PATH",
        help="CLIP ViT: an open_clip or Hugging Face folder, or OpenAI's ViT-L-14.pt",
    )
    add("--projector", type=Path, metavar="FILE", help="the linear or MLP projector for --clip")
    add(
        "--clip-activation",
        choices=("quick_gelu", "gelu"),
        help="for --clip without a configuration beside it",
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
        "--wordpiece",
        type=Path,
        metavar="FILE",
        help="bert-base-uncased's vocab.txt, for InstructBLIP; default: beside its checkpoint",
    )
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="pixels a side that --eva sees, if not the 224 of its weights",
    )


def vision_files(args: argparse.Namespace, usage_error: UsageError) -> "VisionFiles | None":
    """The files that the options of add_vision_options name, or None.

    args: the parsed arguments.
    usage_error: called if the files do not go together.
    """
    from seechat_weights.vision.weights import VisionFiles

    given = {f.name: getattr(args, f.name) for f in fields(VisionFiles)}
    if not any(given.values()):
        return None
    try:
        return VisionFiles(**given)
    except SeechatError as e:
        usage_error(as_usage(e))


def load_options(args: argparse.Namespace, usage_error: UsageError) -> dict[str, Any]:
    """The arguments for load().

    args: the parsed arguments.
    usage_error: called for a value that no model would take.
    """
    from seechat_lite.engines import not_for
    from seechat_lite.engines.base import MAX_THREADS

    check_engine(args, usage_error)
    check_context(args, usage_error)
    vision = vision_files(args, usage_error)
    own = {
        "quantize": ("--quantize goes", args.quantize),
        "rounded_rotary": ("--rounded-rotary goes", args.rounded_rotary),
        "bf16": ("--dtype bf16 goes", args.dtype == "bf16"),
        "vision": ("vision of published weights (--clip, --projector, --eva, …) goes", vision),
    }
    for name in not_for(args.engine, (name for name, (_, given) in own.items() if given)):
        usage_error(f"{own[name][0]} with --engine torch")
    if not 0 <= args.threads <= MAX_THREADS:
        usage_error(f"--threads is {args.threads}; expected 0 to {MAX_THREADS}")
    return {
        "engine": args.engine,
        "device": args.device,
        "context": args.context,
        "threads": args.threads,
        "vision_device": args.vision_device,
        "keep_vision": args.keep_vision,
        "kept_cache": size_of(args, "kept_cache", usage_error),
        "max_memory": size_of(args, "max_memory", usage_error),
        "dtype": args.dtype,
        "quantize": args.quantize,
        "rounded_rotary": args.rounded_rotary,
        "vision": vision,
    }


def size_of(args: argparse.Namespace, name: str, usage_error: UsageError) -> int | None:
    """The bytes that an option names; None if it is not given.

    args: the parsed arguments.
    name: the option's, as an attribute.
    usage_error: called if it is no size.
    """
    given = getattr(args, name)
    if given is None:
        return None
    try:
        return parse_size(given)
    except SeechatError as e:
        usage_error(f"--{name.replace('_', '-')}: {e}")


def picture_source(place: str) -> "str | io.BytesIO":
    """A picture named on the command line: a path as it is; for stdin and pipes, their contents.

    place: a path, or "-" for stdin.

    Raises ImageError.
    """
    from seechat_lite.images import MAX_BYTES
    from seechat_weights.errors import ImageError

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
    except (OSError, ValueError):  # reading the picture will say what is wrong
        return place
    file = io.BytesIO(data)
    file.name = name  # pyright: ignore[reportAttributeAccessIssue]
    return file


def check_text(name: str, text: str, usage_error: UsageError) -> None:
    """Words with bytes that are no text are wrong usage.

    name: what they are, for the message.
    text: the words.
    usage_error: called for such words.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):  # Python turns undecodable bytes into these
        usage_error(f"{name} has bytes that are no text in {sys.getfilesystemencoding()}")


def check_engine(args: argparse.Namespace, usage_error: UsageError) -> None:
    """An unknown engine is wrong usage."""
    from seechat_lite.engines import ENGINES

    if args.engine not in ("auto", *ENGINES):
        usage_error(f"--engine is {args.engine}; expected one of auto, {', '.join(ENGINES)}")


def check_context(args: argparse.Namespace, usage_error: UsageError) -> None:
    """A context too small for a question is wrong usage."""
    if args.context < MIN_CONTEXT:
        usage_error(f"--context is {args.context}; expected at least {MIN_CONTEXT}")


def answer_options(args: argparse.Namespace, usage_error: UsageError) -> Generation:
    """The options of an answer.

    args: the parsed arguments.
    usage_error: called for a value that no model would take.
    """
    try:
        return Generation(**{name: getattr(args, name) for name in DEFAULTS})
    except SeechatError as e:
        usage_error(as_usage(e))


def _schema(given: str) -> dict[str, Any]:
    """The JSON schema in a file, or written out."""
    from seechat_lite.json_schema import MAX_SCHEMA
    from seechat_lite.json_structure import too_complex

    try:
        data = given.encode("utf-8", "replace")
        if not given.lstrip().startswith("{"):
            data = read_file(given, limit=4 * MAX_SCHEMA)
        if why := too_complex(data):
            raise argparse.ArgumentTypeError(f"the schema is {why}")
        schema = json.loads(data.decode("utf-8-sig"))
    except OSError as e:
        raise argparse.ArgumentTypeError(
            f"{given}: cannot be read ({e.strerror or e}); expected a file of a JSON schema, or "
            "the schema itself"
        ) from None
    except (ValueError, RecursionError) as e:
        raise argparse.ArgumentTypeError(f"not JSON ({e!s:.100}); expected a JSON schema") from None
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError("not an object; expected a JSON schema")
    return schema


def load_model(args: argparse.Namespace, options: dict[str, Any]) -> "Model":
    """Load the model; for a large one, say what it takes, and then how far loading is.

    args: the parsed arguments.
    options: the arguments for load().
    """
    from seechat_lite.loading import load

    large = False

    def announce(plan: "MemoryPlan") -> None:
        nonlocal large
        if large := plan.total >= WORTH_A_PLAN:
            print(one_line(f"memory: {plan}"), file=sys.stderr)

    def progress(stage: str, done: int, total: int) -> None:
        if large:
            say(f"{stage} {done / max(total, 1):.0%}")

    try:
        return load(args.model, **options, announce=announce, progress=progress)
    finally:
        if large:
            say("")
