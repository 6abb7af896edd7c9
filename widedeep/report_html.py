"""The page of a report: plain HTML with its style and plots inside, so that one file is all there is to send."""

import base64
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from widedeep import __version__
from widedeep.html_page import document, number, percent, section, table
from widedeep.report_files import RunFiles

METRICS = {
    "map": ("MAP@12", "mean of 1 / rank of the clicked ad inside its display; of several, the first in the file"),
    "map_all": ("MAP@12, all clicks", "the same where a display has one click"),
    "auc": ("AUC", "exact, ties counted half"),
    "gauc": ("group AUC", "inside displays, weighted by rows"),
    "loss": ("log loss", "nats, lower is better"),
    "normalized_entropy": ("normalized entropy", "log loss, with that of the click rate alone as 1"),
    "click_rate": ("click rate", "of the rows"),
    "mean_probability": ("mean probability", "as predicted; the click rate if calibrated"),
    "binary_accuracy": ("accuracy", "at a probability of 0.5"),
}
COUNTS = {"rows": ("rows", ""), "groups": ("displays", ""), "multi_click_groups": ("displays of several clicks", "")}
TILES = ("map", "auc", "loss", "binary_accuracy")
CAPTIONS = {
    "loss": "Training batches, one in --log_every, before their update; evaluations of the whole set.",
    "ranking": "The best value is written at its point.",
    "calibration": "Where points lie on the diagonal, predicted click rates can be read as frequencies.",
    "learning_rate": "As it was at each logged step.",
}


def page(files: RunFiles, plots: dict[str, bytes]) -> str:
    """The whole page. plots: PNG bytes by the names of `report_plots.draw`."""
    parts = [_header(files), _tiles(files.evaluation), _notice(files.missing)]
    if plots:
        figures = "".join(_figure(name, png) for name, png in plots.items())
        parts.append(f'<h2>Learning and calibration</h2><div class="plots">{figures}</div>')
    parts += [_metrics(files), _epochs(files.validation), _data(files.data), _arguments(files.arguments)]
    return document(f"{files.name} - Wide & Deep run", parts)


def _header(files: RunFiles) -> str:
    epochs = [record for record in files.validation if "epoch" in record]
    facts = [f"evaluation at step {record['step']:,}" for record in files.validation if "epoch" not in record]
    if epochs:
        facts.append(_counted(epochs[-1]["epoch"] or len(epochs), "epoch"))
    if records := files.training + epochs:
        facts.append(_counted(max(record["step"] for record in records), "step"))
    if size := files.arguments.get("global_batch_size"):
        facts.append(f"batch {size:,}")
    if parameters := files.data.get("parameters"):
        facts.append(f"{parameters:,} parameters")
    facts.append(f"widedeep {__version__}")
    facts.append(f"written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    return f'<h1>{escape(files.name)}</h1>\n<p class="soft">Wide &amp; Deep run &middot; {" &middot; ".join(facts)}</p>'


def _tiles(evaluation: dict[str, Any]) -> str:
    shown = [name for name in TILES if evaluation.get(name) is not None]
    tiles = (
        f'<div class="tile"><span class="soft">{METRICS[name][0]}</span><b>{number(evaluation[name])}</b></div>'
        for name in shown
    )
    return f'<div class="tiles">{"".join(tiles)}</div>' if shown else ""


def _notice(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return f'<p class="notice">Not in the run\'s directory, so not shown here: {escape(", ".join(missing))}.</p>'


def _figure(name: str, png: bytes) -> str:
    source = base64.b64encode(png).decode()
    return (
        f'<figure class="card"><img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{source}">'
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
    )


def _metrics(files: RunFiles) -> str:
    """The model's final metrics beside those of the baselines."""
    columns = {"model": files.evaluation} | files.baselines
    columns = {name: values for name, values in columns.items() if isinstance(values, dict) and values}
    counts = {int(key[4:]) for values in columns.values() for key in values if re.fullmatch(r"auc_\d+", key)}
    by_thresholds = {f"auc_{n}": (f"AUC, {n} thresholds", "by the rule of Keras") for n in sorted(counts)}
    rows = []
    for key, (label, note) in (METRICS | by_thresholds | COUNTS).items():
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append([label, *values, note])
    return section("Metrics of the evaluation set", ["", *columns, ""], rows) if rows else ""


def _epochs(validation: Sequence[dict[str, Any]]) -> str:
    names = {
        "epoch": "epoch",
        "step": "steps",
        "loss_val": "log loss",
        "auc_val": "AUC, thresholds",
        "streaming_map_val": "MAP@12",
        "map_all_val": "MAP@12, all clicks",
        "binary_accuracy_val": "accuracy",
    }
    names = {key: label for key, label in names.items() if any(record.get(key) is not None for record in validation)}
    rows = [[*(record.get(key) for key in names), _duration(record.get("seconds"))] for record in validation]
    title = "Epochs" if any("epoch" in record for record in validation) else "Evaluations"
    return section(title, [*names.values(), "time of the run"], rows) if rows else ""


def _data(data: dict[str, Any]) -> str:
    splits = data.get("splits") or {}
    parts = []
    if splits:
        rows = [
            [name, split.get("rows"), split.get("clicks"), percent(split.get("click_rate")), split.get("groups")]
            for name, split in splits.items()
        ]
        parts.append(section("Data", ["split", "rows", "clicks", "click rate", "displays"], rows))
    if features := data.get("categorical"):
        rows = [[f["name"], f["cardinality"], f["dim"], f["hotness"]] for f in features]
        tables = table(["categorical feature", "rows of its table", "dim", "hotness"], rows)
        numeric = data.get("numeric") or []
        parts.append(
            f'<details class="card"><summary>{len(features)} categorical and {len(numeric)} numeric '
            f'features</summary>{tables}<p class="soft">Numeric: {escape(", ".join(numeric))}</p></details>'
        )
    return "\n".join(parts)


def _arguments(arguments: dict[str, Any]) -> str:
    if not arguments:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(str(name))}</code></td><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in arguments.items()
    )
    summary = f"<summary>{len(arguments)} arguments</summary>"
    return f'<h2>Arguments</h2><details class="card">{summary}<table>{rows}</table></details>'


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
