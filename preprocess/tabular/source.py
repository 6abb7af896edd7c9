"""Chunks of CSV, Parquet and Arrow files, in order, with the place of every row for messages."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess import csv_hints, csv_io
from preprocess.engine import Engine
from preprocess.tabular.columns import BadCell, Column, Lists, is_uuid
from widedeep.errors import InputError

PARQUET_SUFFIXES = (".parquet", ".pq", ".brotli")
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
CHUNK_ROWS = 1 << 17


@dataclass(frozen=True)
class Chunk:
    """Rows of one file: `in_file` numbers the first one there, `rows` [n] int64 number all of them over the files that
    are read together. Of a table in memory `path` is None."""

    path: Path | None
    in_file: int
    rows: np.ndarray
    columns: Mapping[str, Column | Lists]
    csv: csv_io.Format = csv_io.COMMAS

    @contextlib.contextmanager
    def blame(self, column: str | None) -> Iterator[None]:
        """Turn a BadCell into one sentence with file and line."""
        try:
            yield
        except BadCell as error:
            raise InputError(f"{self._place(error.row)}: column {column}: {error}") from error

    def of(self, column: str) -> str:
        """What a message about a whole column begins with."""
        return _of(self.path, column)

    def _place(self, row: int) -> str:
        row += self.in_file
        if self.path is None:
            return f"row {row + 1}"
        is_csv = not (_is_parquet(self.path) or _is_arrow(self.path))
        return f"{self.path}, " + (f"line {csv_io.line_of(self.path, row, self.csv)}" if is_csv else f"row {row + 1}")


def chunks(
    paths: Sequence[str | Path],
    columns: Sequence[str],
    engine: Engine,
    chunk_bytes: int,
    *,
    csv: Callable[[Path], csv_io.Format],
) -> Iterator[Chunk]:
    """Read files one after the other; `csv` gives the format of one that is neither Parquet nor Arrow.

    Raises:
        InputError: a file is missing or malformed, or lacks a column.
    """
    first_row = 0
    for path in map(Path, paths):
        in_file, format = 0, csv_io.COMMAS
        tables: Iterator[Mapping[str, Column | Lists]]
        if _is_parquet(path):
            tables = _parquet(path, columns)
        elif _is_arrow(path):
            tables = _arrow(path, columns)
        else:
            format = csv(path)
            tables = _csv(path, columns, engine, chunk_bytes, format)
        for table in tables:
            count = len(next(iter(table.values())))
            yield Chunk(path, in_file, np.arange(first_row, first_row + count), table, format)
            in_file, first_row = in_file + count, first_row + count


def in_memory(table: pa.Table, columns: Sequence[str]) -> Chunk:
    """All rows of a table. Raises InputError as `chunks` does."""
    _check_names(None, columns, table.column_names)
    taken = {name: _column(None, name, table.column(name)) for name in columns}
    return Chunk(None, 0, np.arange(table.num_rows), taken)


def column_names(path: Path, csv: csv_io.Format) -> tuple[list[str], dict[str, str]]:
    """The columns of a file that can be read, in order, and what is wrong with each of the others.

    Raises:
        InputError: the file cannot be read, or is empty.
    """
    if _is_parquet(path):
        with _errors(path, "Parquet"):
            schema = pq.read_schema(path)
    elif _is_arrow(path):
        with _errors(path, "Arrow"), _open_arrow(path) as reader:
            schema = reader.schema
    else:
        schema = pa.schema([(name, pa.string()) for name in csv_io.read_header(path, csv)])
    count = Counter(schema.names)
    faults = {}
    for place, field in enumerate(schema, 1):
        if not field.name:
            faults[f"column {place}"] = "has no name"
        elif count[field.name] > 1:
            faults[field.name] = "there twice"
        elif fault := _type_fault(field.type):
            faults[field.name] = fault
    return [name for name in schema.names if name and name not in faults], faults


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


def _check_names(path: Path | None, columns: Sequence[str], names: Sequence[str]) -> None:
    for column in columns:
        if (count := names.count(column)) != 1:
            fault = "missing" if not count else "there twice"
            what = "table" if path is None else "file"
            raise InputError(f"{_of(path, column)} is {fault}; the {what} has {csv_hints.listed(names)}")


def _of(path: Path | None, column: str) -> str:
    return f"column {column}" if path is None else f"{path}: column {column}"


@contextlib.contextmanager
def _errors(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {kind}: {' '.join(str(error).split())}") from error


def _column(path: Path | None, name: str, array: pa.Array) -> Column | Lists:
    if fault := _type_fault(array.type):
        raise InputError(f"{_of(path, name)}: {fault}")
    if not _is_list(array.type):
        return Column.of(array)
    lists = Lists.of(array)
    if "binary" in str(lists.elements.values.type):
        # The row that an element would blame is its own place, not that of its list.
        try:
            lists.elements.texts  # noqa: B018
        except BadCell as error:
            raise InputError(f"{_of(path, name)}: {error}") from error
    return lists


def _is_list(kind: pa.DataType) -> bool:
    """Of any layout, list views included, which older pyarrow does not know."""
    return hasattr(kind, "value_field")


def _type_fault(kind: pa.DataType) -> str | None:
    """What is wrong with a column of this type; None if it can be read."""
    element = kind.value_field.type if _is_list(kind) else kind
    if is_uuid(element):
        return None
    element = element.value_type if pa.types.is_dictionary(element) else element
    return None if _is_text(element) else f"expected numbers, text or lists of them, found {str(kind)[:60]}"


def _is_text(kind: pa.DataType) -> bool:
    """Whether values of this type can be written as text."""
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_duration(kind):  # whose text does not name its unit
        return False
    try:
        pa.array([], kind).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return False
    return True
