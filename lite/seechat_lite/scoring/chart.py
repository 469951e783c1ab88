"""Draws shares as pies, in SVG: one's own, and the published ones beside it."""

import math
from collections.abc import Mapping
from html import escape

from seechat_lite.scoring.published import PICTURES, SHARES
from seechat_weights.plain_text import one_line

_DARK, _LIGHT = "#222", "#fff"
# of slices, and of what is written on them
_COLOURS = (
    ("#4e79a7", _LIGHT), ("#f28e2b", _DARK), ("#59a14f", _DARK), ("#e15759", _DARK),
    ("#76b7b2", _DARK), ("#b07aa1", _DARK), ("#9c755f", _LIGHT), ("#edc948", _DARK),
)  # fmt: skip
_RADIUS, _WIDTH, _TOP, _LINE = 130, 420, 60, 24  # pixels
_LABELLED = 0.05  # the smallest share that has room for a label
MAX_NAME = 60  # characters of a method's name


def shown_name(name: str) -> str:
    """A method's name, escaped for markup.

    name: the name.
    """
    text = one_line(name.encode("utf-8", "replace").decode())
    # two characters that no XML may have
    return escape(text[:MAX_NAME].replace("\ufffe", "").replace("\uffff", ""))


def chart(shares: Mapping[str, float], pictures: int) -> str:
    """An SVG picture of the shares and of the published ones, on white.

    shares: of each method, of 1.
    pictures: how many were counted.
    """
    both = charts(shares, pictures)
    height = max(chart.height for chart in both)
    parts = [
        _opening(2 * _WIDTH, height, _DARK),
        "<title>Image Caption Win Ratio</title>",
        f'<rect width="100%" height="100%" fill="{_LIGHT}"/>',
        both[0].body,
        f'<g transform="translate({_WIDTH})">',
        both[1].body,
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"


def charts(shares: Mapping[str, float], pictures: int) -> tuple["Pie", "Pie"]:
    """The shares, and the published ones.

    shares, pictures: as for chart().
    """
    return (
        Pie({name: 100 * share for name, share in shares.items()}, "these captions", pictures),
        Pie(SHARES, "as SEEChat published", PICTURES),
    )


class Pie:
    """A pie of shares with its legend.

    height: in pixels.
    body: SVG without the element <svg> around it; texts have the colour of what is around.
    """

    def __init__(self, percent: Mapping[str, float], title: str, pictures: int) -> None:
        """Draw it.

        percent: the shares.
        title: what they are.
        pictures: how many were counted.
        """
        self.height = _TOP + 2 * _RADIUS + 30 + len(percent) * _LINE + 10
        self.body = _pie(percent, f"{title}, {pictures:,} pictures")

    def svg(self) -> str:
        """The pie for a page, which chooses its colour of texts."""
        return f"{_opening(_WIDTH, self.height, 'currentColor')}\n{self.body}\n</svg>"


def _opening(width: int, height: int, colour: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="sans-serif" font-size="15" fill="{colour}">'
    )


def _pie(percent: Mapping[str, float], title: str) -> str:
    x, y = _WIDTH // 2, _TOP + _RADIUS
    parts = [f'<text x="{x}" y="32" text-anchor="middle" font-size="19">{escape(title)}</text>']
    whole, start = sum(percent.values()) or 1, 0.0
    for i, (name, value) in enumerate(sorted(percent.items(), key=lambda item: -item[1])):
        share, (colour, label) = value / whole, _colours(i)
        parts.append(_slice(x, y, start, share, colour))
        middle = 2 * math.pi * (start + share / 2)
        if share >= _LABELLED:
            at = (x + 0.72 * _RADIUS * math.sin(middle), y - 0.72 * _RADIUS * math.cos(middle) + 5)
            parts.append(
                f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="middle" fill="{label}" '
                f'font-weight="bold">{value:.0f}%</text>'
            )
        row = _TOP + 2 * _RADIUS + 30 + i * _LINE
        parts.append(
            f'<rect x="{x - 150}" y="{row}" width="14" height="14" fill="{colour}"/>'
            f'<text x="{x - 128}" y="{row + 13}">{value:.1f} % {shown_name(name)}</text>'
        )
        start += share
    return "\n".join(parts)


def _colours(i: int) -> tuple[str, str]:
    """The colours of a slice and of its label; no two slices have the same."""
    if i < len(_COLOURS):
        return _COLOURS[i]
    return f"hsl({i * 137 % 360}, 45%, 70%)", _DARK  # 137 degrees: far from those before


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
