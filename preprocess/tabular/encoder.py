"""Raw rows in memory as the inputs of a model, for programs that serve it."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

from preprocess.config import NUMERIC_TYPES
from preprocess.provenance import statistics_digest
from preprocess.tabular import source, statistics
from preprocess.tabular.encode import Encoded, encode_all
from preprocess.tabular.spec import TabularSpec
from preprocess.tabular.transforms import Vocabulary
from widedeep.errors import InputError
from widedeep.feature_spec import STATISTICS

_REFUSED = (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError)


class Encoder:
    """Rows of a table as the model takes them: what `preprocess tabular --stats` makes of the same rows in a file of
    Parquet. Loads no torch; threads may share one.

    Args:
        data: a data set of `preprocess tabular`, or an export that holds its statistics (`widedeep export --stats`).
        numeric: what numbers are rounded to, "float32" or "float16"; None: what the data set's are stored as.
    Attributes:
        spec: the features, in the order of the columns that come out.
        columns: the source columns that they are made of.
        csv_of: the format of a CSV file, by its path (see `TabularSpec.csv_of`).
        vocabularies: the names of the features with a vocabulary.
    Raises:
        InputError: the feature spec or the statistics are missing, damaged, or do not belong together; `numeric` is
            another type.
    """

    def __init__(self, data: str | Path, numeric: str | None = None):
        if numeric is not None and numeric not in NUMERIC_TYPES:
            raise InputError(f"numeric is {numeric!r}, expected one of {', '.join(NUMERIC_TYPES)}")
        spec = TabularSpec.load(Path(data))
        statistics.load(spec, Path(data) / STATISTICS)
        self.spec = spec.completed()
        self.csv_of = spec.csv_of
        self.columns = spec.columns(("label", "group"))
        self.vocabularies = [f.name for f in spec.features if isinstance(f.encoder, Vocabulary)]
        stored = self.spec.metadata.get("numeric", "float32")
        if stored not in NUMERIC_TYPES:
            told = f"expected one of {', '.join(NUMERIC_TYPES)}, got {stored!r}"
            raise InputError(f"{spec.path}: metadata.numeric: {told}")
        self._numeric = numeric or stored
        self._categorical = [f for f in spec.features if f.kind in ("categorical", "multi-hot")]
        self._numbers = [f for f in spec.features if f.kind == "numeric"]
        named = self.spec.metadata.get("statistics")
        if named is not None and named != statistics_digest(Path(data) / STATISTICS):
            raise InputError(f"{data}/{STATISTICS}: expected the statistics that {spec.path} was made with")

    def __call__(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Encodes B rows.

        Args:
            rows: a mapping of columns, a list of mappings, a pandas or polars DataFrame, or a pyarrow Table or
                RecordBatch. None, NaN and null are missing values. Columns that no feature is made of are passed over.
        Returns:
            ids [B, K] int32, -1 for padding, and numeric [B, N] float32, in the order of the model's inputs.
        Raises:
            InputError: a column is missing, or a value does not fit; names row and column.
        """
        chunk = source.in_memory(_table(rows, self.columns), self.columns)
        return self.join(self.encode(chunk), len(chunk.rows))

    def encode(self, chunk: source.Chunk) -> dict[str, Encoded]:
        """The features of a chunk, which has the columns `columns`, by their names."""
        return encode_all([*self._categorical, *self._numbers], chunk, self._numeric)

    def join(self, encoded: Mapping[str, Encoded], B: int) -> tuple[np.ndarray, np.ndarray]:
        """What a call returns, of B rows that `encode` has made."""
        ids = [encoded[f.name].rows.reshape(B, f.hotness or 1) for f in self._categorical]
        numbers = [encoded[f.name].rows.reshape(B, 1) for f in self._numbers]
        return (
            np.concatenate([np.empty((B, 0), np.int32), *ids], axis=1, dtype=np.int32, casting="same_kind"),
            np.concatenate([np.empty((B, 0), np.float32), *numbers], axis=1, dtype=np.float32),
        )


def _table(rows: Any, columns: Sequence[str]) -> pa.Table:
    """Of others' columns those alone that are wanted: what else they hold may be nothing for a table."""
    if isinstance(rows, list):
        rows = {name: [_value(row, i, name) for i, row in enumerate(rows)] for name in columns}
    if isinstance(rows, Mapping):
        rows = {name: _array(name, rows[name]) for name in columns if name in rows} or rows
    try:
        if hasattr(rows, "columns") and not isinstance(rows, pa.Table | pa.RecordBatch):  # a DataFrame
            rows = rows[[name for name in columns if name in rows.columns]]
        return rows if isinstance(rows, pa.Table) else pa.table(rows)
    except _REFUSED as error:
        if hasattr(rows, "columns"):
            with contextlib.suppress(*_REFUSED):  # column by column, of which some may hold UUIDs
                return pa.table({name: _array(name, rows[name]) for name in rows.columns})
        if isinstance(rows, Mapping) or hasattr(rows, "columns"):
            raise InputError(f"rows: expected a table: {_told(error)}") from error
        told = f"a DataFrame or a pyarrow Table, got {type(rows).__name__}; a single row is a list of one mapping"
        raise InputError(f"rows: expected a mapping of columns, a list of mappings, {told}") from error


def _value(row: Any, i: int, name: str) -> Any:
    if not isinstance(row, Mapping):
        raise InputError(f"row {i + 1}: expected a mapping of columns, got {type(row).__name__}")
    if name not in row:
        raise InputError(f"row {i + 1}: column {name} is missing; without a value it is None")
    return row[name]


def _array(name: str, values: Any) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        told = f"got {type(values).__name__}; a single row is a list of one mapping"
        raise InputError(f"column {name}: expected the values of all rows, {told}")
    try:
        # from_pandas: NaN among texts is a missing value too, as pandas has it.
        return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, from_pandas=True)
    except _REFUSED as error:
        if any(map(_holds_uuid, values)):  # in lists or among texts, or pyarrow is older and knows none
            return _array(name, [_without_uuids(value) for value in values])
        raise InputError(f"column {name}: expected values of one type: {_told(error)}") from error


def _holds_uuid(value: Any) -> bool:
    return isinstance(value, UUID) or (isinstance(value, list | tuple) and any(map(_holds_uuid, value)))


def _without_uuids(value: Any) -> Any:
    """The same with the texts that a file's UUIDs have."""
    if isinstance(value, list | tuple):
        return [_without_uuids(element) for element in value]
    return str(value) if isinstance(value, UUID) else value


def _told(error: Exception) -> str:
    return " ".join(str(error).split())
