"""Draw every emoji once: SVG to RGBA pixels, kept in one file."""

from pathlib import Path

import numpy as np
from concepts import load_concepts
from emoji_sets import VENDORS, drawings, fetch
from PIL import Image

SIZE = 144  # larger than an icon is ever shown in a scene, and enough for a single one


def draw(svg: str, size: int = SIZE) -> np.ndarray:
    """An SVG as straight-alpha RGBA, uint8 [size, size, 4], centred on a transparent square."""
    import io

    import resvg_py  # only who draws needs it

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (size, size):  # a few drawings are not square
        image.thumbnail((size, size))
        square = Image.new("RGBA", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    return np.asarray(image)


def render(work: Path) -> Path:
    """Render all vendors to work/icons.npz (pixels, concept, vendor index, code point) once."""
    target = work / "icons.npz"
    if target.exists():
        return target
    sets, concepts = fetch(work), load_concepts()
    pixels, concept, vendor, code = [], [], [], []
    for number, v in enumerate(VENDORS):
        found = drawings(sets, v.key, concepts)
        print(f"rendering {len(found)} drawings of {v.key}")
        for c, hexcode, svg in found:
            pixels.append(draw(svg))
            concept.append(c.index)
            vendor.append(number)
            code.append(hexcode)
    np.savez(
        target,
        pixels=np.stack(pixels),
        concept=np.array(concept),
        vendor=np.array(vendor),
        code=np.array(code),
    )
    return target


if __name__ == "__main__":
    render(Path(__file__).with_name("work"))
