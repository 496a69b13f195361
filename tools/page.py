"""HTML for reports: one file, nothing loaded from outside, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #667; --line: #8884; --ground: #fff; --panel: #8881; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --soft: #99a3ad; --ground: #14181d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
p.lead { color: var(--soft); margin: 0 0 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .6rem; }
.tile { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.05rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.charts svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.short { white-space: nowrap; }
td.long { min-width: 18rem; overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
.bar { display: flex; height: 1.6rem; border-radius: .3rem; overflow: hidden; margin-bottom: .6rem; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em; }
pre { background: var(--panel); padding: .8rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; color: var(--soft); }
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{"".join(sections)}</body></html>\n'
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def tiles(facts: Mapping[str, str]) -> str:
    """A figure each, with its name."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in facts.items()
    )
    return f'<div class="tiles">{inner}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, colours: Mapping[str, str] | None = None) -> str:
    """A table of texts; a row whose first text is in `colours` gets a dot of that colour, as a legend has."""
    dots = {name: f'<i class="dot" style="background:{colour}"></i>' for name, colour in (colours or {}).items()}
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for first, *rest in rows:
        cells = [_cell(first, dots.get(first, "")), *(_cell(cell) for cell in rest)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(text: str, before: str = "") -> str:
    return f'<td class="{"short" if len(text) <= 24 else "long"}">{before}{escape(text)}</td>'


def bar(shares: Mapping[str, float], colours: Mapping[str, str]) -> str:
    """One bar, divided; shares add up to 1."""
    parts = "".join(
        f'<div style="width:{100 * share:.3f}%;background:{colours[name]}" title="{escape(name)} {100 * share:.1f} %"></div>'
        for name, share in shares.items()
        if share > 0
    )
    return f'<div class="bar">{parts}</div>'


def folded(summary: str, text: str) -> str:
    """Long text that opens on a click."""
    return hidden(summary, f"<pre>{escape(text)}</pre>")


def hidden(summary: str, inner: str) -> str:
    """A part of the page that opens on a click; `inner` is HTML made here."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def note(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def charts(svgs: Iterable[str]) -> str:
    """Diagrams side by side. The SVGs are trusted: `tools.curves` makes them."""
    return f'<div class="charts">{"".join(f"<figure style=margin:0>{svg}</figure>" for svg in svgs)}</div>'
