"""Pictures: bit-exact with the published pixels where asked, sensible otherwise, and safe."""

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from reference import data, load_json, tensors
from seechat_lite.images import MAX_PIXELS, EncodedImage, ImageSource, load_image, pixels
from seechat_lite.pictures import decode
from seechat_weights.config import PixelSpec
from seechat_weights.errors import BundleError, ImageError
from seechat_weights.plain_text import one_line

CASES = load_json("images/cases.json")["images"]
DECODED_JPEG = tensors("images/decoded_jpeg.safetensors")
VARIANTS = [(name, v) for name, case in CASES.items() for v in case["pixels_sha256"]]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]
# no normalization: pixels come out as 0..255
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}


def published_spec(variant: str) -> PixelSpec:
    """The settings of a reference variant, such as "open_clip_56_after_convert_rgb"."""
    size = next(int(part) for part in variant.split("_") if part.isdigit())
    if variant.startswith("seechat"):
        return PixelSpec(image_size=size, resize="squash", exact=True)
    after = variant.endswith("after_convert_rgb")
    return PixelSpec(image_size=size, resize="crop", exact=True, rgb_first=after)


def levels(image: Image.Image | EncodedImage, size: int = 8, **settings: object) -> np.ndarray:
    """Sensible pixels as rounded levels, int [size, size, 3]."""
    spec = PixelSpec(image_size=size, **PLAIN, **settings)  # type: ignore[arg-type]
    return pixels(image, spec).transpose(1, 2, 0).round().astype(int)


def opened(source: ImageSource) -> Image.Image:
    """A file's picture as Pillow decodes it, not turned."""
    image = load_image(source).image
    if isinstance(image, Image.Image):
        return image
    return decode.load(decode.open_picture(image.data, image.format))


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_published_pixels(name: str, variant: str) -> None:
    image, expected = opened(data(f"images/{name}")), CASES[name]["pixels_sha256"]
    assert image.size == tuple(CASES[name]["size"])
    if name in DECODED_JPEG:
        # JPEG decoders may differ by a few levels: compare the decoding loosely, the rest exactly
        decoded = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(decoded - DECODED_JPEG[name]).max() <= 3
        image = Image.fromarray(DECODED_JPEG[name])
        if not published_spec(variant).rgb_first and CASES[name]["mode"] == "CMYK":
            return  # resized in CMYK, of which the reference keeps no decoding
    else:
        file = load_image(data(f"images/{name}")).image
        assert sha256(pixels(file, published_spec(variant))) == expected[variant]
    assert sha256(pixels(image, published_spec(variant))) == expected[variant]


def test_pixels_are_normalized() -> None:
    spec = PixelSpec(image_size=4)
    found = pixels(Image.new("RGB", (9, 5), (255, 0, 128)), spec)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    for channel, level in enumerate((255, 0, 128)):
        expected = (level / 255 - spec.mean[channel]) / spec.std[channel]
        np.testing.assert_allclose(found[channel], expected, atol=1e-6)


def test_exif_orientation_turns_the_picture_upright() -> None:
    file = data("images/07_exif_rot6.jpg")
    image, upright = opened(file), levels(load_image(file).image, 16)
    lying = levels(Image.fromarray(np.asarray(image)), 16)
    # the order of the two passes, between which Pillow rounds, is turned as well
    np.testing.assert_allclose(upright, np.rot90(lying, -1), atol=2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own
def test_damaged_exif_is_no_reason_to_refuse() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert abs(levels(load_image(file.getvalue()).image) - 9).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_transparency_shows_the_background(mode: str) -> None:
    """Left half black, right half transparent (in P, RGB and L by a colour named transparent)."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((255, 255, 255, 0), (4, 0, 8, 8))
    if mode == "P":
        image = image.convert("RGB").quantize(2)
        image.info["transparency"] = image.getpixel((7, 0))
    elif mode in ("RGB", "L"):
        image = image.convert(mode)
        image.info["transparency"] = 255 if mode == "L" else (255, 255, 255)
    elif mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("P")
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    found = levels(image, interpolation="nearest", background=(10, 200, 30))
    assert (found[:, :4] == 0).all()
    assert (found[:, 4:] == (10, 200, 30)).all()


def test_half_transparent_is_mixed() -> None:
    found = levels(Image.new("RGBA", (8, 8), (255, 0, 0, 51)))
    assert (found == (255, 204, 204)).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_are_scaled_down(dtype: type) -> None:
    ramp = np.linspace(0, 65535, 64).astype(dtype).reshape(8, 8)
    found = levels(Image.fromarray(ramp))
    np.testing.assert_allclose(found[..., 0], ramp / 257, atol=0.51)


def test_floats_are_stretched() -> None:
    ramp = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    found = levels(Image.fromarray(ramp))
    np.testing.assert_allclose(found[..., 0], (ramp + 1) / 2 * 255, atol=0.51)
    ramp[0, 0], ramp[7, 7] = np.nan, np.inf
    assert levels(Image.fromarray(ramp)).min() >= 0


def test_crop_takes_the_centre_and_squash_takes_all() -> None:
    image = Image.new("RGB", (24, 8), (255, 0, 0))
    image.paste((0, 255, 0), (8, 0, 16, 8))
    assert (levels(image, resize="crop", interpolation="nearest") == (0, 255, 0)).all()
    assert (levels(image, resize="squash", interpolation="nearest")[:, 0] == (255, 0, 0)).all()


def test_sensible_crop_is_the_published_crop() -> None:
    """The box resize differs from resize-then-crop by rounding only."""
    image = load_image(data("images/11_photo_420.jpg")).image
    for size in (56, 224):
        both = [
            pixels(image, PixelSpec(image_size=size, resize="crop", exact=exact, **PLAIN))
            for exact in (True, False)
        ]
        difference = np.abs(both[0] - both[1])
        assert difference.max() < 2.01 and difference.mean() < 0.02


def test_pad_keeps_the_aspect_ratio() -> None:
    found = levels(Image.new("RGB", (16, 8), (0, 0, 255)), resize="pad", background=(1, 2, 3))
    assert (found[2:6] == (0, 0, 255)).all()
    assert (found[[0, 1, 6, 7]] == (1, 2, 3)).all()


@pytest.mark.parametrize("setting", [{"resize": "stretch"}, {"interpolation": "cubic"}])
def test_unknown_setting(setting: dict[str, str]) -> None:
    with pytest.raises(BundleError, match="expected one of squash, crop, "):
        pixels(Image.new("RGB", (8, 8)), PixelSpec(**setting))  # type: ignore[arg-type]


@pytest.mark.slow
@given(
    st.sampled_from(MODES),
    st.tuples(st.integers(1, 90), st.integers(1, 90)) | st.sampled_from([(1, 5000), (5000, 1)]),
    st.sampled_from(["squash", "crop", "pad"]),
    st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_picture_gives_pixels(
    mode: str,
    size: tuple[int, int],
    resize: str,
    interpolation: str,
    exact: bool,
    rgb_first: bool,
    seed: int,
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode.startswith("I"):
        image = image.convert("L").convert("I").convert(mode)
    elif mode == "PA":
        image = image.convert("LA").convert("PA")
    else:
        image = image.convert(mode)
    spec = PixelSpec(
        image_size=20,
        resize=resize,
        interpolation=interpolation,
        exact=exact,
        rgb_first=rgb_first,
        **PLAIN,
    )
    try:
        found = pixels(image, spec)
    except ImageError as e:  # the published code fails on colour modes it cannot convert
        assert exact and f"colour mode {mode}" in str(e)
        return
    assert found.shape == (3, 20, 20) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 255.01


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_thread_of_a_picture(size: tuple[int, int], resize: str, exact: bool) -> None:
    image, process = Image.new("RGB", size, (7, 8, 9)), psutil.Process()
    before = process.memory_info().rss
    spec = PixelSpec(resize=resize, exact=exact, background=(7, 8, 9), **PLAIN)
    assert (pixels(image, spec).round().astype(int).T == (7, 8, 9)).all()
    assert process.memory_info().rss - before < 100_000_000


def test_keys_name_the_content(tmp_path: Path) -> None:
    source = data("images/01_rgb.png")
    copy = tmp_path / "其他 名字.png"
    copy.write_bytes(source.read_bytes())
    keys = {load_image(s).key for s in (source, str(source), copy, source.read_bytes())}
    assert keys == {hashlib.sha256(source.read_bytes()).hexdigest()}
    assert load_image(data("images/02_rgba.png")).key not in keys


def test_keys_of_pil_images() -> None:
    image = opened(data("images/01_rgb.png"))
    key = load_image(image).key
    assert load_image(image.copy()).key == key
    turned = image.copy()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    recoloured = image.quantize(16)
    palette = recoloured.copy()
    palette.putpalette([0, 0, 0] * 16)
    sliced = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    others = [load_image(i).key for i in (turned, recoloured, palette, sliced)]
    assert len({key, *others}) == 5


def test_a_pil_image_is_taken_as_it_was() -> None:
    image = Image.new("RGB", (4, 4))
    picture = load_image(image)
    image.paste((255, 255, 255), (0, 0, 4, 4))
    assert picture.image.getextrema() == ((0, 0),) * 3


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        settings = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **settings)
        assert (levels(load_image(tmp_path / name).image) == (255, 0, 0)).all()


def png(width: int, height: int, pixel_data: bytes = b"") -> bytes:
    """A PNG file of the given size, whatever data it really holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixel_data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(30000, 30000), (13000, 10000), (2_000_000_000, 1)])
def test_bomb_is_refused_before_decoding(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png(*size))
    with monkeypatch.context() as patch, pytest.raises(ImageError, match="at most 112 million"):
        patch.setattr(PngImageFile, "load", None)
        pixels(load_image(file).image, PixelSpec())
    assert MAX_PIXELS == 112_000_000


def test_bomb_as_pil_image() -> None:
    class Huge(Image.Image):
        size = (30000, 30000)

    with pytest.raises(ImageError, match="30000×30000 pixels; expected at most 112 million"):
        load_image(Huge())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_large_pictures_have_the_same_pixels(
    mode: str, resize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in bands of rows, to the last bit as in one piece."""
    noise = np.random.default_rng(0).integers(0, 256, (401, 199, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(noise).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    for interpolation in ("nearest", "bilinear", "bicubic"):
        spec = PixelSpec(image_size=32, resize=resize, interpolation=interpolation)
        whole = pixels(image, spec)
        with monkeypatch.context() as changed:
            changed.setattr("seechat_lite.pictures.reduce.BAND_PIXELS", 20_000)
            np.testing.assert_array_equal(pixels(image, spec), whole)


def test_32_bits_of_every_pixel_have_a_limit_of_their_own() -> None:
    file = io.BytesIO()
    Image.new("I", (5000, 4000)).save(file, "TIFF", compression="tiff_deflate")
    assert "5000×4000 pixels of 32 bits; expected at most 16 million" in refused(file.getvalue())


def refused(source: str | Path | bytes) -> str:
    with pytest.raises(ImageError) as e:
        pixels(load_image(source).image, PixelSpec())
    message = str(e.value)
    assert "\n" not in message and "expected" in message
    assert ("image bytes" if isinstance(source, bytes) else one_line(source)) in message
    return message


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_truncated_picture(tmp_path: Path, name: str, keep: float) -> None:
    whole = data(f"images/{name}").read_bytes()
    file = tmp_path / name
    file.write_bytes(whole[: int(len(whole) * keep)])
    message = refused(file)
    assert "damaged or truncated" in message or "not a picture" in message


@given(st.sampled_from(sorted(CASES)), st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_damaged_picture_reads_or_is_refused(name: str, where: int, damage: bytes) -> None:
    content = bytearray(data(f"images/{name}").read_bytes())
    where %= len(content)
    content[where : where + len(damage)] = damage
    try:
        image = opened(bytes(content))
    except ImageError as e:
        assert "\n" not in str(e)
    else:
        assert image.width * image.height <= MAX_PIXELS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"this is text\n" * 20, "not a picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "vector drawing"),
    ],
)
def test_no_picture(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(content)
    assert message in refused(file)
    assert message in refused(content)


def test_no_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.png")
    assert "not a file" in refused(tmp_path)
    assert "cannot be read" in refused("null\0character.png")


def test_unconvertible_colour_mode() -> None:
    with pytest.raises(ImageError, match="colour mode La"):
        pixels(Image.new("La", (8, 8)), PixelSpec())


def test_no_file_stays_open(tmp_path: Path) -> None:
    """Every kind of picture, whole and damaged, leaves the process with the files it had."""
    process = psutil.Process()
    before = len(process.open_files())
    kept = []
    for name in CASES:
        kept.append(load_image(data(f"images/{name}")))
        (tmp_path / name).write_bytes(data(f"images/{name}").read_bytes()[:40])
        refused(tmp_path / name)
    assert len(process.open_files()) <= before
