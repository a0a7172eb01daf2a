"""The page: one HTML file without scripts that loads nothing, for light and dark screens."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metadist import __version__
from metadist.run.text import printable

STYLE = """
:root{--bg:#fff;--fg:#1c1e21;--soft:#5a6068;--line:#d9dce1;--card:#f6f7f9;--link:#005a9c;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#aa4499;--c4:#b8860b;--c5:#4a9bd4;--c6:#555b63;
--ok:#00704f;--bad:#b3400f}
@media(prefers-color-scheme:dark){:root{--bg:#16181b;--fg:#e8eaed;--soft:#a4abb3;--line:#3a3f46;
--card:#1f2226;--link:#7cc0f5;--c0:#56b4e9;--c1:#f0874a;--c2:#2dc89a;--c3:#e39bd0;--c4:#f0c24b;
--c5:#a5d8f7;--c6:#b9bfc6;--ok:#4fd1a5;--bad:#ff9a66}img{background:#fff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.5rem;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
h3{font-size:1rem;margin:1rem 0 .3rem}
a{color:var(--link)}nav{margin:.8rem 0}nav a{margin-right:1rem;white-space:nowrap}
p{margin:.4rem 0;max-width:60rem}.soft{color:var(--soft)}
.badge{display:inline-block;padding:.1rem .6rem;border:1.5px solid;border-radius:1rem;
font-size:.85rem;vertical-align:middle;margin-left:.6rem}.ok{color:var(--ok)}.bad{color:var(--bad)}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem 1rem}
.tile b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;display:block;overflow-x:auto;max-width:100%;font-size:.93rem}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
td.num,th.num{text-align:right;padding-left:.8rem;font-variant-numeric:tabular-nums;white-space:nowrap}
td.key{color:var(--soft);white-space:nowrap}
pre{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem;
overflow:auto;max-height:30rem;font-size:.85rem}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--link)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1rem}
figure{margin:0;min-width:0}figure>svg{width:100%;height:auto;max-width:46rem}
figcaption{font-size:.85rem;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding-left:1rem}
figcaption svg{width:24px;height:8px;margin-right:.35rem}
.pictures{display:flex;flex-wrap:wrap;gap:1.5rem}
.pictures img{max-width:100%;min-width:12rem;image-rendering:pixelated;border:1px solid var(--line)}
svg text{fill:var(--fg);font:12px system-ui,sans-serif}svg .mid{text-anchor:middle}
svg .end{text-anchor:end}svg .label{fill:var(--soft);font-size:13px}
svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--soft);fill:none}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}svg .band{opacity:.18}
svg .area{opacity:.25}svg .dashed{stroke-dasharray:6 4}
"""
STYLE += "".join(
    f"svg .line.c{n}{{stroke:var(--c{n})}}"
    f"svg .dot.c{n},svg .band.c{n},svg .area.c{n}{{fill:var(--c{n})}}"
    for n in range(7)
)
STYLE += "@media print{body{max-width:none}nav{display:none}details{break-inside:avoid}}"


class HTML(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: Any) -> str:
    """A value as text of HTML, also within quotes; control characters are spelled out."""
    return html.escape(printable(value), quote=True)


def cell(value: Any) -> str:
    """The HTML of a value: escaped, unless it is HTML."""
    return str(value) if isinstance(value, HTML) else escaped(value)


def text(value: str) -> HTML:
    """A paragraph."""
    return HTML(f"<p>{cell(value)}</p>")


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers_from: int = 1) -> HTML:
    """A table whose columns from `numbers_from` on hold numbers."""

    def line(tag: str, values: Sequence[Any]) -> str:
        cells = [
            f"<{tag}{' class=num' if number >= numbers_from else ''}>{cell(value)}</{tag}>"
            for number, value in enumerate(values)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return HTML(f"<table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table>")


def pairs(rows: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> HTML:
    """A table of names and values."""
    items = rows.items() if isinstance(rows, Mapping) else rows
    body = "".join(f"<tr><td class=key>{cell(k)}</td><td>{cell(v)}</td></tr>" for k, v in items)
    return HTML(f"<table><tbody>{body}</tbody></table>")


def items(values: Iterable[Any]) -> HTML:
    """A list."""
    return HTML(f"<ul>{''.join(f'<li>{cell(value)}</li>' for value in values)}</ul>")


def code(value: str, at_most: int = 100_000) -> HTML:
    """Preformatted text, of which the beginning is shown."""
    lines = "\n".join(escaped(line) for line in value[:at_most].splitlines())
    return HTML(f"<pre>{lines}</pre>")


def details(title: str, content: str) -> HTML:
    """What a reader opens."""
    return HTML(f"<details><summary>{escaped(title)}</summary>{content}</details>")


def picture(title: str, png: bytes) -> HTML:
    """A PNG within the page."""
    data = base64.b64encode(png).decode()
    return HTML(
        f'<div><h3>{escaped(title)}</h3><img alt="{escaped(title)}" '
        f'src="data:image/png;base64,{data}"></div>'
    )


def tile(label: str, value: str) -> HTML:
    """A number that is seen first."""
    return HTML(f"<div class=tile><b>{cell(value)}</b>{cell(label)}</div>")


def page(
    title: str, badge: tuple[str, bool], intro: str, sections: Sequence[tuple[str, str]]
) -> str:
    """The whole page.

    Args:
        title: What it is about.
        badge: A word for how it stands, and whether that is well.
        intro: HTML below the title.
        sections: (heading, HTML) of each; those without HTML are left out.
    """
    shown = [(heading, content) for heading, content in sections if content]
    links = [f'<a href="#s{n}">{escaped(heading)}</a>' for n, (heading, _) in enumerate(shown)]
    body = [
        f'<section id="s{n}"><h2>{escaped(heading)}</h2>{content}</section>'
        for n, (heading, content) in enumerate(shown)
    ]
    word, is_well = badge
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escaped(title)}<span class="badge {"ok" if is_well else "bad"}">'
        f"{escaped(word)}</span></h1>{intro}<nav>{' '.join(links)}</nav></header>"
        f"<main>{''.join(body)}</main>"
        f"<footer><p class=soft>Written by metadist {escaped(__version__)}.</p></footer>"
        "</body></html>\n"
    )
