"""The command `seechat serve`: its options, and the server's settings made from them."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seechat_lite.cli.options import (
    UsageError,
    add_format_option,
    add_load_options,
    add_model_option,
    load_options,
)
from seechat_weights.errors import SeechatError
from seechat_weights.libraries import import_error

KEY_VARIABLE = "SEECHAT_API_KEY"
MAX_SLOTS = 256


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `serve` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "serve",
        parents=[common],
        usage="%(prog)s [options]",
        help="an OpenAI-compatible server, and a page to drop pictures on",
        description="Serve a model to programs that speak the OpenAI API, and to people on a web "
        "page. Tells its address once it listens: to programs on stdout.",
    )
    add = parser.add_argument
    add_model_option(parser)
    add_load_options(parser)
    add_format_option(parser)
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add(
        "--port",
        type=int,
        default=8080,
        metavar="N",
        help="to listen on; 0: a free one (%(default)s)",
    )
    add(
        "--api-key",
        action="append",
        metavar="KEY",
        help="a key that clients must send; may be repeated. The environment variable "
        f"{KEY_VARIABLE} does the same, and fewer people can see it",
    )
    add(
        "--alias",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of the model; may be repeated",
    )
    add(
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which clients call this server, besides localhost; may be repeated",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin use the server; may be repeated",
    )
    add("--https-images", action="store_true", help="fetch pictures from public https: addresses")
    add("--media-path", type=Path, metavar="DIR", help="read file: pictures below this folder")
    add(
        "--slots",
        type=int,
        default=4,
        metavar="N",
        help="answers that are written at once, each with a cache of its own; fewer if memory is "
        "short (%(default)s)",
    )
    add("--queue", type=int, default=32, metavar="N", help="requests that may wait (%(default)s)")
    add("--max-body", type=float, default=32, metavar="MB", help="largest request (%(default)s)")
    add(
        "--image-cache",
        type=float,
        default=64,
        metavar="MB",
        help="memory for the embeddings of pictures that were asked about (%(default)s)",
    )
    add(
        "--keep-alive",
        type=float,
        metavar="SECONDS",
        help="unload the model when nobody asked for so long; default: never",
    )
    add("--log-json", action="store_true", help="write the log as JSON lines")
    parser.set_defaults(run=lambda args: _serve(args, parser.error))


def _check_origin(origin: str, usage_error: Callable[[str], Any]) -> None:
    """Refuse what no browser ever sends, and tell of what lets in more than it seems."""
    if origin.startswith("file:"):
        usage_error(f"--cors-origin {origin}: browsers call pages of files `null`: give that")
    if origin in ("*", "null"):
        whom = "any web page" if origin == "*" else "pages of files, and of many a web site,"
        print(f"seechat: --cors-origin {origin} lets {whom} use this server", file=sys.stderr)
    elif not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]*/?", origin, re.IGNORECASE):
        usage_error(
            f"--cors-origin {origin}: expected an origin as https://example.com, `null` or *"
        )


def _serve(args: argparse.Namespace, usage_error: UsageError) -> int:
    counts = (("port", 0), ("slots", 1), ("queue", 0), ("max_body", 0), ("image_cache", 0))
    for name, least in counts:
        if getattr(args, name) < least:
            usage_error(f"--{name.replace('_', '-')}: expected {least} or more")
    if args.slots > MAX_SLOTS:
        usage_error(f"--slots: expected at most {MAX_SLOTS}")
    if args.port > 65535:
        usage_error("--port: expected at most 65535")
    if args.keep_alive is not None and args.keep_alive < 0:
        usage_error("--keep-alive: expected 0 or more")
    if args.media_path and not args.media_path.is_dir():
        usage_error(f"--media-path: {args.media_path} is no folder")
    for origin in args.cors_origin:
        _check_origin(origin, usage_error)
    variable = os.environ.get(KEY_VARIABLE)
    keys = [key.strip() for key in args.api_key or ([] if variable is None else [variable])]
    if not all(key and key.isascii() and key.isprintable() for key in keys):
        usage_error("the API key: expected printable ASCII characters")
    options = load_options(args, usage_error)
    from seechat_lite.chat import Model
    from seechat_lite.engines import engine_class
    from seechat_lite.loading import load
    from seechat_lite.source import open_source

    try:
        from seechat_lite.server.listen import serve
        from seechat_lite.server.settings import Settings
    except (ImportError, OSError) as e:
        needed, install = "the server needs it", '"seechat-lite[server]"'
        raise import_error(SeechatError, e, needed=needed, install=install) from None
    settings = Settings(
        max_body=int(args.max_body * 1e6),
        max_bodies=int(args.max_body * 8e6),
        https_images=args.https_images,
        media_path=args.media_path,
        api_keys=tuple(keys),
        cors_origins=tuple(o.rstrip("/") for o in args.cors_origin),
        hosts=tuple(args.host_name),
        allow_host="start it with --host-name",
        allow_origin="start it with --cors-origin",
        aliases=tuple(args.alias),
        slots=args.slots,
        queue=args.queue,
        keep_alive=args.keep_alive,
    )

    def listening(address: str) -> None:
        if not sys.stdout.isatty():  # programs read the address from stdout
            print(address, flush=True)
        print(
            f"seechat: page {address} · OpenAI API {address}/v1 · Ctrl-C: stop 停止",
            file=sys.stderr,
        )

    reads_checkpoints = engine_class(args.engine).reads_checkpoints
    source = open_source(args.model, vision=options["vision"], only_bundles=not reads_checkpoints)
    opened = [source]

    def load_model() -> Model:
        # the first time, what was just opened; after it was unloaded, the files may have changed
        found = opened.pop() if opened else args.model
        return load(found, image_cache=int(args.image_cache * 1e6), **options)

    return serve(
        load_model,
        source.manifest,
        settings=settings,
        host=args.host,
        port=args.port,
        context=args.context,
        format=args.format,
        listening=listening,
        log_json=args.log_json,
        verbose=args.verbose,
    )
