"""Chunks of CSV, Parquet and Arrow files, in order, with the place of every row for messages."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess import csv_io
from preprocess.engine import Engine
from preprocess.tabular.columns import BadCell, Column, Lists
from widedeep.errors import InputError

PARQUET_SUFFIXES = (".parquet", ".pq", ".brotli")
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
CHUNK_ROWS = 1 << 17


@dataclass(frozen=True)
class Chunk:
    """Rows of one file: `in_file` numbers the first one there, `rows` [n] int64 number all of them over all files."""

    path: Path
    in_file: int
    rows: np.ndarray
    columns: dict[str, Column | Lists]
    csv: csv_io.Format = csv_io.COMMAS

    @contextlib.contextmanager
    def blame(self, column: str | None) -> Iterator[None]:
        """Turn a BadCell into one sentence with file and line."""
        try:
            yield
        except BadCell as error:
            row = self.in_file + error.row
            is_csv = not (_is_parquet(self.path) or _is_arrow(self.path))
            place = f"line {csv_io.line_of(self.path, row, self.csv)}" if is_csv else f"row {row}"
            raise InputError(f"{self.path}, {place}: column {column}: {error}") from error


def chunks(
    paths: Sequence[str | Path],
    columns: Sequence[str],
    engine: Engine,
    chunk_bytes: int,
    *,
    csv: csv_io.Format = csv_io.COMMAS,
    first_row: int = 0,
) -> Iterator[Chunk]:
    """Read files one after the other; `csv` is the format of those that are neither Parquet nor Arrow.

    Raises:
        InputError: a file is missing or malformed, or lacks a column.
    """
    for path in map(Path, paths):
        in_file = 0
        if _is_parquet(path):
            tables = _parquet(path, columns)
        elif _is_arrow(path):
            tables = _arrow(path, columns)
        else:
            tables = _csv(path, columns, engine, chunk_bytes, csv)
        for table in tables:
            count = len(next(iter(table.values())))
            yield Chunk(path, in_file, np.arange(first_row, first_row + count), table, csv)
            in_file, first_row = in_file + count, first_row + count


def column_names(path: Path, csv: csv_io.Format = csv_io.COMMAS) -> list[str]:
    """The columns of a file, in order. InputError when it cannot be read, or is empty."""
    if _is_parquet(path):
        with _errors(path, "Parquet"):
            return pq.read_schema(path).names
    if _is_arrow(path):
        with _errors(path, "Arrow"), _open_arrow(path) as reader:
            return reader.schema.names
    return list(csv_io.read_header(path, csv))


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET_SUFFIXES


def _is_arrow(path: Path) -> bool:
    return path.suffix.lower() in ARROW_SUFFIXES


def _csv(
    path: Path, columns: Sequence[str], engine: Engine, chunk_bytes: int, format: csv_io.Format
) -> Iterator[dict[str, Column]]:
    kinds = [csv_io.Column(name, "string", nullable=True) for name in columns]

    yield from engine.map(partial(_parse, kinds=kinds), csv_io.blocks(path, kinds, chunk_bytes, format))


def _parse(block: csv_io.Block, kinds: Sequence[csv_io.Column]) -> dict[str, Column]:
    return {name: Column.of(array) for name, array in csv_io.read_block(block, kinds).items()}


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Column | Lists]]:
    with _errors(path, "Parquet"), pq.ParquetFile(path) as file:
        _check_names(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(CHUNK_ROWS, columns=list(columns)):
            batch.validate(full=True)
            yield {name: _column(path, name, batch.column(name)) for name in columns}


def _arrow(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Column | Lists]]:
    with _errors(path, "Arrow"), _open_arrow(path) as reader:
        _check_names(path, columns, reader.schema.names)
        is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                piece = batch.slice(start, CHUNK_ROWS)
                yield {name: _column(path, name, piece.column(name)) for name in columns}


def _open_arrow(path: Path) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    """Of the file format, which Feather is too, or of the stream format."""
    source = pa.memory_map(str(path))
    return pa.ipc.open_file(source) if source.read(6) == b"ARROW1" else pa.ipc.open_stream(str(path))


def _check_names(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    for column in columns:
        if (count := names.count(column)) != 1:
            fault = "missing" if not count else "there twice"
            raise InputError(f"{path}: column {column} is {fault}; the file has {', '.join(names)[:200]}")


@contextlib.contextmanager
def _errors(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {kind}: {' '.join(str(error).split())}") from error


def _column(path: Path, name: str, array: pa.Array) -> Column | Lists:
    kind = array.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    element = kind.value_type if is_list or pa.types.is_dictionary(kind) else kind
    if pa.types.is_null(element) or not _is_text(element):
        raise InputError(f"{path}: column {name}: expected numbers, text or lists of them, found {kind}")
    if pa.types.is_binary(element) or pa.types.is_large_binary(element):
        array = array.cast(pa.list_(pa.string()) if is_list else pa.string())
    return Lists.of(array) if is_list else Column.of(array)


def _is_text(kind: pa.DataType) -> bool:
    """Whether values of this type can be written as text."""
    try:
        pa.array([], kind).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return False
    return True
