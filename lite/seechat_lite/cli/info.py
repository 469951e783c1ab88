"""The command `seechat info`: says what a bundle or published weights are, and what they take."""

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_lite.cli.hints import chat_with, export_with, flag
from seechat_lite.cli.options import (
    add_engine_options,
    add_memory_options,
    check_context,
    check_engine,
    size_of,
)
from seechat_lite.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from seechat_lite.memory import MemoryPlan
    from seechat_lite.source import Source
    from seechat_weights.identify import Identity

log = logging.getLogger(__name__)

# arguments of load()
_LOADING = ("engine", "device", "dtype", "context", "keep_vision", "kept_cache")


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `info` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "info",
        parents=[common],
        usage="%(prog)s [PATH] [options]",
        help="what a bundle or a checkpoint is",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="PATH",
        help="a bundle, or published weights or a part of them",
    )
    add_engine_options(parser)
    add_memory_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: docs/embedding.md"
    )
    parser.set_defaults(run=lambda args: _info(args, parser))


def _info(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from seechat_lite.memory import human
    from seechat_lite.source import open_source
    from seechat_weights.bundle.manifest import verify_hashes
    from seechat_weights.bundle.onnx_graph import check_graphs
    from seechat_weights.files.reading import local_path
    from seechat_weights.identify import describe_bundle
    from seechat_weights.model_files import is_bundle
    from seechat_weights.scorer.manifest import is_scorer_folder

    check_context(args, parser.error)
    args.kept_cache = size_of(args, "kept_cache", parser.error)
    check_engine(args, parser.error)
    path = local_path(args.model) if args.model else None
    if path and (not is_bundle(path) or is_scorer_folder(path)):
        given = [name for name in _LOADING if getattr(args, name) != parser.get_default(name)]
        return _identify(path, args, given)
    source = open_source(path)
    folder, manifest = source.path, source.manifest
    verify_hashes(folder, manifest)
    check_graphs(folder, manifest)
    found, needed = describe_bundle(folder, manifest), _plan(source, args)
    if args.json:
        report = (
            _data(found)
            | {"command": chat_with(found), "run": chat_with(found), "path": str(folder)}
            | dataclasses.asdict(manifest)
        )
        print_json(report | {"memory": _memory(needed)})
        return 0
    size = sum(f.bytes for f in manifest.files.values())
    rows: dict[str, str | list[str]] = {
        "what": found.title,
        "path": str(folder),
        **found.facts,
        "files": f"{len(manifest.files)}, {human(size)}, all hashes right",
        "memory": _memory_rows(needed),
        "start with": str(chat_with(found)) if args.model else "seechat chat",
    }
    print_table(rows)
    return 0


def _identify(path: Path, args: argparse.Namespace, given: list[str]) -> int:
    """Say what published weights are; returns 1 if they are not usable.

    given: those of _LOADING that were given.
    """
    from seechat_lite.engines import engine_class
    from seechat_lite.source import open_source
    from seechat_weights.identify import identify
    from seechat_weights.model_files import Openings

    openings, needed = Openings(), None
    found = identify(path, opener=openings)
    if found.runs and given and engine_class(args.engine).reads_checkpoints:
        needed = _plan(open_source(found.options["lm"], opener=openings), args)
    elif given:
        names = ", ".join(map(flag, given))
        why = "--engine torch is what loads published weights" if found.runs else "no whole model"
        log.warning("not used: %s (%s)", names, why)
    if args.json:
        commands = {"command": export_with(found), "run": chat_with(found)}
        memory = {"memory": _memory(needed)} if needed else {}
        print_json(_data(found) | commands | {"path": str(path)} | memory)
        return 0 if found.usable else 1
    rows: dict[str, str | list[str]] = {"what": found.title, "path": str(path), **found.facts}
    if found.missing:
        rows["still needed"] = [f"{name}: {place}" for name, place in found.missing.items()]
    if needed:
        rows["memory"] = _memory_rows(needed)
    if command := export_with(found):
        rows["export with"] = command
    if command := chat_with(found):
        rows["run as it is"] = command
    print_table(rows)
    return 0 if found.usable else 1


def _plan(source: "Source", args: argparse.Namespace) -> "MemoryPlan":
    """What loading a model with these options takes."""
    from seechat_lite.engines import EngineOptions, engine_class
    from seechat_lite.loading import warn_of_context

    warn_of_context(args.context, source.manifest)
    options = EngineOptions(
        device=args.device,
        keep_vision=args.keep_vision,
        kept_cache=args.kept_cache,
        dtype=args.dtype,
    )
    return engine_class(args.engine).plan(source, context=args.context, options=options)


def _memory(needed: "MemoryPlan") -> dict[str, Any]:
    """A plan for JSON."""
    from seechat_lite.memory import available_memory

    return dataclasses.asdict(needed) | {"total": needed.total, "free": available_memory()}


def _memory_rows(needed: "MemoryPlan") -> list[str]:
    """A plan for people."""
    from seechat_lite.memory import available_memory, human

    return [
        f"{human(needed.total)} at a context of {needed.context} tokens",
        needed.parts,
        f"{human(available_memory())} free now",
    ]


def _data(found: "Identity") -> dict[str, Any]:
    """What JSON takes of an identity."""
    return vars(found) | {"options": {name: str(value) for name, value in found.options.items()}}
