"""The command `seechat export`. The runtime's command line finds it as an entry point."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_lite.cli.hints import flag
from seechat_lite.cli.options import add_format_option, add_vision_options, vision_files
from seechat_lite.conversation import FORMATS
from seechat_lite.memory import human
from seechat_weights.bundle.precisions import BLOCK_SIZES, PRECISIONS, VISION_PRECISIONS
from seechat_weights.errors import SeechatError
from seechat_weights.files.checkpoint import Opener
from seechat_weights.files.reading import local_path
from seechat_weights.identify import check_given
from seechat_weights.libraries import import_error
from seechat_weights.model_files import Openings
from seechat_weights.plain_text import one_line

if TYPE_CHECKING:
    from seechat_weights.bundle.manifest import Manifest

# options that name published weights: a path, or a Hub id
_PUBLISHED = (
    *("lm", "checkpoint", "adapter", "prefix", "tokenizer"),
    *("clip", "projector", "eva", "qformer"),
)
# what goes with scorer
_OF_SCORERS = (
    *("scorer", "out", "name", "precision", "tokenizer", "offline"),
    *("command", "verbose", "debug"),
)


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `export` to the subparsers of `seechat`.

    commands: the subparsers.
    common: holds the options of all commands.
    """
    parser = commands.add_parser(
        "export",
        parents=[common],
        usage="%(prog)s (--lm PATH | --scorer PATH) --out DIR [options]",
        help="make a bundle from published weights",
        description="Make a bundle from a checkpoint of ChatGLM-6B or a LLaMA: without vision, "
        "with a CLIP vision tower and its projector, or with SEEChat's EVA ViT, Q-Former and "
        "checkpoint. VisualGLM-6B brings its own. Run again after an interruption, it continues. "
        "With --scorer, make a scorer of captions from Chinese-CLIP instead.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the bundle to write")
    add("--name", help="of the model; default: the folder's")
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the LM's weights (int4); of --scorer's fp32 or fp16, as published by default",
    )
    add(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        default=128,
        help="weights that share a scale in int8 and int4 (%(default)s)",
    )
    add(
        "--vision-precision",
        choices=VISION_PRECISIONS,
        help="of the vision network's weights; default: fp16, or fp32 with --precision fp32",
    )
    add_format_option(parser)
    add(
        "--calibrate",
        nargs="?",
        type=Path,
        const=True,
        default=False,
        metavar="PATH",
        help="round int4 weights for what layers see: with dialogues in Chinese and English that "
        "come along, or a text, a picture, or a folder of them; takes tens of minutes",
    )
    add("--offline", action="store_true", help="take Hub ids from the cache, open no connection")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--scorer",
        type=Path,
        metavar="PATH",
        help="Chinese-CLIP, for `seechat eval caption`: clip_cn_*.pt with vocab.txt beside it, a "
        "Hugging Face folder, or a Hub id",
    )
    which.add_argument(
        "--lm",
        type=Path,
        metavar="PATH",
        help="ChatGLM-6B (fp16, int8, int4, int4-qe), VisualGLM-6B or a LLaMA: a Hugging Face "
        "folder with config.json, weights and tokenizer, SAT's mp_rank_00_model_states.pt, or a "
        "Hub id",
    )
    add = parser.add_argument_group("language model").add_argument
    add("--adapter", type=Path, metavar="DIR", help="a PEFT LoRA, to be merged")
    add("--prefix", type=Path, metavar="PATH", help="a P-tuning v2 prefix: its folder or file")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="of --lm, or vocab.txt of --scorer; default: the one beside the weights",
    )
    add_vision_options(parser.add_argument_group("vision, if the language model brings none"))
    parser.set_defaults(run=lambda args: _export(args, parser))

    synthetic = commands.add_parser(
        "synthetic",
        parents=[common],
        help="write random weights of the published shapes, to measure with",
        description="Write a ChatGLM-6B checkpoint, a CLIP ViT-L/14 and a projector with random "
        "weights, laid out as published: 14 GB with all layers.",
    )
    synthetic.add_argument(
        "--layers", type=int, default=28, metavar="N", help="of the language model (%(default)s)"
    )
    synthetic.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    synthetic.set_defaults(run=_synthetic)


def _synthetic(args: argparse.Namespace) -> int:
    from seechat_export.progress import Bars
    from seechat_export.synthetic import write_synthetic

    with Bars() as bars:
        write_synthetic(args.out, layers=args.layers, progress=bars)
    return 0


def _fetch(
    args: argparse.Namespace, opener: Opener, options: Sequence[str] = _PUBLISHED
) -> dict[str, dict[str, str]]:
    """Replace Hub ids in `args` by downloads, checked against their options; returns origins."""
    from seechat_lite.download import fetch

    if not sys.stderr.isatty():  # huggingface_hub reads this when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sources = {}
    for option in options:
        given = getattr(args, option)
        if given:
            path, source = fetch(local_path(given), offline=args.offline)
            check_given(option, path, opener=opener)
            setattr(args, option, path)
            sources |= {option: source} if source else {}
    return sources


def _export(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.scorer:
        return _export_scorer(args, parser)
    vision_files(args, parser.error)  # before anything is downloaded
    openings = Openings()
    downloads = _fetch(args, openings)
    try:
        from seechat_export.export import export_bundle
        from seechat_export.progress import Bars
        from seechat_lite.source import open_source
    except (ImportError, OSError) as e:
        raise _import_error(e) from None
    source = open_source(
        args.lm,
        vision=vision_files(args, parser.error),
        adapter=args.adapter,
        prefix=args.prefix,
        tokenizer=args.tokenizer,
        opener=openings,
    )
    out = local_path(args.out)
    with Bars() as bars:
        manifest = export_bundle(
            lm=source,
            out=out,
            vision=source.vision,
            precision=args.precision or "int4",
            block_size=args.block_size,
            vision_precision=args.vision_precision,
            conversation=args.format,
            calibrate=args.calibrate,
            name=args.name,
            announce=lambda plan: print(f"this will take {plan}", file=sys.stderr),
            provenance={"downloads": downloads} if downloads else None,
            progress=bars,
        )
    if licence := manifest.provenance.get("license"):
        print(f"licence: {licence}", file=sys.stderr)
    report = json.loads((out / "parity.json").read_text("utf-8"))
    against = report["against_checkpoint"]
    size = sum(f.bytes for f in manifest.files.values())
    print(
        f"{one_line(out)}: {human(size)}, agrees with the torch networks\n"
        f"against the checkpoint: KL divergence {max(against['kl_divergence'], 0):.2g}, "
        f"top-1 agreement {against['top1_agreement']:.0%}\n"
        f"try it: seechat ask --model {one_line(out)} {_question(manifest)}",
        file=sys.stderr,
    )
    return 0


def _question(manifest: "Manifest") -> str:
    """The arguments of a first question, in words that the model's format has for it."""
    described = FORMATS[manifest.conversation].describe[0]
    return f'PICTURE "{described or "What is this?"}"' if manifest.vision else '"你好"'


def _import_error(error: Exception) -> SeechatError:
    needed, install = "export needs it", '"seechat-lite[export]"'
    return import_error(SeechatError, error, needed=needed, install=install)


def _export_scorer(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for name, value in vars(args).items():
        if name not in _OF_SCORERS and value != parser.get_default(name):
            parser.error(f"{flag(name)} goes with --lm, not with --scorer")
    if args.precision not in (None, "fp32", "fp16"):
        parser.error(f"--precision is {args.precision}; expected fp32 or fp16 with --scorer")
    openings = Openings()
    downloads = _fetch(args, openings, ("scorer",))
    try:
        from seechat_export.progress import Bars
        from seechat_export.scorer import export_scorer
    except (ImportError, OSError) as e:
        raise _import_error(e) from None
    out = local_path(args.out)
    with Bars() as bars:
        manifest = export_scorer(
            scorer=args.scorer,
            out=out,
            vocabulary=args.tokenizer,
            precision=args.precision,
            name=args.name,
            provenance={"downloads": downloads} if downloads else None,
            opener=openings,
            progress=bars,
        )
    size = sum(f.bytes for f in manifest.files.values())
    print(
        f"{one_line(out)}: {one_line(manifest.name)}, {manifest.precision}, {human(size)}, agrees "
        "with the torch networks\n"
        "try it: seechat eval caption --images FOLDER --captions NAME=FILE --scorer "
        f"{one_line(out)}",
        file=sys.stderr,
    )
    return 0
