"""The command `seechat info`: says what a bundle or published weights are, and what they take."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_lite.cli.hints import chat_with, export_with
from seechat_lite.cli.options import (
    UsageError,
    add_engine_options,
    add_memory_options,
    check_context,
    check_engine,
)
from seechat_lite.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from seechat_weights.identify import Identity


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `info` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "info",
        parents=[common],
        usage="%(prog)s [PATH] [options]",
        help="what a bundle or a checkpoint is",
    )
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="PATH", help="a bundle, or published weights"
    )
    add_engine_options(parser)
    add_memory_options(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest and the sums")
    parser.set_defaults(run=lambda args: _info(args, parser.error))


def _info(args: argparse.Namespace, usage_error: UsageError) -> int:
    from seechat_lite.engines import EngineOptions, engine_class
    from seechat_lite.memory import available_memory, human
    from seechat_lite.source import open_source
    from seechat_weights.bundle.manifest import verify_hashes
    from seechat_weights.bundle.onnx_graph import check_graphs
    from seechat_weights.files.reading import local_path
    from seechat_weights.identify import describe_bundle
    from seechat_weights.model_files import is_bundle

    check_context(args, usage_error)
    check_engine(args, usage_error)
    path = local_path(args.model) if args.model else None
    if path and not is_bundle(path):
        return _identify(path, as_json=args.json)
    source = open_source(path)
    folder, manifest = source.path, source.manifest
    verify_hashes(folder, manifest)
    check_graphs(folder, manifest)
    options = EngineOptions(device=args.device, keep_vision=args.keep_vision, dtype=args.dtype)
    needed = engine_class(args.engine).plan(source, context=args.context, options=options)
    found, free = describe_bundle(folder, manifest), available_memory()
    if args.json:
        report = (
            _data(found)
            | {"command": chat_with(found), "run": chat_with(found), "path": str(folder)}
            | dataclasses.asdict(manifest)
        )
        report["memory"] = dataclasses.asdict(needed) | {"total": needed.total, "free": free}
        print_json(report)
        return 0
    size = sum(f.bytes for f in manifest.files.values())
    rows: dict[str, str | list[str]] = {
        "what": found.title,
        "path": str(folder),
        **found.facts,
        "files": f"{len(manifest.files)}, {human(size)}, all hashes right",
        "memory": [
            f"{human(needed.total)} at a context of {needed.context} tokens",
            needed.parts,
            f"{human(free)} free now",
        ],
        "start with": str(chat_with(found)) if args.model else "seechat chat",
    }
    print_table(rows)
    return 0


def _identify(path: Path, *, as_json: bool) -> int:
    """Say what published weights are; returns 1 if they are not usable."""
    from seechat_weights.identify import identify
    from seechat_weights.model_files import Openings

    found = identify(path, opener=Openings())
    if as_json:
        commands = {"command": export_with(found), "run": chat_with(found)}
        print_json(_data(found) | commands | {"path": str(path)})
        return 0 if found.usable else 1
    rows: dict[str, str | list[str]] = {"what": found.title, "path": str(path), **found.facts}
    if found.missing:
        rows["still needed"] = [f"{name}: {place}" for name, place in found.missing.items()]
    if command := export_with(found):
        rows["export with"] = command
    if command := chat_with(found):
        rows["run as it is"] = command
    print_table(rows)
    return 0 if found.usable else 1


def _data(found: "Identity") -> dict[str, Any]:
    """What JSON takes of an identity."""
    return vars(found) | {"options": {name: str(value) for name, value in found.options.items()}}
