"""The data report as one HTML page and as tables on the terminal."""

import os
from html import escape
from pathlib import Path
from typing import Any

from widedeep import __version__
from widedeep.html_page import document, percent, section, table

FEATURE_HEAD = (
    "feature",
    "table rows",
    "used",
    "hotness",
    "nulls, all splits",
    "padding",
    "top 1",
    "top 10",
    "top 100",
    "unknown",
    "id not in train",
)
NUMERIC_HEAD = ("feature", "min", "5 %", "median", "95 %", "max", "mean", "deviation", "zeros")
FILE_WIDTH = 160  # columns of tables that go to a file or a pipe
NAME_WIDTH = 20  # columns that a long name may take on any terminal
GAP = 3  # columns of a terminal between two of a table
TOP_HEAD = ("value", "rows", "share", "click rate", "against all rows")


def page(report: dict[str, Any]) -> str:
    """The whole page of a report of `describe.describe`."""
    name = Path(report["path"]).resolve().name
    parts = [
        f'<h1>{escape(name)}</h1>\n<p class="soft">Data report &middot; {len(report["categorical"])} categorical and '
        f"{len(report['numeric'])} numeric features &middot; widedeep {__version__}</p>",
        section("Splits", ["split", "rows", "clicks", "click rate"], _split_rows(report)),
    ]
    for split in report["splits"]:
        if report["categorical"]:
            parts.append(section(f"Categorical features: {split}", FEATURE_HEAD, _feature_rows(report, split)))
        if rows := _numeric_rows(report, split):
            parts.append(section(f"Numeric features: {split}", NUMERIC_HEAD, rows))
    parts.append(_heads(report))
    return document(f"{name} - data report", parts)


def show(report: dict[str, Any]) -> None:
    """The same on the terminal, with the three commonest values of each feature."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH

    def put(title: str, head: tuple[str, ...] | list[str], rows: list[list[Any]]) -> None:
        texts = [[_text(value) for value in row] for row in rows]
        widths = [max(map(len, column)) + GAP for column in zip(head, *texts, strict=True)]
        widths[0] = min(widths[0], max(console.width // 2, NAME_WIDTH))
        for part in _side_by_side(widths, console.width):
            grid = Table(title=plain(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            grid.add_column(head[0], overflow="fold")
            for index in part:
                grid.add_column(head[index], justify="right", no_wrap=True)
            for row in texts:
                grid.add_row(plain(row[0]), *(plain(row[index]) for index in part))
            console.print(grid)

    put(report["path"], ["split", "rows", "clicks", "click rate"], _split_rows(report))
    for split in report["splits"]:
        if report["categorical"]:
            put(f"{split}: categorical", FEATURE_HEAD, _feature_rows(report, split))
        if rows := _numeric_rows(report, split):
            put(f"{split}: numeric", NUMERIC_HEAD, rows)
    split, whole = next(iter(report["splits"].items()))
    heads = [
        [name, *row[:4]]
        for name, feature in report["categorical"].items()
        for row in _top_rows(feature[split]["top"][:3], whole["click_rate"])
    ]
    if heads:
        put(f"{split}: commonest values", ["feature", *TOP_HEAD[:4]], heads)


def _side_by_side(widths: list[int], room: int) -> list[list[int]]:
    """The columns after the first, in as many tables as a terminal of `room` columns needs."""
    parts: list[list[int]] = []
    for index in range(1, len(widths)):
        if not parts or widths[0] + sum(widths[i] for i in parts[-1]) + widths[index] > room:
            parts.append([])
        parts[-1].append(index)
    return parts


def _split_rows(report: dict[str, Any]) -> list[list[Any]]:
    return [[name, s["rows"], s["clicks"], percent(s["click_rate"])] for name, s in report["splits"].items()]


def _feature_rows(report: dict[str, Any], split: str) -> list[list[Any]]:
    rows = []
    for name, feature in report["categorical"].items():
        part = feature[split]
        head = [percent(share) for share in part["head"].values()]
        used = f"{part['used']:,} ({percent(part['used_share'])})"
        row = [name, feature["cardinality"], used, feature["hotness"], feature["nulls"]]
        rows.append([*row, percent(part["padding"]), *head, percent(part.get("unknown")), percent(part.get("unseen"))])
    return rows


def _numeric_rows(report: dict[str, Any], split: str) -> list[list[Any]]:
    rows = []
    for name, feature in report["numeric"].items():
        if part := feature[split]:
            low, middle, high = (part["quantiles"][level] for level in ("0.05", "0.5", "0.95"))
            spread = [part["min"], low, middle, high, part["max"], part["mean"], part["std"]]
            rows.append([name, *(f"{value:.4g}" for value in spread), percent(part["zeros"])])
    return rows


def _top_rows(top: list[dict[str, Any]], rate: float | None) -> list[list[Any]]:
    return [
        [
            str(entry.get("value", entry["id"])),
            entry["rows"],
            percent(entry["share"]),
            percent(entry["click_rate"]),
            f"{entry['click_rate'] / rate:.2f} x" if rate else None,
        ]
        for entry in top
    ]


def _heads(report: dict[str, Any]) -> str:
    """The commonest values of each feature in the first split."""
    split, whole = next(iter(report["splits"].items()))
    parts = []
    for name, feature in report["categorical"].items():
        if rows := _top_rows(feature[split]["top"], whole["click_rate"]):
            grid = table(TOP_HEAD, rows)
            parts.append(f'<details class="card"><summary>{escape(name)}</summary>{grid}</details>')
    return f"<h2>Commonest values: {escape(split)}</h2>\n" + "\n".join(parts) if parts else ""


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
