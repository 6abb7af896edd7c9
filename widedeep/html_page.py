"""What every page we write is made of: the style, the document around the parts, tables and numbers."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --blue: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 40px 0 12px; }
p { margin: 4px 0; }
.soft, figcaption, td.note { color: var(--soft); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.tile, .card { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card { padding: 6px 16px; overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 14px 10px; }
figure img { width: 100%; display: block; }
figcaption { padding: 4px 6px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 7px 12px 7px 0; text-align: left; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { font-size: 13px; font-weight: 600; color: var(--soft); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.note { padding-left: 12px; }
.notice { margin: 20px 0 0; padding: 10px 16px; background: #fffbeb; border: 1px solid #fde68a; border-radius: 10px; }
details summary { cursor: pointer; padding: 6px 0; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page. title: plain text; parts: HTML, empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in parts if part)}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A heading and a `table`. title: plain text."""
    return f'<h2>{escape(title)}</h2><div class="card">{table(head, rows)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers to the right; the last column of words is a note."""
    last = len(head) - 1
    cells = "".join(f"<th{_number_class(i > 0 and bool(name))}>{escape(str(name))}</th>" for i, name in enumerate(head))
    body = []
    for row in rows:
        line = []
        for i, value in enumerate(row):
            is_note = isinstance(value, str) and i == last and not head[i]
            css = ' class="note"' if is_note else _number_class(i > 0)
            line.append(f"<td{css}>{escape(value) if isinstance(value, str) else number(value)}</td>")
        body.append(f"<tr>{''.join(line)}</tr>")
    return f"<table><tr>{cells}</tr>{''.join(body)}</table>"


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def number(value: Any) -> str:
    """A cell: floats with five decimals, a dash for None and NaN, anything else as escaped text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "&ndash;"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
    return escape(str(value))


def percent(value: float | None) -> str | None:
    """A share as text, with two decimals, or below 1 % with three digits: clicks may be rare."""
    return None if value is None else f"{100 * value:{'.3g' if 0 < 100 * value < 1 else '.2f'}} %"
