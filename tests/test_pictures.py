"""Pictures from strangers: named, bounded in memory and time, given up when nobody waits."""

import base64
import io
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

import seechat_lite as sl
from fuzz_pictures import Peak, fuzz
from reference import data
from seechat_lite.cli.options import picture_source
from seechat_lite.engines.base import Cancelled
from seechat_lite.images import load_image, pixels, several
from seechat_lite.pictures import decode, headers, pool, worker
from seechat_lite.pictures.formats import PLUGINS, identify
from seechat_weights.config import PixelSpec
from seechat_weights.errors import ImageError

SPEC = PixelSpec(image_size=32)
PLAIN = PixelSpec(image_size=8, mean=(0.0,) * 3, std=(1 / 255,) * 3)  # levels as they are
POSIX = pytest.mark.skipif(os.name != "posix", reason="not on Windows")


def read(source: Any, spec: PixelSpec = SPEC) -> np.ndarray:
    return pixels(load_image(source).image, spec)


def refused(source: Any) -> str:
    with pytest.raises(ImageError) as e:
        read(source)
    assert "\n" not in str(e.value) and "expected" in str(e.value)
    return str(e.value)


def saved(image: Image.Image, format: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def colours(width: int = 61, height: int = 47) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A picture that takes seconds to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), "JPEG2000", irreversible=True)


# --- what a file is


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a vector drawing (PostScript)"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "a vector drawing (WMF)"),
        (b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60), "a vector drawing (EMF)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a vector drawing (SVG)"),
        (b"<?xml version='1.0'?>\n<svg/>", "a vector drawing (SVG)"),
        (b"\xef\xbb\xbf<!DOCTYPE html><html><body>404", "a web page"),
        (b'{"error": "not found"}', "JSON"),
        (b"<Error><Code>AccessDenied</Code></Error>", "an XML document"),
        ("图片".encode() * 2000, "text"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC photo"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0qt  ", "a video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0crx isom", "a camera's raw file"),
        (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"PK\3\4\x14\0", "a zip archive"),
        (b"\0\5\x16\7\0\2\0\0", "a macOS companion file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL picture"),
        (b"DDS |\0\0\0", "a DDS texture"),
        (b"\x1c\3\x14\0\2\0\x10", "an IPTC record"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"GRIB" + bytes(20), "a GRIB file"),
        (bytes(5000), "nothing but zeros"),
        (b"RIFF\0\0\0\0AVI LIST", "a video"),
        (b"/9j/4AAQSkZJRgABAQ", "the text of base64"),
        (b"\xde\xad\xbe\xef" * 9, "unknown data"),
    ],
)
def test_what_is_no_picture_is_named(start: bytes, what: str, tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    file.write_bytes(start)
    message = refused(file)
    assert message.startswith(f"{file}: {what}"), message
    assert "not a picture" in message or "HEIC" in message


def test_an_unfinished_download_is_said(tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg.crdownload"
    file.write_bytes(bytes(100))
    assert "download" in refused(file)


@given(st.binary(max_size=300) | st.sampled_from([b"RIFF", b"II*\0", b"\0\0\1\0"]).map(bytes))
def test_any_bytes_are_named(content: bytes) -> None:
    try:
        assert identify(content, content[-32:]) in (*PLUGINS, "HEIF")
    except ImageError as e:
        assert "expected" in str(e)


def test_no_plugin_that_is_not_listed_is_imported() -> None:
    """Nothing opens what is inside of files of other formats, or starts a program."""
    assert not {"IPTC", "EPS", "WMF", "FPX", "MIC", "GRIB", "HDF5", "BUFR", "PSD"} & PLUGINS.keys()


def test_a_pil_image_opened_elsewhere_is_read_within_the_same_bounds(tmp_path: Path) -> None:
    """What the caller has opened and not loaded is not loaded in its place."""
    Image.init()
    inner = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(inner)) as image:
        assert "opened as EPS" in refused(image)
    fields = [(3, 20, b"\0\x10"), (3, 30, b"\0\x10"), (3, 60, b"\1\0"), (3, 120, b"\5")]
    record = b"".join(
        bytes([0x1C, a, b]) + struct.pack(">H", len(c)) + c for a, b, c in (*fields, (8, 10, inner))
    )
    with Image.open(io.BytesIO(record)) as image:
        assert "opened as IPTC" in refused(image)
    with Image.open(io.BytesIO(saved(colours(), "WEBP"))) as image:
        assert isinstance(image, ImageFile.ImageFile)
        assert load_image(image).key == load_image(saved(colours(), "WEBP")).key
        image.load()
        assert read(image).shape == (3, 32, 32)


# --- bounds


def tiff_of_one_tile(width: int, height: int) -> bytes:
    """16×16 pixels of a tile that is larger."""
    tags = [
        (256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, width), (323, height),
        (324, 134), (325, 10),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + bytes(20)


def webp_canvas(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + b"VP8L"
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def icon(inner: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


def apple_icon(inner: bytes) -> bytes:
    size = len(inner)
    return b"icns" + struct.pack(">I", size + 16) + b"ic09" + struct.pack(">I", size + 8) + inner


def png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), *chunks, (b"IEND", b""))
    )


@pytest.mark.parametrize(
    "content",
    [
        tiff_of_one_tile(1 << 16, 1 << 14),
        webp_canvas(10500, 10600),
        webp_canvas(16384, 16384),
        icon(png(13300, 13400, (b"IDAT", zlib.compress(bytes(99))), colour=6)),
        apple_icon(png(13000, 13000, (b"IDAT", zlib.compress(bytes(99))), colour=6)),
        b"P5 11000 11000 255\n",
        b"qoif" + struct.pack(">II", 20000, 20000) + b"\4\0" + bytes(20),
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(30),
    ],
)
def test_what_would_take_too_much_is_said_before_it_is_taken(content: bytes) -> None:
    before, peak = psutil.Process().memory_info().rss, Peak()
    with peak:
        message = refused(content)
    assert "at most" in message or "damaged or truncated" in message
    assert peak.bytes - before < 150_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "size"), [("WEBP", (4600, 4500)), ("AVIF", (4400, 4400)), ("JPEG", (9400, 9500))]
)
def test_the_largest_pictures_of_a_format_are_read(format: str, size: tuple[int, int]) -> None:
    """Near the bound, in a worker that was first held to less."""
    fast: dict[str, Any] = {"WEBP": {"method": 0}, "AVIF": {"speed": 10}}.get(format, {})
    content, peak = (
        saved(Image.new("RGB", size, (9, 200, 30)), format, **fast),
        Peak(),
    )
    before = psutil.Process().memory_info().rss
    with peak:
        assert np.abs(read(content, PLAIN)[:, 4, 4] - (9, 200, 30)).max() < 3
    assert peak.bytes - before < 450_000_000


def test_a_thread_of_a_picture() -> None:
    """Pillow's table for resizing has 32 bytes for every pixel of a side."""
    before, peak = psutil.Process().memory_info().rss, Peak()
    with peak:
        refused(png(15_000_000, 1, (b"IDAT", zlib.compress(bytes(15_000_001))), colour=0))
    assert peak.bytes - before < 450_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [("RGBA", "TIFF", {"compression": "tiff_lzw"}), ("LA", "TIFF", {}), ("RGBA", "TGA", {})],
)
def test_memory_that_no_header_says(mode: str, format: str, options: dict[str, Any]) -> None:
    """Little to decode, and more for what is then made of it than a worker is first given."""
    white = Image.new(mode, (4000, 3900), (255,) * len(mode))
    assert (read(saved(white, format, **options), PLAIN).round() == 255).all()


def test_a_jpeg_of_too_many_scans() -> None:
    content = saved(colours(2048, 2048), "JPEG", progressive=True)
    at = content.rindex(b"\xff\xda")
    assert "scans" in refused(content[:at] + content[at:-2] * 1000 + b"\xff\xd9")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "JPEG2000"])
def test_a_decoder_that_takes_too_long_is_ended(
    format: str, slow: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CPU_SECONDS", 0.2)
    if format == "JPEG":
        monkeypatch.setattr(decode, "EASY_PIXELS", 0)
        assert read(saved(colours(), "JPEG")).shape == (3, 32, 32)  # others are read meanwhile
    else:
        assert "decoding takes more than" in refused(slow)


@pytest.mark.slow
def test_given_up_when_nobody_waits(slow: bytes) -> None:
    gone = threading.Event()
    threading.Timer(0.3, gone.set).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        pixels(load_image(slow).image, SPEC, stopped=gone.is_set)
    assert time.monotonic() - start < 20  # it would not end by itself within the limit
    pool.close()
    assert not psutil.Process().children()


@pytest.mark.slow
def test_stop_ends_the_picture_that_is_being_decoded(slow: bytes) -> None:
    with sl.load() as model:
        chat = model.chat()
        threading.Timer(0.3, chat.stop).start()
        assert chat.ask("这是什么？", slow) == ""
        assert chat.stats and chat.stats.finish_reason == "cancelled"
        assert chat.ask("这是什么？", data("images/01_rgb.png"))


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_a_worker_ends_with_who_asked(signal: str, slow: bytes, tmp_path: Path) -> None:
    import signal as signals

    (tmp_path / "slow.jp2").write_bytes(slow)
    script = "import sys; from seechat_lite.images import *\n"
    script += "from seechat_weights.config import *\n"
    script += "print(flush=True); pixels(load_image(sys.argv[1]).image, PixelSpec())"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "slow.jp2"], stdout=subprocess.PIPE
    ) as asking:
        assert asking.stdout
        asking.stdout.readline()
        children: list[psutil.Process] = []
        while not children:
            children = psutil.Process(asking.pid).children()
        time.sleep(0.3)
        asking.send_signal(getattr(signals, signal))
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone and not alive


def test_workers_are_used_again_and_replaced() -> None:
    content = saved(colours(), "WEBP")
    read(content)
    first = psutil.Process().children()
    read(content)
    assert psutil.Process().children() == first and len(first) == 1
    first[0].kill()
    first[0].wait()
    assert read(content).shape == (3, 32, 32)
    pool.close()
    assert not psutil.Process().children()


def test_a_broken_decoder_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends its process, as a segmentation fault does."""
    script = "import sys; sys.stdin.buffer.read(10); sys.exit(3)"
    pool.close()
    monkeypatch.setattr(pool, "_command", lambda: [sys.executable, "-c", script])
    assert "broke down" in refused(saved(colours(), "WEBP"))


@POSIX
def test_nothing_is_left_open() -> None:
    content = saved(colours(), "WEBP")
    read(content)
    pool.close()
    before = psutil.Process().num_fds()
    for _ in range(5):
        read(content)
        refused(content[:50])
    pool.close()
    assert psutil.Process().num_fds() == before


@POSIX
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_workers_of_its_own() -> None:
    script = """
import io, os, sys
sys.path.append("../bench")
from seechat_lite.pictures import pool
from test_pictures import colours, read, saved
content = saved(colours(), "WEBP")
read(content)
child = os.fork()
if not child:
    read(content)
    pool.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
read(content)
"""
    run = [sys.executable, "-c", script]
    subprocess.run(run, check=True, cwd=Path(__file__).parent, timeout=300)


def test_without_a_process_pictures_are_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a packed application that does not start itself as a worker."""
    content = saved(colours(), "WEBP")
    expected = read(content)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    pool.close()
    np.testing.assert_array_equal(read(content), expected)
    assert not psutil.Process().children()
    assert "at most" in refused(webp_canvas(10500, 10600))
    monkeypatch.setattr(worker, "packed", True)
    assert pool._command() == [sys.executable, worker.ARGUMENT]


def test_a_packed_application_becomes_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    pool.close()
    script = "from seechat_lite.pictures.worker import run_if_asked; run_if_asked()"
    command = [sys.executable, "-c", script, worker.ARGUMENT]
    monkeypatch.setattr(pool, "_command", lambda: command)
    assert read(saved(colours(), "WEBP")).shape == (3, 32, 32)
    pool.close()


# --- metadata


@given(st.integers(1, 8), st.sampled_from("<>"), st.binary(max_size=60), st.integers(0, 7))
def test_orientation_is_read_whatever_else_is_damaged(
    orientation: int, order: str, rest: bytes, before: int
) -> None:
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    others = struct.pack(order + "HHII", 0x010E, 99, 2**31, 2**31) * before
    block = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, before + 1)
    assert headers.orientation_of_exif(b"Exif\0\0" + block + others + entry + rest) == orientation


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]))
def test_no_exif_block_fails(block: bytes, format: str) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0" + block
    try:
        content = saved(colours(16, 16), format, exif=exif)
    except Exception:  # Pillow reads it while it saves
        return
    assert read(content).shape == (3, 32, 32)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"pHYs", b"sBIT"])
def test_no_metadata_of_a_png_fails_or_takes_much(kind: bytes) -> None:
    bomb = b"a\0\0" + zlib.compress(bytes(100 << 20), 9)
    rows = (b"IDAT", zlib.compress(bytes(4 * 13)))
    for body in (b"", b"\1", bomb):
        assert read(png(4, 4, (kind, body), rows)).shape == (3, 32, 32)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_metadata_without_end(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kilobyte of it may be a megabyte to search, twenty thousand times in a file."""
    looked = []
    for name in ("orientation_of_exif", "orientation_of_xmp", "_inflated"):
        real = getattr(headers, name)
        monkeypatch.setattr(headers, name, lambda b, real=real: looked.append(b) or real(b))
    content = saved(colours(), format)
    if format == "PNG":
        profile = b"Raw profile type exif\0\0" + zlib.compress(b"\n\n\n" + b"0" * 99999)
        text = png(9, 9, (b"zTXt", profile), (b"tEXt", b"a\0b"), (b"eXIf", b"II*\0"))[33:-12]
        content = content[:33] + text * 200 + content[33:]
    else:
        block = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(60000)
        segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
        content = content[:2] + segment * 200 + content[2:]
    assert read(content).shape == (3, 32, 32)
    assert len(looked) < 100  # it is opened twice at most


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_in_every_format(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = colours()
    settings = {"lossless": True} if format == "WEBP" else {"quality": 95}
    turned = load_image(saved(image, format, exif=exif.tobytes(), **settings)).image
    upright = pixels(turned, PLAIN)
    plain = pixels(load_image(saved(image, format, **settings)).image, PLAIN)
    corner = {
        1: (0, 0),
        2: (0, 1),
        3: (1, 1),
        4: (1, 0),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    swap = (0, 2, 1) if orientation >= 5 else (0, 1, 2)
    expected = plain.transpose(swap)
    down, across = corner[orientation]
    expected = expected[:, :: -1 if down else 1, :: -1 if across else 1]
    assert np.abs(upright - expected).max() < 12  # lossy, and the passes come in another order


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
@pytest.mark.parametrize("orientation", [1, 2])
def test_a_png_in_bands_is_the_same(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seechat_lite.pictures import reduce

    content = saved(colours(401, 301).convert(mode), "PNG")
    whole = decode.open_picture(content, "PNG")
    expected = reduce.reduce(decode.load(whole), SPEC, orientation=orientation)
    monkeypatch.setattr(reduce, "BAND_PIXELS", 20_000)
    bands = decode.open_picture(content, "PNG", budget=1000, least=32)
    found = reduce.reduce(decode.load(bands), SPEC, orientation=orientation)
    assert found.tobytes() == expected.tobytes()
    with pytest.raises(ImageError, match="damaged or truncated"):
        short = decode.open_picture(content[:-900], "PNG", budget=1000, least=32)
        reduce.reduce(decode.load(short), SPEC)


def test_pictures_that_pillow_warns_of(capfd: pytest.CaptureFixture[str]) -> None:
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(1 + 10_000)) for _ in range(10_000)) + pack.flush()
    head = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    content = png(1, 1, (b"IDAT", rows)).replace(png(1, 1)[8:33], b"", 1)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    assert read(content[:8] + chunk + content[8:]).max() < 0
    assert capfd.readouterr().err == ""


# --- greys


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_greys_of_any_width_are_as_bright_as_they_are(format: str, bits: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16).reshape(8, 8)
    found = read(saved(Image.fromarray(ramp), format), PLAIN)[0]
    np.testing.assert_allclose(found, np.linspace(0, 255, 64).reshape(8, 8), atol=0.6)
    np.testing.assert_allclose(read(ramp, PLAIN)[0], found, atol=0.6)


def test_a_tiff_says_what_is_white() -> None:
    ramp = np.linspace(0, 3000, 64).round().astype(np.uint16).reshape(8, 8)
    content = saved(Image.fromarray(ramp), "TIFF", tiffinfo={281: 4095})
    np.testing.assert_allclose(read(content, PLAIN)[0].max(), 3000 / 4095 * 255, atol=0.6)


# --- sources


def test_whatever_people_pass(tmp_path: Path) -> None:
    image = colours()
    content = saved(image, "PNG")
    path = tmp_path / "猫 cat.png"
    path.write_bytes(content)
    expected = read(content)

    class PathLike:
        def __fspath__(self) -> str:
            return str(path)

    class Reader:  # has nothing but read()
        def __init__(self) -> None:
            self._file = io.BytesIO(content)

        def read(self, size: int = -1) -> bytes:
            return self._file.read(min(size, 7) if size > 0 else -1)

    written = io.BytesIO()
    written.write(content)  # and not set back, as people forget
    twice = np.frombuffer(bytes(b for byte in content for b in (byte, 0)), np.uint8)
    with path.open("rb") as file, path.open("rb") as mapped:
        sources = [
            path, str(path), path.as_uri(), PathLike(), bytearray(content), memoryview(content),
            memoryview(twice)[::2], io.BytesIO(content), written, file, Reader(),
            mmap.mmap(mapped.fileno(), 0, access=mmap.ACCESS_READ),
            np.frombuffer(content, np.uint8), image, np.asarray(image), np.asarray(image).copy("F"),
            "data:image/png;base64," + base64.b64encode(content).decode(),
        ]  # fmt: skip
        for source in sources:
            np.testing.assert_array_equal(read(source), expected)
            assert len(list(several(source))) == 1
        assert file.tell() == 0 and written.tell() == len(content)
        assert len(list(several(iter([path, content, image])))) == 3


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 32, 40), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((2, 9, 9, 3), np.uint8), "a batch"),
        (np.zeros((9, 9, 7), np.uint8), "check its shape"),
        (np.zeros(9, np.float32), "check its shape"),
        (np.zeros((0, 9), np.uint8), "0 pixels"),
        (np.full((9, 9, 3), -1.5), "0 to 1"),
        (np.full((9, 9), np.nan), "0 to 1"),
        (np.full((9, 9), 70000), "0 to 255"),
        (np.zeros((9, 9), complex), "expected numbers"),
        (np.zeros((9, 9), object), "expected numbers"),
        (np.array("cat.png"), "expected"),
    ],
)
def test_arrays_that_are_no_picture(array: np.ndarray, message: str) -> None:
    assert message in refused(array)


@pytest.mark.parametrize(
    "dtype", [bool, np.uint8, np.uint16, np.int64, np.float16, np.float64, ">u2"]
)
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (8, 8, 4)])
def test_arrays_of_any_type(dtype: Any, shape: tuple[int, ...]) -> None:
    white = np.ones(shape) if np.dtype(dtype).kind in "fb" else np.full(shape, 255)
    assert (read(white.astype(dtype), PLAIN).round() == 255).all()


@pytest.mark.parametrize(
    "source", [3, 1.5, object(), {"image": "cat.png"}, [["cat.png"]], [None], io.StringIO("cat")]
)
def test_what_is_no_source_is_an_image_error(source: Any) -> None:
    with pytest.raises(ImageError, match="expected"):
        for one in several(source):
            read(one)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://example.com/cat.png", "an address"),
        ("HTTP://example.com/cat.png", "an address"),
        ("data:image/png;base64,####", "base64 is damaged"),
        ("data:image/png", "no comma"),
        ("data:image/png;base64,", "empty"),
        ("/9j/4AAQSkZJRg" + "A" * 5000, "base64"),
        ("\0", "cannot be read"),
        ("", "expected"),
    ],
)
def test_texts_that_are_no_path(text: str, message: str) -> None:
    found = refused(text)
    assert message in found and len(found) < 500


@pytest.mark.parametrize(("tag", "value"), [(259, 34887), (259, 34712), (258, 64)])
def test_a_tiff_of_another_kind_is_not_called_damaged(tag: int, value: int) -> None:
    content = saved(Image.new("L", (9, 9)), "TIFF")
    at = content.index(struct.pack("<HHI", tag, 3, 1)) + 8
    content = content[:at] + struct.pack("<H", value) + content[at + 2 :]
    assert "a TIFF of a kind that is not read" in refused(content)


def test_a_text_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("cat")
    with (tmp_path / "a.png").open() as file:
        assert "gives text" in refused(file)
    closed = io.BytesIO(b"x")
    closed.close()
    assert "cannot be read" in refused(closed)


@POSIX
def test_pipes_on_the_command_line(tmp_path: Path) -> None:
    content, pipe = saved(colours(), "PNG"), tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "not a file" in refused(pipe)  # the library would wait for ever
    threading.Thread(target=lambda: pipe.write_bytes(content)).start()
    np.testing.assert_array_equal(read(picture_source(str(pipe))), read(content))


def test_a_thumbnail_is_upright_and_small() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("JPEG", "WEBP", "PNG"):
        small = sl.thumbnail(saved(colours(600, 400), format, exif=exif.tobytes()), (100, 90))
        assert small.size == (60, 90) and small.mode == "RGB"
    assert sl.thumbnail(colours(20, 10), (100, 100)).size == (20, 10)
    for mode in ("P", "1", "LA", "I;16", "F"):
        assert sl.thumbnail(colours(3000, 500).convert("L").convert(mode), (30, 30)).size == (30, 5)


@pytest.mark.slow
def test_mutated_pictures_are_read_or_refused() -> None:
    """A sample of what bench/fuzz_pictures.py does."""
    report = fuzz(600, seed=1)
    assert not [why for why, _ in report.failures]
    assert report.read > 100 and report.refused > 100
