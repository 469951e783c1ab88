"""Base64 and data: URLs, as programs write them."""

import base64
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seechat_lite.pictures.written import from_base64, from_data_url, looks_like_base64
from seechat_weights.errors import ImageError

LIMIT = 10_000
WAYS = {
    "standard": lambda t: t,
    "url-safe": lambda t: t.replace("+", "-").replace("/", "_"),
    "unpadded": lambda t: t.rstrip("="),
    "one padding too many": lambda t: t + "=" if t.endswith("=") else t,
    "in lines": lambda t: "\r\n".join(t[i : i + 76] for i in range(0, len(t), 76)) + "\n",
    "percent-encoded": lambda t: quote(t, safe=""),
    "percent-encoded, small letters": lambda t: quote(t, safe="").replace("%2B", "%2b"),
    "lines, percent-encoded": lambda t: quote(t[:7] + "\r\n" + t[7:], safe=""),
}
HEADS = (
    "data:image/png;base64,",
    "DATA:IMAGE/PNG;BASE64,",
    "data:;base64,",
    "data:application/octet-stream;base64,",
    "data:image/png;charset=utf-8;base64,",
    "data:image/png; base64,",
)


@given(data=st.binary(max_size=300), way=st.sampled_from(sorted(WAYS)))
def test_every_way_to_write_it(data: bytes, way: str) -> None:
    text = WAYS[way](base64.b64encode(data).decode())
    assert from_base64(text, limit=LIMIT) == data
    for head in HEADS:
        assert from_data_url(head + text, limit=LIMIT) == data


@given(text=st.text(max_size=80))
def test_anything_else_is_an_error(text: str) -> None:
    for read in (from_base64, from_data_url):
        try:
            assert isinstance(read(text, limit=LIMIT), bytes)
        except ImageError as e:
            assert "expected" in str(e)


@pytest.mark.parametrize("text", ["A", "AAAAA", "AA=A", "AA==AA==", "####", "AAA%41", "é" * 4])
def test_damaged(text: str) -> None:
    with pytest.raises(ImageError, match="base64 is damaged"):
        from_base64(text, limit=LIMIT)


def test_limits() -> None:
    text = base64.b64encode(bytes(LIMIT + 1)).decode()
    for read in (from_base64, lambda t, limit: from_data_url("data:;base64," + t, limit=limit)):
        with pytest.raises(ImageError, match="larger than 10000 bytes"):
            read(text, limit=LIMIT)
    with pytest.raises(ImageError, match="not base64"):
        from_data_url("data:image/png," + "%41" * (2 << 20), limit=LIMIT)


@pytest.mark.parametrize("path", ["photos/cat", "a" * 63, "/tmp/" + "a" * 90 + ".png", "https://x"])
def test_paths_are_no_base64(path: str) -> None:
    assert not looks_like_base64(path)
