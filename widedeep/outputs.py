"""The files of a results directory beside the log: what was asked, what the data is, what came out."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from widedeep import atomic
from widedeep.feature_spec import FeatureSpec
from widedeep.shard_manifest import name_of
from widedeep.shards import ShardSet

UNDEFINED = (
    "-: undefined; AUC and normalized entropy need rows of both labels, MAP groups with a click,"
    " group AUC groups of both labels"
)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8; bytes of a file's name that are no text become escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, making its directory.

    Raises:
        RunError: the disk is full.   InputError: the place cannot be written.
    """
    with atomic.write_errors(path), atomic.file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; numbers that JSON lacks (NaN, infinities) become null."""
    write_text(path, json.dumps(plain(value), indent=4) + "\n")


def plain(value: Any) -> Any:
    """`value` with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metric_text(value: float | int | None, form: str) -> str:
    """A metric for people, in a format such as `.9g`; `-` where it is undefined (None or NaN)."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def metrics_note(values: Iterable[float | int | None]) -> list[str]:
    """What is to be said below a list of metrics: why some are undefined, if any is."""
    return [UNDEFINED] if any(metric_text(value, "") == "-" for value in values) else []


def data_summary(spec: FeatureSpec, hidden: Sequence[int], splits: dict[str, ShardSet]) -> dict[str, Any]:
    """Rows, clicks and groups of each split; features with their tables; sizes of the model."""
    return {
        "splits": {name: _split(shards, spec) for name, shards in splits.items()},
        "categorical": [
            {"name": f.name, "cardinality": f.cardinality, "dim": f.dim, "hotness": f.hotness} for f in spec.categorical
        ],
        "numeric": list(spec.numeric_names),
        "label": spec.label,
        "group": spec.group,
        "deep_width": spec.deep_width,
        "parameters": spec.parameter_count(hidden),
    }


def _split(shards: ShardSet, spec: FeatureSpec) -> dict[str, Any]:
    clicks = sum(int(part.sum(dtype=np.int64)) for part in shards.column(spec.label))
    summary = {"rows": shards.rows, "clicks": clicks, "click_rate": clicks / shards.rows if shards.rows else None}
    if group := name_of("group", shards.columns):
        values = np.concatenate([np.empty(0, np.int64), *shards.column(group)])  # a split without rows has no part
        is_sorted = bool((values[1:] >= values[:-1]).all())
        starts = min(1, len(values)) + int((values[1:] != values[:-1]).sum())
        summary["groups"] = starts if is_sorted else len(np.unique(values))
    return summary
