"""Writes a page of pictures with their captions side by side; it loads and runs nothing."""

import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape

from seechat_lite.scoring.chart import charts, shown_name
from seechat_lite.scoring.comparison import Comparison, Example
from seechat_lite.scoring.win_table import TIE
from seechat_weights.plain_text import one_line

MAX_SHOWN = 1000  # characters of a caption
_HAN = re.compile("[\u3400-\u9fff]")

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1300px; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: left;
  vertical-align: top } .n { text-align: right } td.n { white-space: nowrap }
section { display: flex; gap: 1.2em; border-top: 1px solid #ddd; padding: 1.2em 0 }
section > div { flex: 1; min-width: 0 }
section table { margin: 0; width: 100%; table-layout: fixed } section th { width: 7em }
section td.n { width: 4em }
figure { margin: 0; width: 320px; flex: none }
figure img { max-width: 100% } figcaption { color: #666; font-size: 13px; overflow-wrap: anywhere }
th { overflow-wrap: anywhere; min-width: 4em } td.text { overflow-wrap: anywhere }
tr.won { background: #e8f3e4 }
.pies { display: flex; flex-wrap: wrap; gap: 0 3em; align-items: flex-start }
.pies svg { max-width: 100%; height: auto }
@media (max-width: 700px) { section { display: block } figure { width: auto }
  th, td { padding: .3em .5em } }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #e6e6e6 }
  tr.won { background: #24402a } section { border-color: #444 } figcaption { color: #aaa } }
"""


def page(result: Comparison, *, scorer: str) -> str:
    """The page, as HTML.

    result: a comparison with a table.
    scorer: the judge's name.
    """
    table = result.table
    assert table is not None
    names = [method.name for method in result.methods]
    shares = dict(zip(names, table.wins.tolist(), strict=True))
    pies = "".join(pie.svg() for pie in charts(shares, table.pictures))
    rows = "".join(
        f"<tr><th>{shown_name(name)}</th>"
        f'<td class="n">{100 * table.wins[i]:.1f} %</td>'
        f'<td class="n">{100 * table.wins_between[0, i]:.1f} to '
        f"{100 * table.wins_between[1, i]:.1f}</td>"
        f'<td class="n">{100 * table.means[i]:.2f}</td></tr>'
        for i, name in enumerate(names)
    )
    sections = "\n".join(_section(example, names) for example in result.examples)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Captions side by side</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Captions side by side</h1>
<p>{table.pictures} pictures, judged by {shown_name(scorer)}.
Below are {len(result.examples)} of them, those first whose captions are furthest apart.</p>
<div class="pies">{pies}</div>
<table>
<tr><th>method</th><th class="n">wins</th><th class="n">95 %</th>
<th class="n">mean 100 · cosine</th></tr>
{rows}
</table>
{sections}
</body>
</html>
"""


def _section(example: Example, names: Sequence[str]) -> str:
    best = max(example.scores) - TIE
    order = sorted(range(len(names)), key=lambda i: -example.scores[i])
    rows = "".join(
        f"<tr{' class=won' if example.scores[i] >= best else ''}>"
        f'<th>{shown_name(names[i])}</th><td class="n">{100 * example.scores[i]:.2f}</td>'
        f'<td class="text"{_language(example.captions[i])}>{_text(example.captions[i])}</td></tr>'
        for i in order
    )
    image = ""
    if example.thumbnail:
        data = b64encode(example.thumbnail).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    return (
        f"<section><figure>{image}<figcaption>{_text(example.name)}</figcaption></figure>"
        f"<div><table>{rows}</table></div></section>"
    )


def _language(text: str) -> str:
    """The attribute that has Chinese read and drawn as Chinese."""
    return ' lang="zh"' if _HAN.search(text) else ""


def _text(text: str) -> str:
    """A text as a page may show it: short, in one line, and only text."""
    text = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
    return escape(one_line(text.encode("utf-8", "replace").decode()))
