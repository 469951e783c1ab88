"""Which captions describe pictures best: files of captions, counting, the chart and the page."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import data
from seechat_lite.images import ImageSource
from seechat_lite.scoring.captions import CaptionFile, names_of
from seechat_lite.scoring.chart import chart, charts
from seechat_lite.scoring.comparison import Candidate, Comparison, Scored, compare
from seechat_lite.scoring.page import page
from seechat_lite.scoring.pictures import candidates
from seechat_lite.scoring.published import SHARES
from seechat_lite.scoring.win_table import picture_pairs, picture_wins, win_table
from seechat_weights.errors import OptionError

# --- counting

# five pictures, three methods: cosines, and what is counted by hand
HAND = np.array([
    [0.40, 0.30, 0.20],  # A
    [0.10, 0.50, 0.20],  # B
    [0.30, 0.30, 0.10],  # A and B, a half each
    [0.20, 0.20, 0.20],  # all, a third each
    [0.45, 0.10, 0.44],  # A
])  # fmt: skip


def test_a_table_by_hand() -> None:
    table = win_table(HAND)
    # A: 1 + 0 + 1/2 + 1/3 + 1; B: 0 + 1 + 1/2 + 1/3 + 0; C: 1/3
    np.testing.assert_allclose(table.wins, [17 / 30, 11 / 30, 2 / 30])
    assert table.wins.sum() == pytest.approx(1)
    np.testing.assert_allclose(table.means, [0.29, 0.28, 0.228])
    # A over B: 1, 0, 1/2, 1/2, 1; A over C: 1, 0, 1, 1/2, 1; B over C: 1, 1, 1, 1/2, 0
    np.testing.assert_allclose(table.pairs, [[0.5, 0.6, 0.7], [0.4, 0.5, 0.7], [0.3, 0.3, 0.5]])
    assert table.pictures == 5


def test_intervals_are_those_of_the_mean() -> None:
    """Of 1000 pictures of which one method wins a third, the standard error is 1.5 points."""
    random = np.random.default_rng(1)
    scores = random.random((1000, 3))
    table = win_table(scores, seed=7)
    wide = (table.wins_between[1] - table.wins_between[0]) / (2 * 1.96)
    expected = np.sqrt(table.wins * (1 - table.wins) / 1000)
    np.testing.assert_allclose(wide, expected, rtol=0.1)
    low, high = table.wins_between
    assert (low <= table.wins).all() and (table.wins <= high).all()
    again, other = win_table(scores, seed=7), win_table(scores, seed=8)
    np.testing.assert_array_equal(table.pairs_between, again.pairs_between)
    assert (table.pairs_between != other.pairs_between).any()


SCORES = st.integers(1, 5).flatmap(
    lambda methods: st.lists(
        st.lists(st.sampled_from([-0.1, 0.1, 0.2, 0.2 + 1e-8, 0.7]), min_size=methods,
                 max_size=methods), min_size=1, max_size=8,
    )
)  # fmt: skip


@given(scores=SCORES)
def test_shares_are_whole(scores: list[list[float]]) -> None:
    array = np.array(scores)
    wins, pairs = picture_wins(array), picture_pairs(array)
    np.testing.assert_allclose(wins.sum(1), 1)
    np.testing.assert_allclose(pairs + pairs.transpose(0, 2, 1), 1)
    # whoever wins a picture alone beats everybody there
    for won, pair in zip(wins, pairs, strict=True):
        for i in np.flatnonzero(won == 1):
            assert (np.delete(pair[i], i) == 1).all()
    order = np.random.default_rng(0).permutation(array.shape[1])
    np.testing.assert_array_equal(picture_wins(array[:, order]), wins[:, order])


# --- files of captions

TWO = {"a/1.jpg": "一只猫", "a/2.jpg": "两只狗"}
LINES = [{"image": k, "caption": v, "model": "m"} for k, v in TWO.items()]
FORMS = {
    "lines": "\n".join(map(json.dumps, LINES)),
    "lines and a mark": "\ufeff"
    + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in LINES),
    "object": json.dumps(TWO),
    "object over lines": json.dumps(TWO, indent=1, ensure_ascii=False),
    "list": json.dumps([{"image": k, "caption": v} for k, v in TWO.items()], indent=1),
    "tabs": "\n\n".join(f"{k}\t{v}" for k, v in TWO.items()) + "\n",
}


def captions(tmp_path: Path, text: str | bytes, name: str = "A") -> CaptionFile:
    file = tmp_path / f"{name}.captions"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CaptionFile(name, file)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_files(tmp_path: Path, form: str) -> None:
    file = captions(tmp_path, FORMS[form])
    assert len(file) == 2
    assert file.find(["a/1.jpg"], "0" * 64) == "一只猫"
    assert file.find(["x/a/2.jpg", "a/2.jpg"], "1" * 64) == "两只狗"
    assert file.find(["3.jpg"], "2" * 64) is None
    assert file.unused == 0


def test_utf16_of_windows(tmp_path: Path) -> None:
    assert captions(tmp_path, FORMS["tabs"].encode("utf-16")).find(["a/1.jpg"], "") == "一只猫"


def test_content_comes_before_names(tmp_path: Path) -> None:
    """A line with a picture's sha256 is about that content alone."""
    lines = [
        {"image": "1.jpg", "sha256": "a" * 64, "caption": "of this content"},
        {"image": "2.jpg", "caption": "of this name"},
        {"image": "3.jpg", "error": "damaged"},
    ]
    file = captions(tmp_path, "\n".join(map(json.dumps, lines)))
    assert file.find(["renamed.jpg"], "a" * 64) == "of this content"
    assert file.find(["1.jpg"], "b" * 64) is None  # another picture by now
    assert file.find(["2.jpg"], "c" * 64) == "of this name"
    assert file.find(["3.jpg"], "d" * 64) is None
    assert (file.errors, file.unused) == (1, 0)


def test_a_caption_comes_before_an_error(tmp_path: Path) -> None:
    lines = [{"image": "1.jpg", "error": "x"}, {"image": "1.jpg", "caption": "y"}]
    for some in (lines, lines[::-1]):
        assert captions(tmp_path, "\n".join(map(json.dumps, some))).find(["1.jpg"], "") == "y"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds none"),
        ("a.jpg a cat", "line 1: no tab"),
        ("a.jpg\tx\nb.jpg", "line 2: no tab"),
        ('{"image": "a", "caption": "x"}\n{"image": "b"}', "line 2: no picture with a caption"),
        ('{"image": "a", "caption": "x"}\n{"image": 5, "caption": "x"}', "line 2: no picture"),
        ('{"image": "a", "caption": "x"}\n{"image": "a", "capt', "line 2: no picture"),
        ('{"image": "a", "caption": "x"}\n{"image": "a", "caption": "y"}', "a second caption of a"),
        ('{"a": "x", "a": "y"}', "a picture twice"),
        ('{"a": 1}', "another shape"),
        ("[" * 200, "nested"),
        (b"a\tb\n\xff\xfe\xfa\tc", "line 2: not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_captions(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)) as e:
        captions(tmp_path, text)
    assert "A.captions" in str(e.value) and "expected captions" in str(e.value)


def test_no_file_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "/dev/zero"):
        with pytest.raises(OptionError, match="cannot be read"):
            CaptionFile("A", path)


def test_a_bare_name_for_two_pictures(tmp_path: Path) -> None:
    file = captions(tmp_path, "1.jpg\tx\n")
    assert file.find(names_of("a/1.jpg"), "a" * 64) == "x"
    assert file.find(names_of("c/1.jpg"), "a" * 64) == "x"  # the same picture again
    with pytest.raises(OptionError, match="stands for two pictures"):
        file.find(names_of("b/1.jpg"), "b" * 64)


def test_what_a_picture_may_be_called(tmp_path: Path) -> None:
    found = names_of(str(tmp_path / "a/b.c.jpg"))
    # as captions were written in this folder, in one above and in one below
    assert {f"{tmp_path.name}/a/b.c.jpg", "a/b.c.jpg", "b.c.jpg", "b.c"} <= set(found)
    assert found.index("a/b.c.jpg") < found.index("b.c.jpg") < found.index("b.c")
    assert len(names_of("x/" * 5000 + "y.jpg")) < 50
    assert found[0] == (tmp_path / "a/b.c.jpg").as_posix()
    assert "x/y.jpg" in names_of("./x//y.jpg")


@settings(max_examples=100)
@given(text=st.text(max_size=200) | st.binary(max_size=200))
def test_any_bytes(text: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """They are captions or an error of ours."""
    given = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    try:
        captions(tmp_path_factory.getbasetemp(), given)
    except OptionError as e:
        assert "\n" not in str(e)


# --- a comparison


class Judge:
    """Knows what each picture and text is worth: the text says it."""

    def picture(self, source: ImageSource) -> np.ndarray:
        return np.ones((3, 2, 2), np.float32)

    def images(self, pictures: np.ndarray) -> np.ndarray:
        assert 1 <= len(pictures) <= 2
        return np.tile(np.array([1, 0], np.float32), (len(pictures), 1))

    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, list[bool]]:
        cosines = np.array([float(text.split()[0]) if text.strip() else 0.0 for text in texts])
        features = np.stack([cosines, np.sqrt(1 - cosines**2)], 1).astype(np.float32)
        return features, [len(text) > 20 for text in texts]


NAMES = ["01_rgb.png", "03_gray_L.png", "08_1x37.png", "13_LA.png", "15_bmp.bmp"]


def compared(tmp_path: Path, texts: dict[str, list[str | None]], **options: Any) -> Comparison:
    """Pictures of tests/data, with captions by each method."""
    files = []
    for method, said in texts.items():
        lines = [f"{n}\t{t}" for n, t in zip(NAMES, said, strict=False) if t is not None]
        files.append(captions(tmp_path, "\n".join(lines), method))
    places = [data("images") / name for name in NAMES]
    return compare(Judge(), candidates(places), files, batch=2, **options)


def by_hand() -> dict[str, list[str | None]]:
    rows = HAND.T.tolist()
    return {name: [str(c) for c in row] for name, row in zip("ABC", rows, strict=True)}


def test_a_comparison(tmp_path: Path) -> None:
    told: list[Scored] = []
    result = compared(tmp_path, by_hand(), tell=told.append, shown=2)
    assert result.table is not None
    np.testing.assert_allclose(result.table.wins, win_table(HAND).wins, atol=1e-6)
    np.testing.assert_allclose([s.scores for s in told], HAND, atol=1e-6)
    assert result.pictures == 5 and not result.incomplete and not result.unreadable
    # the greatest differences: picture 2 with 0.4, picture 5 with 0.35
    assert [Path(e.name).name for e in result.examples] == [NAMES[1], NAMES[4]]
    assert all(e.thumbnail.startswith(b"\xff\xd8") for e in result.examples)


def test_what_does_not_count(tmp_path: Path) -> None:
    texts = by_hand()
    texts["B"][1] = None
    texts["C"][0] = "  "
    texts["C"][3] = "0.2 and much more than is read"
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((data("images") / NAMES[0]).read_bytes()[:50])
    files = []
    for method, said in texts.items():
        lines = [f"{n}\t{t}" for n, t in zip(NAMES, said, strict=True) if t is not None]
        lines += ["damaged.png\t0.1", f"other{method}.png\t0.1"]
        files.append(captions(tmp_path, "\n".join(lines), method))
    places = [*(data("images") / name for name in NAMES), damaged, tmp_path / "none.png"]

    class Strict(Judge):
        def picture(self, source: ImageSource) -> np.ndarray:
            from seechat_lite.images import load_image, pixels
            from seechat_weights.config import PixelSpec

            return pixels(load_image(source).image, PixelSpec(image_size=2))

    pictures = [
        Candidate(str(place), names_of(str(place)), lambda place=place: str(place))
        for place in places
    ]
    result = compare(Strict(), pictures, files, batch=2)
    assert (result.pictures, result.incomplete, result.unreadable) == (7, 1, 2)
    assert result.table is not None and result.table.pictures == 4
    assert [m.missing for m in result.methods] == [0, 1, 0]
    assert [m.empty for m in result.methods] == [0, 0, 1]
    assert [m.cut for m in result.methods] == [0, 0, 1]
    assert [m.unused for m in result.methods] == [1, 1, 1]
    assert len(result.reasons) == 2 and "none.png" in result.reasons[1]


def test_nothing_in_common(tmp_path: Path) -> None:
    result = compared(tmp_path, {"A": ["0.1", None], "B": [None, "0.2"]})
    assert result.table is None and result.incomplete == 5


def test_a_method_twice(tmp_path: Path) -> None:
    file = captions(tmp_path, "a\tb")
    with pytest.raises(OptionError, match="each once"):
        compare(Judge(), [], [file, file])


# --- pictures


def test_places_of_pictures(tmp_path: Path) -> None:
    picture = (data("images") / NAMES[0]).read_bytes()
    for name in ("b/2.PNG", "b/.hidden.png", "a/1.png", "a/notes.md", ".cache/3.png", "4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    listed = tmp_path / "list"
    listed.write_text('a/1.png\n\n{"image": "b/2.PNG", "caption": "x"}\nnone.png\n', "utf-8")

    def found(*places: Path) -> list[str]:
        return [Path(c.name).relative_to(tmp_path).as_posix() if Path(c.name).is_absolute()
                else c.name for c in candidates(places)]  # fmt: skip

    assert found(tmp_path) == ["a/1.png", "b/2.PNG"]
    assert found(tmp_path / "4") == ["4"]
    assert found(listed) == ["a/1.png", "b/2.PNG", "none.png"]
    with pytest.raises(OptionError, match="cannot be read"):
        found(tmp_path / "nowhere")


# --- what is shown

EVIL = "<script>alert('x')</script>&\"\x1b[2J\u202e]]>"


class Tags(HTMLParser):
    """All tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_only_text(tmp_path: Path) -> None:
    """Nothing that somebody wrote becomes markup, and nothing is loaded or run."""
    texts: dict[str, list[str | None]] = {"A": [f"0.5 {EVIL}"] * 5, "B": ["0.2"] * 5}
    result = compared(tmp_path, texts, shown=3)
    result.methods[0].name = EVIL
    html = page(result, scorer=EVIL)
    tags = Tags()
    tags.feed(html)
    names = [tag for tag, _ in tags.tags]
    assert "script" not in names and names.count("img") == 3
    for _, attributes in tags.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        source = attributes.get("src") or "data:"
        assert source.startswith("data:")
        if source != "data:":
            assert base64.b64decode(source.partition(",")[2])[:2] == b"\xff\xd8"
    assert "<script>alert('x')</script>" in tags.text
    assert "\x1b" not in html and "\u202e" not in html
    assert "default-src 'none'" in html
    assert "class=won" in html


def test_the_chart_is_svg() -> None:
    shares = {EVIL + "\ufffe\ud800": 0.5, "一只猫": 0.3, "B": 0.2, "none": 0.0}
    drawn = ET.fromstring(chart(shares, 1000))
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    text = "\n".join(drawn.itertext())
    assert "50.0 %" in text and "30.0 % 一只猫" in text
    assert all(f"{share:.1f} % {name}" in text for name, share in SHARES.items())
    assert not [e for e in drawn.iter() if e.tag.endswith("script")]
    whole = ET.fromstring(chart({"A": 1.0}, 1))
    assert [e for e in whole.iter() if e.tag.endswith("circle")]
    assert sum(SHARES.values()) == 100


def test_every_slice_has_a_colour_of_its_own() -> None:
    methods = {str(i): 1 / 32 for i in range(32)}
    ours, _ = charts(methods, 1000)
    colours = re.findall(r'<path [^>]* fill="([^"]+)"', ours.body)
    assert len(colours) == 32 and len(set(colours)) == 32


def test_the_page_says_what_is_chinese(tmp_path: Path) -> None:
    """The page is English; Chinese captions are drawn, and read out, as Chinese."""
    texts: dict[str, list[str | None]] = {"A": ["0.5 一只猫"] * 5, "B": ["0.1 a cat"] * 5}
    html = page(compared(tmp_path, texts, shown=1), scorer="x")
    assert '<html lang="en">' in html
    assert '<td class="text" lang="zh">0.5 一只猫' in html and '<td class="text">0.1 a cat' in html


def test_a_page_is_bounded(tmp_path: Path) -> None:
    texts: dict[str, list[str | None]] = {"A": ["0.5 " + "长" * 19_000] * 5, "B": ["0.1"] * 5}
    html = page(compared(tmp_path, texts, shown=5), scorer="x")
    assert len(html) < 200_000 and "…" in html
