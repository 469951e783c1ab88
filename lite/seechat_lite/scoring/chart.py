"""Draws shares as pies, in SVG: one's own, and the published ones beside it."""

import math
from collections.abc import Mapping
from html import escape

from seechat_lite.scoring.published import PICTURES, SHARES
from seechat_weights.plain_text import one_line

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#9c755f", "#edc948")
_RADIUS, _WIDTH, _TOP, _LINE = 130, 640, 60, 24  # pixels
MAX_NAME = 60  # characters of a method's name


def shown_name(name: str) -> str:
    """A method's name, escaped for markup.

    name: the name.
    """
    text = one_line(name.encode("utf-8", "replace").decode())
    # two characters that no XML may have
    return escape(text[:MAX_NAME].replace("\ufffe", "").replace("\uffff", ""))


def chart(shares: Mapping[str, float], pictures: int) -> str:
    """An SVG picture of the shares and of the published ones.

    shares: of each method, of 1.
    pictures: how many were counted.
    """
    percent = {name: 100 * share for name, share in shares.items()}
    rows = max(len(percent), len(SHARES))
    height = _TOP + 2 * _RADIUS + 30 + rows * _LINE + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDTH} {height}" '
        f'width="{2 * _WIDTH}" height="{height}" role="img" font-family="sans-serif" '
        'font-size="15">',
        "<title>Image Caption Win Ratio</title>",
        f'<rect width="{2 * _WIDTH}" height="{height}" fill="#fff"/>',
        _pie(percent, f"these captions, {pictures} pictures", 0),
        _pie(SHARES, f"as SEEChat published, {PICTURES} pictures", _WIDTH),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _pie(percent: Mapping[str, float], title: str, left: int) -> str:
    x, y = left + _WIDTH // 2, _TOP + _RADIUS
    parts = [
        f'<text x="{x}" y="32" text-anchor="middle" font-size="19" fill="#222">'
        f"{escape(title)}</text>"
    ]
    whole, start = sum(percent.values()) or 1, 0.0
    for i, (name, value) in enumerate(sorted(percent.items(), key=lambda item: -item[1])):
        colour, share = _COLOURS[i % len(_COLOURS)], value / whole
        parts.append(_slice(x, y, start, share, colour))
        middle = 2 * math.pi * (start + share / 2)
        if share >= 0.03:
            at = (x + 0.68 * _RADIUS * math.sin(middle), y - 0.68 * _RADIUS * math.cos(middle) + 5)
            parts.append(
                f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="middle" fill="#fff" '
                f'font-weight="bold">{value:.0f}%</text>'
            )
        row = _TOP + 2 * _RADIUS + 30 + i * _LINE
        parts.append(
            f'<rect x="{x - 150}" y="{row}" width="14" height="14" fill="{colour}"/>'
            f'<text x="{x - 128}" y="{row + 13}" fill="#222">'
            f"{shown_name(name)}: {value:.1f} %</text>"
        )
        start += share
    return "\n".join(parts)


def _slice(x: int, y: int, start: float, share: float, colour: str) -> str:
    if share >= 0.99999:
        return f'<circle cx="{x}" cy="{y}" r="{_RADIUS}" fill="{colour}"/>'
    ends = []
    for part in (start, start + share):
        angle = 2 * math.pi * part
        ends.append(f"{x + _RADIUS * math.sin(angle):.2f} {y - _RADIUS * math.cos(angle):.2f}")
    large = int(share > 0.5)
    return (
        f'<path d="M{x} {y} L{ends[0]} A{_RADIUS} {_RADIUS} 0 {large} 1 {ends[1]} Z" '
        f'fill="{colour}" stroke="#fff" stroke-width="2"/>'
    )
