"""One self-contained HTML page: text, tables and inline pictures; nothing is fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

_CSS = """
:root { --ink: #1f2328; --soft: #5a6068; --line: #dfe2e6; --band: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 32px 64px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 40px 0 8px; padding-top: 14px; border-top: 1px solid var(--line); }
p { max-width: 78ch; margin: 6px 0 12px; overflow-wrap: anywhere; } .soft { color: var(--soft); font-size: 13px; }
nav { margin: 14px 0 0; font-size: 13px; } nav a { margin-right: 16px; color: var(--accent); text-decoration: none; }
.scroll { overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 2px 14px; }
.grid figure { margin: 4px 0; } .grid img { width: 100%; }
.legend { font-size: 13px; margin: 4px 0; max-width: none; }
.legend span.name { margin-right: 14px; white-space: nowrap; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 4px 16px; font-size: 13.5px; }
dt { font-weight: 600; } dd { margin: 0; } th[title] { text-decoration: underline dotted; cursor: help; }
table { border-collapse: collapse; margin: 10px 0 4px; font-size: 13.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 6px 0; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
table:not(.text) td { white-space: nowrap; }
table.text th, table.text td { text-align: left; }
table.text td { overflow-wrap: break-word; } table.samples td { overflow-wrap: anywhere; }
td.key { white-space: nowrap; }
tbody tr { background: #fff; } tbody tr:nth-child(even) { background: var(--band); }
td.best { font-weight: 700; }
table.samples { table-layout: fixed; width: 100%; }
table.samples td { white-space: pre-line; }
.badge { display: inline-block; margin: 3px 6px 0 0; padding: 0 6px; border-radius: 9px; font-size: 11.5px;
  color: var(--soft); background: #eceef1; }
figure { margin: 10px 0 18px; } figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; max-width: 90ch; margin-top: 4px; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 640px) { body { padding: 16px 14px 40px; } h1 { font-size: 21px; } h2 { font-size: 17px; }
  nav a { display: inline-block; margin: 3px 14px 3px 0; } th, td { padding: 4px 8px; }
  th:first-child, td:first-child { position: sticky; left: 0; background: inherit; } thead tr { background: #fff; }
  table.text { min-width: 600px; } table.samples { min-width: 720px; }
  table.samples td:first-child { position: static; }
  figure.wide { overflow-x: auto; } figure.wide img { max-width: none; width: 640px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  figure, tr, table:not(.samples) { break-inside: avoid; } h2 { break-after: avoid; } .scroll { overflow: visible; }
  table { font-size: 8.5pt; } th, td { padding: 3px 6px; } @page { margin: 14mm; size: A4 landscape; } }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: Sequence[tuple[int, int]] = ()
    """(row, column) of cells in bold."""
    note: str = ""
    is_text: bool = False
    """The columns are words, aligned to the left, not numbers."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Header -> what it means, shown where the pointer rests."""
    swatch: Mapping[str, str] = field(default_factory=dict)
    """First cell -> the colour that stands before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    svg: str
    caption: str
    is_panel: bool = False
    """One of many in a grid: as wide as its column, and without a caption of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSection:
    title: str
    body: Sequence[str]
    """HTML, from the functions below."""


def page(title: str, introduction: str, sections: Sequence[PageSection]) -> str:
    """A whole document. `title` and `introduction` are plain text."""
    numbered = [(f"part-{number}", section) for number, section in enumerate(sections, start=1) if section.body]
    links = "".join(f'<a href="#{anchor}">{escape(section.title)}</a>' for anchor, section in numbered)
    body = "\n".join(
        f'<h2 id="{anchor}">{escape(section.title)}</h2>\n' + "\n".join(section.body) for anchor, section in numbered
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{paragraph(introduction)}\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str, *, soft: bool = False) -> str:
    return f"<p{' class=soft' * soft}>{escape(text)}</p>" if text else ""


def table(content: Table) -> str:
    head = "".join(f"<th{_hint(content.hints.get(cell))}>{escape(cell)}</th>" for cell in content.header)
    best = set(content.best)
    rows = "".join(
        "<tr>" + "".join(_cell(content, cell, j == 0, (i, j) in best) for j, cell in enumerate(row)) + "</tr>\n"
        for i, row in enumerate(content.rows)
    )
    if not content.rows:
        return paragraph(content.caption)
    return (
        f"<div class=scroll><table{' class=text' * content.is_text}><caption>{escape(content.caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>{paragraph(content.note, soft=True)}"
    )


def picture(content: Picture) -> str:
    """The picture as a data: URL. Inline SVGs would share one set of ids, and two of them may use the same id."""
    data = base64.b64encode(content.svg.encode()).decode()
    image = f'<img alt="{escape(content.caption)}" src="data:image/svg+xml;base64,{data}">'
    if content.is_panel:
        return f"<figure>{image}</figure>"
    return f"<figure class=wide>{image}<figcaption>{escape(content.caption)}</figcaption></figure>"


def grid(pictures: Sequence[Picture], color: Mapping[str, str], note: str = "") -> list[str]:
    """Small pictures beside one another, as many as the page is wide, under one legend of their colours."""
    names = "".join(f"<span class=name>{_dot(value)}{escape(name)}</span>" for name, value in color.items())
    panels = "\n".join(map(picture, pictures))
    return [f"<p class=legend>{names}</p>\n<div class=grid>{panels}</div>", paragraph(note, soft=True)]


def definitions(terms: Mapping[str, str]) -> str:
    rows = "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<dl>{rows}</dl>"


def _cell(content: Table, text: str, is_first: bool, is_best: bool) -> str:
    dot = _dot(content.swatch.get(text)) if is_first else ""
    kind = " class=key" if dot else " class=best" * is_best
    return f"<td{kind}>{dot}{escape(text)}</td>"


def _hint(text: str | None) -> str:
    return f' title="{escape(text)}"' if text else ""


def _dot(color: str | None) -> str:
    return f'<span class=dot style="background: {color}"></span>' if color else ""


def samples_table(
    names: Sequence[str], rows: Sequence[tuple[str, Sequence[Sequence[tuple[str, Sequence[str]]]]]]
) -> str:
    """Responses side by side: a row per prompt, a column per run, in it (response, badges) pairs."""
    head = "<th>prompt</th>" + "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{escape(_close_up(prompt))}</td>"
        + "".join(f"<td>{'<br>'.join(_response(text, badges) for text, badges in cell)}</td>" for cell in cells)
        + "</tr>\n"
        for prompt, cells in rows
    )
    return (
        f'<div class=scroll><table class="text samples"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )


def _response(text: str, badges: Sequence[str]) -> str:
    marks = "".join(f"<span class=badge>{escape(badge)}</span>" for badge in badges)
    return f"{escape(_close_up(text)) or '<i>(empty)</i>'}<br>{marks}"


def _close_up(text: str) -> str:
    """The text without empty lines."""
    return "\n".join(line for line in text.strip().splitlines() if line.strip())
