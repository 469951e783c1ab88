"""Serves the page at `/`: modules to read, two libraries and sample pictures, as they are.

There is no build step, and nothing comes from another host. `vendor/README.md` says where the
libraries are from.
"""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_NAMES = (
    "index.html",
    "page.css",
    "favicon.svg",
    "page.js",
    "api.js",
    "chat.js",
    "composer.js",
    "dialogs.js",
    "exports.js",
    "markdown.js",
    "model.js",
    "pictures.js",
    "settings.js",
    "sidebar.js",
    "store.js",
    "texts.js",
    "view.js",
    "welcome.js",
    "vendor/marked.esm.js",
    "vendor/purify.es.mjs",
    "samples/banana-rocket.png",
    "samples/four-things.png",
    "samples/frog.png",
    "samples/hamburger.png",
    "samples/panda-bicycle.png",
    "samples/panda.png",
)
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "png": "image/png",
    "svg": "image/svg+xml",
}
_FILES = {"/" if name == "index.html" else f"/{name}": name for name in _NAMES}
PATHS = frozenset(_FILES)

_HEADERS = {
    # nothing from any other host, no script but ours, in nobody's frame; HTML is made from text in
    # one place only, the sanitizer
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """A route for each file; the files are read once."""
    return [_route(path, name) for path, name in _FILES.items()]


def _route(path: str, name: str) -> Route:
    content = (files(__name__) / name).read_bytes()
    kind = _KINDS[name.rpartition(".")[2]]

    async def send(_: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return Route(path, send, methods=["GET"])
