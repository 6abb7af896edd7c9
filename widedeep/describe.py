"""What is in the shards: rows and clicks, how much of each table is used, how the head of each feature clicks, numbers.

One column at a time, in pieces of `ROWS` rows: memory is a piece and the counts of one feature.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from widedeep.errors import InputError
from widedeep.feature_spec import STATISTICS, FeatureSpec
from widedeep.shard_manifest import is_labelled, label_of
from widedeep.shards import MANIFEST, ShardSet, decode_ids

ROWS = 1 << 20
SAMPLE_ROWS = 1 << 18
DENSE = 1 << 22  # cardinalities up to here are counted in an array, larger ones in sorted runs
HEADS = (1, 10, 100)
TOP = 10
LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def describe(path: str | Path) -> dict[str, Any]:
    """The data report of a shard set, or of a data set (a directory with `feature_spec.yaml`).

    Shares of a categorical feature are of its ids, padding apart; those of a one-hot feature are shares of rows.
    "unknown", of features with a vocabulary or buckets, is the share of the id of missing, rare and unseen values;
    "unseen" the share of ids that no train row has.
    Quantiles are of all rows up to 262,144, else of a fixed random sample of that many.

    Returns:
        {"path", "splits": {split: rows, clicks, click_rate}, "categorical": {feature: {"nulls", "cardinality",
        "hotness", split: {...}}}, "numeric": {feature: {"nulls", split: {...}}}}. "nulls" counts the source's rows of
        all splits without a value, if preprocessing reported them. What a split cannot have is None: without rows all
        shares, without labels clicks and click rates.
    Raises:
        InputError: `path` is neither, or a shard set there is damaged.
    """
    path = Path(path)
    splits, names, edges = _open(path)
    first = next(iter(splits.values()))
    known, nulls = edges | _learned(path), _nulls(path)
    words = _words(known)
    zero = {name for name, f in known.items() if "values" in f or "edges" in f}  # their id 0 stands for no one value
    report: dict[str, Any] = {"path": str(path), "splits": {n: _rows(s) for n, s in splits.items()}}
    report |= {"categorical": {}, "numeric": {}}
    for column in (first.columns[name] for name in names):
        feature: dict[str, Any] = {"nulls": nulls.get(column.name)}
        if column.kind == "categorical":
            feature |= {"cardinality": column.cardinality, "hotness": column.hotness}
            seen = None
            for name, shards in splits.items():
                word, spare = words.get(column.name), column.name in zero
                feature[name], ids = _categorical(shards, column.name, word, spare, seen)
                if seen is None:
                    seen = ids
                elif not first.rows:
                    feature[name]["unseen"] = None
            report["categorical"][column.name] = feature
        elif column.kind == "numeric":
            report["numeric"][column.name] = feature | {name: _numeric(s, column.name) for name, s in splits.items()}
    return report


def _open(path: Path) -> tuple[dict[str, ShardSet], list[str], dict[str, dict[str, Any]]]:
    """The shard sets by split, the names of their features, and the edges of buckets that the spec gives."""
    if (path / MANIFEST).is_file():
        shards = ShardSet.open(path, verify=True)
        return {path.resolve().name: shards}, list(shards.columns), {}
    if not (path / "feature_spec.yaml").is_file():
        raise InputError(f"{path}: expected a data set (with feature_spec.yaml) or a shard set (with {MANIFEST})")
    spec = FeatureSpec.load(path)
    splits = {}
    for mapping, chunks in spec.sources.items():
        if any(chunk.type != "shards" for chunk in chunks):
            raise InputError(
                f"{path}: source_spec.{mapping}: expected shards; `widedeep preprocess tabular` makes them"
            )
        splits[mapping] = ShardSet.open(spec.source_files(mapping)[0], verify=True)
        splits[mapping].check(spec)
    if not splits:
        raise InputError(f"{path}: source_spec: expected train and test, got none")
    transforms = {f.name: f.transform for f in spec.categorical if isinstance(f.transform, dict)}
    buckets = {name: transform.get("bucketise") for name, transform in transforms.items()}
    edges = {name: settings for name, settings in buckets.items() if isinstance(settings, dict) and "edges" in settings}
    return splits, [*spec.names, *spec.numeric_names], edges


def _learned(path: Path) -> dict[str, dict[str, Any]]:
    """{feature: what was learned of it}, as far as there are such statistics."""
    features = _read(path / STATISTICS / "statistics.json").get("features")
    features = features if isinstance(features, dict) else {}
    return {name: f for name, f in features.items() if isinstance(f, dict)}


def _words(known: dict[str, dict[str, Any]]) -> dict[str, Callable[[int], str]]:
    """{feature: what an id stands for}, of features with a vocabulary or buckets, and of exact crosses."""
    values = {name: f["values"] for name, f in known.items() if isinstance(f.get("values"), list)}
    words: dict[str, Callable[[int], str]] = {name: partial(_word, texts) for name, texts in values.items()}
    edges = {name: f["edges"] for name, f in known.items() if isinstance(f.get("edges"), list)}
    for name, numbers in edges.items():
        if all(isinstance(number, int | float) for number in numbers):
            words[name] = partial(_bucket, [-np.inf, *numbers, np.inf])
    sizes = {name: f["sizes"] for name, f in known.items() if isinstance(f.get("sizes"), dict)}
    for name, crossed in sizes.items():
        if all(isinstance(size, int) and size > 0 for size in crossed.values()):
            parts = [words.get(part, str) for part in crossed]
            words[name] = partial(_combination, parts, list(crossed.values()))
    return words


def _word(values: Sequence[Any], value: int) -> str:
    """What an id of a vocabulary stands for."""
    return str(values[value - 1]) if 0 < value <= len(values) else "(missing, rare or unseen)"


def _bucket(edges: Sequence[float], value: int) -> str:
    """What an id of a bucketised feature stands for; the outer edges are infinite."""
    return f"[{edges[value - 1]:.9g}, {edges[value]:.9g})" if 0 < value < len(edges) else "(missing)"


def _combination(words: Sequence[Callable[[int], str]], sizes: Sequence[int], value: int) -> str:
    """What an id of an exact cross stands for (preprocess/tabular/cross.py); a feature without words shows its id."""
    parts = []
    for word, size in zip(reversed(words), reversed(sizes)):
        value, part = divmod(value, size)
        parts.append(word(part))
    return " x ".join(reversed(parts))


def _nulls(path: Path) -> dict[str, int]:
    """{feature: rows without a value}; one preprocessing counts them over all rows, another by split."""
    report = _read(path / "report.json")
    counts: Counter[str] = Counter()
    for part in (report, *report.values()):
        if isinstance(part, dict) and isinstance(part.get("nulls"), dict):
            counts.update({name: n for name, n in part["nulls"].items() if isinstance(n, int)})
    return dict(counts)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, got {str(value)[:60]!r}")
    return value


def _label(shards: ShardSet) -> str:
    return label_of(shards.directory, shards.columns)


def _rows(shards: ShardSet) -> dict[str, Any]:
    if not is_labelled(shards.manifest):  # the column's zeros say nothing
        return {"rows": shards.rows, "clicks": None, "click_rate": None}
    clicks = sum(int(part.sum(dtype=np.int64)) for part in shards.column(_label(shards)))
    return {"rows": shards.rows, "clicks": clicks, "click_rate": _share(clicks, shards.rows)}


def _pieces(shards: ShardSet, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The column as stored, and the label, of up to ROWS rows at a time."""
    for values, labels in zip(shards.column(name), shards.column(_label(shards))):
        for start in range(0, len(values), ROWS):
            yield values[start : start + ROWS], labels[start : start + ROWS]


class _Counts:
    """Rows and clicks of each id, added up piece by piece."""

    def __init__(self, cardinality: int):
        self._dense = np.zeros(2 * cardinality, np.int64) if cardinality <= DENSE else None
        self._keys, self._sums = np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, ids: np.ndarray, clicks: np.ndarray) -> None:
        keys = 2 * ids.astype(np.int64) + clicks
        if self._dense is not None:
            self._dense += np.bincount(keys, minlength=len(self._dense))
            return
        keys, sums = np.unique(keys, return_counts=True)
        keys, sums = np.concatenate([self._keys, keys]), np.concatenate([self._sums, sums])
        order = np.argsort(keys, kind="stable")
        self._keys, starts = np.unique(keys[order], return_index=True)
        self._sums = np.add.reduceat(sums[order], starts) if len(starts) else sums

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids that occur, in rising order, their rows, and their clicks."""
        if self._dense is not None:
            table = self._dense.reshape(-1, 2)
            ids = np.flatnonzero(table.any(axis=1))
            return ids, table[ids].sum(axis=1), table[ids, 1]
        ids, place = np.unique(self._keys // 2, return_inverse=True)
        table = np.zeros((len(ids), 2), np.int64)
        table[place, self._keys % 2] = self._sums
        return ids, table.sum(axis=1), table[:, 1]


def _categorical(
    shards: ShardSet, name: str, words: Callable[[int], str] | None, spare: bool, seen: np.ndarray | None
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of a split, and the ids that occur.

    spare: whether id 0 stands for all values that have none of their own.
    seen: the ids of the train rows, if this is another split.
    """
    column = shards.columns[name]
    counts, empty = _Counts(column.cardinality), 0
    for stored, labels in _pieces(shards, name):
        ids = decode_ids(stored).reshape(len(stored), column.hotness)
        if ids.size and ids.max() >= column.cardinality:
            raise InputError(
                f"{shards.directory}: column {name!r}: expected ids below {column.cardinality}, found more"
            )
        valid = ids >= 0
        empty += int((~valid.any(axis=1)).sum())
        counts.add(ids[valid], np.repeat(labels, valid.sum(axis=1)))
    ids, rows, clicks = counts.result()
    total, labelled = int(rows.sum()), is_labelled(shards.manifest)
    order = np.argsort(-rows, kind="stable")
    result = {
        "used": len(ids),
        "used_share": _share(len(ids), column.cardinality),
        "padding": _share(shards.rows * column.hotness - total, shards.rows * column.hotness),
        "empty_rows": empty,
        "mean_length": _share(total, shards.rows),
        "head": {str(n): _share(int(rows[order[:n]].sum()), total) for n in HEADS},
        "top": [_value(ids[i], rows[i], clicks[i] if labelled else None, total, words) for i in order[:TOP]],
    }
    if spare:
        result["unknown"] = _share(int(rows[ids == 0].sum()), total)
    if seen is not None:
        result["unseen"] = _share(int(rows[~np.isin(ids, seen)].sum()), total)
    return result, ids


def _value(value: int, rows: int, clicks: int | None, total: int, words: Callable[[int], str] | None) -> dict[str, Any]:
    rate = None if clicks is None else clicks / rows
    entry: dict[str, Any] = {"id": int(value), "rows": int(rows), "share": rows / total, "click_rate": rate}
    if words is not None:
        entry["value"] = words(int(value))
    return entry


def _numeric(shards: ShardSet, name: str) -> dict[str, Any] | None:
    if not shards.rows:
        return None
    count, mean, squares, low, high, zeros = 0, 0.0, 0.0, np.inf, -np.inf, 0
    for stored, _ in _pieces(shards, name):
        values = stored.astype(np.float64)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        zeros += int((values == 0).sum())
        # Chan, Golub and LeVeque: means and squared deviations of two parts merge exactly.
        delta, total = float(values.mean()) - mean, count + len(values)
        squares += float(np.square(values - values.mean()).sum()) + delta * delta * count * len(values) / total
        mean, count = mean + delta * len(values) / total, total
    if shards.rows > SAMPLE_ROWS:
        sample = np.sort(np.random.default_rng(0).integers(0, shards.rows, SAMPLE_ROWS))
    else:
        sample = np.arange(shards.rows)
    quantiles = np.quantile(shards.gather(sample, [name])[name].astype(np.float64), LEVELS)
    return {
        "min": low,
        "mean": mean,
        "std": (squares / count) ** 0.5,
        "max": high,
        "zeros": zeros / count,
        "quantiles": {str(level): float(q) for level, q in zip(LEVELS, quantiles)},
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
