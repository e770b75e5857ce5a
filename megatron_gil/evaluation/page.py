"""One self-contained HTML page: text, tables and inline pictures; nothing is fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_CSS = """
:root { --ink: #1f2328; --soft: #5a6068; --line: #dfe2e6; --band: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 32px 64px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 40px 0 8px; padding-top: 14px; border-top: 1px solid var(--line); }
p { max-width: 78ch; margin: 6px 0 12px; } .soft { color: var(--soft); font-size: 13px; }
nav { margin: 14px 0 0; font-size: 13px; } nav a { margin-right: 16px; color: var(--accent); text-decoration: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0 4px; font-size: 13.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 6px 0; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
table:not(.text) td { white-space: nowrap; }
table.text th, table.text td { text-align: left; }
table.text td { overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: var(--band); }
td.best { font-weight: 700; }
table.samples { table-layout: fixed; width: 100%; }
table.samples td { white-space: pre-line; }
.badge { display: inline-block; margin: 3px 6px 0 0; padding: 0 6px; border-radius: 9px; font-size: 11.5px;
  color: var(--soft); background: #eceef1; }
figure { margin: 10px 0 18px; } figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; max-width: 90ch; margin-top: 4px; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
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
    """(row, column) of the cells to set in bold."""
    note: str = ""
    is_text: bool = False
    """Columns of words, set to the left, and not of numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    svg: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    title: str
    body: Sequence[str]
    """HTML, from the functions below."""


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
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
    head = "".join(f"<th>{escape(cell)}</th>" for cell in content.header)
    best = set(content.best)
    rows = "".join(
        "<tr>"
        + "".join(f"<td{' class=best' * ((i, j) in best)}>{escape(cell)}</td>" for j, cell in enumerate(row))
        + "</tr>\n"
        for i, row in enumerate(content.rows)
    )
    return (
        f"<div class=scroll><table{' class=text' * content.is_text}><caption>{escape(content.caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>{paragraph(content.note, soft=True)}"
    )


def picture(content: Picture) -> str:
    """As a data address: ids inside two inline SVGs would clash."""
    data = base64.b64encode(content.svg.encode()).decode()
    return (
        f'<figure><img alt="{escape(content.caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(content.caption)}</figcaption></figure>"
    )


def samples_table(
    names: Sequence[str], rows: Sequence[tuple[str, Sequence[Sequence[tuple[str, Sequence[str]]]]]]
) -> str:
    """Replies side by side: a row per prompt, a column per run, in it (reply, badges) pairs."""
    head = "<th>prompt</th>" + "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{escape(_close_up(prompt))}</td>"
        + "".join(f"<td>{'<br>'.join(_reply(text, badges) for text, badges in cell)}</td>" for cell in cells)
        + "</tr>\n"
        for prompt, cells in rows
    )
    return (
        f'<div class=scroll><table class="text samples"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )


def _reply(text: str, badges: Sequence[str]) -> str:
    marks = "".join(f"<span class=badge>{escape(badge)}</span>" for badge in badges)
    return f"{escape(_close_up(text)) or '<i>(empty)</i>'}<br>{marks}"


def _close_up(text: str) -> str:
    """Without empty lines."""
    return "\n".join(line for line in text.strip().splitlines() if line.strip())
