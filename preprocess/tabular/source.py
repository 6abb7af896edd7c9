"""Chunks of CSV and Parquet files, in order, with the place of every row for messages."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess import csv_io
from preprocess.engine import LocalEngine
from preprocess.tabular.columns import BadCell, Column, Lists
from widedeep.errors import InputError

PARQUET_SUFFIXES = (".parquet", ".pq", ".brotli")
PARQUET_ROWS = 1 << 17


@dataclass(frozen=True)
class Chunk:
    """Rows of one file: `in_file` numbers the first one there, `rows` [n] int64 number all of them over all files."""

    path: Path
    in_file: int
    rows: np.ndarray
    columns: dict[str, Column | Lists]

    @contextlib.contextmanager
    def blame(self, column: str) -> Iterator[None]:
        """Turn a BadCell into one sentence with file and line."""
        try:
            yield
        except BadCell as error:
            row = self.in_file + error.row
            place = f"row {row}" if _is_parquet(self.path) else f"line {csv_io.line_of(self.path, row)}"
            raise InputError(f"{self.path}, {place}: column {column}: {error}") from error


def chunks(
    paths: Sequence[str | Path], columns: Sequence[str], engine: LocalEngine, chunk_bytes: int, first_row: int = 0
) -> Iterator[Chunk]:
    """Read files one after the other.

    Raises:
        InputError: a file is missing or malformed, or lacks a column.
    """
    for path in map(Path, paths):
        in_file = 0
        tables = _parquet(path, columns) if _is_parquet(path) else _csv(path, columns, engine, chunk_bytes)
        for table in tables:
            count = len(next(iter(table.values())))
            yield Chunk(path, in_file, np.arange(first_row, first_row + count), table)
            in_file, first_row = in_file + count, first_row + count


def count_rows(paths: Sequence[str | Path], column: str, engine: LocalEngine, chunk_bytes: int) -> int:
    """Rows of all files."""
    return sum(len(chunk.rows) for chunk in chunks(paths, [column], engine, chunk_bytes))


def column_names(path: Path) -> list[str]:
    """The columns of a file, in order. InputError when it cannot be read, or is empty."""
    if _is_parquet(path):
        with _parquet_errors(path):
            return pq.read_schema(path).names
    return list(csv_io.read_header(path))


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET_SUFFIXES


def _csv(path: Path, columns: Sequence[str], engine: LocalEngine, chunk_bytes: int) -> Iterator[dict[str, Column]]:
    kinds = [csv_io.Column(name, "string", nullable=True) for name in columns]

    def parse(block: csv_io.Block) -> dict[str, Column]:
        return {name: Column.of(array) for name, array in csv_io.read_block(block, kinds).items()}

    yield from engine.map(parse, csv_io.blocks(path, kinds, chunk_bytes))


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Column | Lists]]:
    with _parquet_errors(path), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise InputError(f"{path}: column {missing[0]} is missing; the file has {', '.join(names)[:200]}")
        for batch in file.iter_batches(PARQUET_ROWS, columns=list(columns)):
            yield {name: _column(path, name, batch.column(name)) for name in columns}


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _column(path: Path, name: str, array: pa.Array) -> Column | Lists:
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return Lists.of(array)
    if pa.types.is_nested(kind) or pa.types.is_null(kind):
        raise InputError(f"{path}: column {name}: expected numbers, text or lists of them, found {kind}")
    return Column.of(array)
