"""What a shard set's manifest says: the columns, and where each part keeps them. Sealed with its own checksum."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from widedeep.errors import InputError
from widedeep.features import MAX_CARDINALITY

MANIFEST = "manifest.json"
FORMAT = "widedeep-shards"
VERSION = 1
UNLABELLED = {"labelled": False}  # the `statistics` of rows without labels, whose label column is of zeros
ALIGNMENT = 64  # bytes: a cache line, and what aligned vector loads and direct I/O of a block want
_TYPES = {
    "categorical": ("uint8", "uint16", "uint32"),
    "numeric": ("float16", "float32"),
    "label": ("uint8",),
    "group": ("int64",),
}


@dataclass(frozen=True)
class Column:
    """One column; `kind` is categorical, numeric, label or group, and `hotness` 1 means shape [rows], not [rows, 1]."""

    name: str
    kind: str
    dtype: str
    hotness: int = 1
    cardinality: int = 0

    @property
    def stored(self) -> np.dtype:
        """The type on disk: little-endian, whatever the host."""
        return np.dtype(self.dtype).newbyteorder("<")

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.hotness == 1 else (rows, self.hotness)

    def nbytes(self, rows: int) -> int:
        return rows * self.hotness * self.stored.itemsize


def columns_of(spec: Any, numeric: str = "float32", group: bool = False) -> list[Column]:
    """The columns of a feature spec, in file order: categoricals, numerics, label, and the group when asked for.

    Raises:
        InputError: no type holds a cardinality, `numeric` is not float16 or float32, or the spec has no `map` feature.
    """
    if numeric not in ("float16", "float32"):
        raise InputError(f"numeric columns are stored as float16 or float32, not {numeric}")
    if group and spec.group is None:
        raise InputError("a group column was asked for, but the feature spec has no feature in the channel 'map'")
    columns = [Column(f.name, "categorical", _id_type(f), f.hotness, f.cardinality) for f in spec.categorical]
    columns += [Column(f.name, "numeric", numeric) for f in spec.numeric]
    columns += [Column(spec.label, "label", "uint8")]
    columns += [Column(spec.group, "group", "int64")] if group else []
    return columns


def _id_type(feature: Any) -> str:
    if not 1 <= feature.cardinality <= MAX_CARDINALITY:
        raise InputError(f"feature {feature.name!r}: cardinality {feature.cardinality} is not in 1..{MAX_CARDINALITY}")
    return next(t for t in ("uint8", "uint16", "uint32") if feature.cardinality <= np.iinfo(t).max)


def name_of(kind: str, columns: Mapping[str, Column]) -> str | None:
    """Name of the column of a kind of which there is one at most, label or group; None if there is none."""
    return next((column.name for column in columns.values() if column.kind == kind), None)


def label_of(directory: Path, columns: Mapping[str, Column]) -> str:
    """Name of the label column of the shard set at `directory`. Raises InputError where there is none."""
    if (name := name_of("label", columns)) is None:
        raise InputError(f"{directory}: expected a label column, found {', '.join(columns)}")
    return name


def is_labelled(manifest: Mapping) -> bool:
    """Whether the label column says anything."""
    statistics = manifest.get("statistics")
    return not isinstance(statistics, Mapping) or statistics.get("labelled") is not False


def padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _digest(manifest: Mapping) -> str:
    plain = {key: value for key, value in manifest.items() if key != "xxh3_64"}
    return xxhash.xxh3_64_hexdigest(
        json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    )


def seal(manifest: dict) -> str:
    # Through JSON once, so that the digest is of what a reader will parse (tuples become lists, keys strings).
    plain = json.loads(json.dumps(manifest))
    return json.dumps({**plain, "xxh3_64": _digest(plain)}, indent=1) + "\n"


def read(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; expected a directory written by `widedeep preprocess`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not a shard manifest (its 'format' is not {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path}: version {manifest.get('version')!r} of the shard format, this program reads {VERSION}"
        )
    if manifest.get("xxh3_64") != (found := _digest(manifest)):
        raise InputError(f"{path}: damaged or edited: its xxh3-64 is {found}, it says {manifest.get('xxh3_64')}")
    _check_layout(path, manifest)
    return manifest


def _check_layout(path: Path, manifest: dict) -> None:
    """A sealed manifest may still be wrong: every block must lie inside its part and have its column's size."""
    try:
        columns = [Column(**c) for c in manifest["columns"]]
        parts = manifest["parts"]
        sound = all(map(_is_column, columns)) and len({c.name for c in columns}) == len(columns)
        sound &= _is_count(manifest["rows"]) and sum(p["rows"] for p in parts) == manifest["rows"]
        for part in parts:
            blocks = [part["blocks"][c.name] for c in columns]
            sizes = [part["rows"], part["bytes"], *(b[key] for b in blocks for key in ("offset", "bytes"))]
            sound &= all(map(_is_count, sizes)) and len(part["blocks"]) == len(columns)
            sound &= isinstance(part["file"], str) and Path(part["file"]).name == part["file"]
            sound &= all(isinstance(b["xxh3_64"], str) for b in blocks)
            sound &= all(b["bytes"] == c.nbytes(part["rows"]) for b, c in zip(blocks, columns))
            sound &= all(b["offset"] % ALIGNMENT == 0 for b in blocks)
            sound &= all(b["offset"] + padded(b["bytes"]) <= part["bytes"] for b in blocks)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a complete shard manifest: {error}") from error
    if not sound:
        raise InputError(f"{path}: its row counts, blocks and columns do not agree")


def _is_column(column: Column) -> bool:
    is_sized = _is_count(column.hotness) and column.hotness >= 1 and _is_count(column.cardinality)
    is_typed = column.kind in _TYPES and column.dtype in _TYPES[column.kind]
    return isinstance(column.name, str) and is_sized and is_typed and column.cardinality <= MAX_CARDINALITY


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
