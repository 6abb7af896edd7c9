"""Propose a feature spec from the data: types, transforms and embedding dims, for a person to look over."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.engine import ThreadEngine
from preprocess.tabular import source
from preprocess.tabular.columns import BadCell, Column, Lists
from preprocess.tabular.config import TabularConfig
from preprocess.tabular.spec import csv_format
from widedeep.errors import InputError

MAX_ROWS = 1 << 20
FEW_VALUES = 16  # numbers with no more distinct values are taken as categories
MANY_VALUES = 100_000  # more distinct texts than this are hashed, fewer make a vocabulary
LABELS = ("label", "click", "clicked", "is_click", "is_clicked", "target", "y")  # names taken when none is given
POSITIVE_TEXTS = ("1", "true", "yes", "y", "t", "click", "clicked", "positive")
SEPARATORS = "|;"


@dataclass
class _Seen:
    """What the sample held of one column."""

    counts: Counter = field(default_factory=Counter)
    rows: int = 0
    nulls: int = 0
    is_number: bool = True
    low: float = np.inf
    total: float = 0.0
    high: float = -np.inf
    lengths: Counter = field(default_factory=Counter)

    def add(self, values: Column | Lists) -> None:
        self.rows += len(values)
        self.nulls += int((values.codes < 0).sum())
        if isinstance(values, Lists):
            self.lengths.update(values.lengths[values.codes[values.codes >= 0]].tolist())
            values = values.chosen_elements(np.ones(len(values), bool))
        counts = values.counts(np.ones(len(values), bool))
        self.counts.update({values.texts[code]: int(counts[code]) for code in np.flatnonzero(counts)})
        self._measure(values)

    def _measure(self, values: Column) -> None:
        if not self.is_number:
            return
        try:
            numbers = values.numbers()
        except BadCell:
            self.is_number = False
            return
        numbers = numbers[~np.isnan(numbers)]
        if len(numbers):
            self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
            self.total += float(numbers.sum())

    @property
    def numbers_rows(self) -> bool:
        """Whether the values are consecutive integers, each there once."""
        span = self.high - self.low + 1 if self.is_number else 0
        once = len(self.counts) == self.rows == span
        return once and len(self.counts) > FEW_VALUES and all(text.strip("+-").isdigit() for text in self.counts)

    @property
    def separator(self) -> str | None:
        """A character that splits at least three values in ten."""
        for separator in SEPARATORS:
            if sum(separator in text for text in self.counts) > 0.3 * max(1, len(self.counts)):
                return separator
        return None


def infer_spec(
    inputs: list[str],
    label: str | None = None,
    *,
    group: str | None = None,
    max_rows: int = MAX_ROWS,
    delimiter: str = ",",
    columns: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """A proposal from the first `max_rows` rows.

    Numbers of more than 16 distinct values become numeric features (with log where they are far from symmetric) and,
    in buckets, categorical ones. Texts, and other numbers, become categorical: by vocabulary, or hashed when there are
    very many. Lists and texts with `|` or `;` become multi-hot. Columns that hold one value, texts that hardly
    repeat, or the number of the row, are left out. Without a `label` the column is taken whose name is one of `LABELS`.
    delimiter and columns are those of `metadata.csv`, for CSV files with other delimiters or without a header.

    Returns:
        The spec as a dict for YAML, and a sentence about each column that was left out.
    Raises:
        InputError: a file is malformed or empty, or lacks the label or the group.
    """
    if max_rows < 1:
        raise InputError(f"max_rows is {max_rows}, expected at least 1")
    described = {"delimiter": delimiter} if delimiter != "," else {}
    described |= {"columns": list(columns)} if columns else {}
    csv = csv_format(inputs[0], described)
    names = source.column_names(Path(inputs[0]), csv)
    label = label or _guessed_label(inputs[0], names)
    for name in filter(None, (label, group)):
        if name not in names:
            raise InputError(f"{inputs[0]}: column {name} is missing; the file has {', '.join(names)[:200]}")
    seen = {name: _Seen() for name in names}
    with ThreadEngine(1) as engine:
        chunks = source.chunks(inputs, names, engine, TabularConfig.chunk_bytes, csv=csv)
        rows = 0
        for chunk in chunks:
            for name, values in chunk.columns.items():
                seen[name].add(values)
            rows += len(chunk.rows)
            if rows >= max_rows:
                break
    if not rows:
        raise InputError(f"{inputs[0]}: expected rows, found none")
    spec, left_out = _proposal(seen, label, group)
    return spec | ({"metadata": {"csv": described}} if described else {}), left_out


def _guessed_label(path: str, names: list[str]) -> str:
    found = [name for name in names if name.lower() in LABELS]
    if len(found) != 1:
        told = f"found {' and '.join(found)}" if found else f"the file has {', '.join(names)[:200]}"
        raise InputError(f"{path}: expected --label, or one column called {', '.join(LABELS)}; {told}")
    return found[0]


def _proposal(seen: dict[str, _Seen], label: str, group: str | None) -> tuple[dict[str, Any], list[str]]:
    features: dict[str, Any] = {}
    channels: dict[str, list[str]] = {"onehot_categorical": [], "multihot_categorical": [], "numerical": []}
    left_out = []
    for name, column in seen.items():
        if name in (label, group):
            continue
        distinct = len(column.counts)
        if distinct < 2:
            left_out.append(f"{name}: holds {'one value' if distinct else 'no value'}")
        elif column.lengths or (not column.is_number and column.separator):
            features[name] = _multi_hot(column)
            channels["multihot_categorical"].append(name)
        elif column.numbers_rows:
            left_out.append(f"{name}: numbers the rows")
        elif column.is_number and distinct > FEW_VALUES:
            features[name] = {"transform": _number(column)}
            channels["numerical"].append(name)
            bucket = f"{name}_bucket"
            if bucket not in seen:
                features[bucket] = {"embedding_dim": 8, "transform": {"column": name, "bucketise": {"quantiles": 16}}}
                channels["onehot_categorical"].append(bucket)
        elif distinct > 0.9 * (column.rows - column.nulls) and distinct > FEW_VALUES:
            left_out.append(f"{name}: its values hardly repeat ({distinct} in {column.rows} rows)")
        else:
            features[name] = _texts(distinct)
            channels["onehot_categorical"].append(name)
    features[label] = {"transform": {"positive": _positive(seen[label], label)}}
    if group:
        features[group] = {} if seen[group].is_number else {"transform": "hash"}
    channels |= {"label": [label], "map": [group] if group else []}
    return {"feature_spec": features, "channel_spec": channels}, left_out


def _texts(distinct: int) -> dict[str, Any]:
    dim = 8 if distinct < 32 else 16 if distinct < 1000 else 32 if distinct < 50_000 else 64
    if distinct > MANY_VALUES:
        # A power of two of twice the values seen: a third of them then share a row.
        return {"embedding_dim": dim, "cardinality": 1 << (2 * distinct - 1).bit_length(), "transform": "hash"}
    least = 1 if distinct < 32 else 2
    return {"embedding_dim": dim, "transform": {"vocabulary": {"min_count": least}}}


def _multi_hot(column: _Seen) -> dict[str, Any]:
    separator = None if column.lengths else column.separator
    if separator:
        elements: Counter = Counter()
        lengths: Counter = Counter()
        for text, count in column.counts.items():
            pieces = [piece for piece in text.split(separator) if piece.strip()]
            lengths[len(pieces)] += count
            elements.update(pieces)
    else:
        elements, lengths = column.counts, column.lengths
    ordered = sorted(lengths.elements())
    hotness = max(1, ordered[int(0.99 * (len(ordered) - 1))])
    feature = _texts(len(elements)) | {"max_hotness": hotness, "combiner": "mean"}
    if separator:
        transform = feature["transform"]
        feature["transform"] = ({transform: {}} if isinstance(transform, str) else transform) | {"separator": separator}
    return feature


def _number(column: _Seen) -> dict[str, Any]:
    mean = column.total / (column.rows - column.nulls)
    # The mean of a long-tailed column lies near its lower end.
    skewed = mean - column.low < 0.1 * (column.high - column.low)
    fill = {"fill": "median"} if column.nulls else {}
    return fill | ({"log": True} if skewed else {}) | {"standardise": True}


def _positive(column: _Seen, label: str) -> list[str]:
    """The values that mean 1: a usual word for it, else the rarer of two."""
    if usual := [text for text in column.counts if text.lower() in POSITIVE_TEXTS]:
        return sorted(usual)
    if len(column.counts) != 2:
        usual = ", ".join(POSITIVE_TEXTS)
        raise InputError(f"column {label}: expected two values, or {usual}, found {len(column.counts)} values")
    return [min(column.counts, key=column.counts.__getitem__)]
