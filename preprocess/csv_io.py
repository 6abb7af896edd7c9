"""Reads CSV files in blocks of whole lines with pyarrow; a bad row becomes one sentence with file and line.

`blocks` cuts a file at line ends into tasks for a pool; `read_block` parses one. `.gz` and `.zst` files are
decompressed on the way; a `Format` says what stands between fields, and names the columns of files without a header.
Nulls are empty fields and `\\N`. A quoted field may hold commas but no line break. Lines count
from 1, a header included. When pyarrow or a range check refuses a block, `_diagnose` reads it again slowly to find the
line to blame.
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from preprocess.csv_hints import BEGINNING, NO_HEADER, are_values, listed, other_delimiter, other_than_text
from preprocess.inputs import changed
from widedeep.errors import InputError

NULLS = ("\\N", "")
NULL_INT = -1
NULL_TIME = np.iinfo(np.int64).min
MAX_ID = 2**31 - 2
BLOCK_BYTES = 4 << 20
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".csv", ".csv.gz", ".csv.zst")
# What pyarrow takes: ASCII only, blanks around numbers are ignored.
_PATTERNS = {
    "int": re.compile(r"-?[0-9]+"),
    "float": re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE),
    "time": re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}(:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,3})?)?)?)?"),
}
_EXPECTED = {"int": "an integer", "float": "a number", "string": "text", "time": "YYYY-MM-DD HH:MM:SS"}
_STRINGS = pa.dictionary(pa.int32(), pa.string())
_TYPES = {"int": pa.int64(), "float": pa.float64(), "string": _STRINGS, "time": pa.timestamp("ms")}
_TEXT = re.compile(rb"[^\r\n]")


@dataclass(frozen=True)
class Column:
    """A column to read.

    Args:
        kind: "int", "float", "string" or "time".
        nullable: whether a null is allowed; ints hold -1 for it, times `NULL_TIME`, strings code -1.
        low, high: inclusive limits of ints and floats.
    """

    name: str
    kind: str = "int"
    nullable: bool = False
    low: float = 0
    high: float = MAX_ID

    @property
    def dtype(self) -> type:
        """What `read_block` gives: int32 where the limits allow it, else int64; float64; int64 milliseconds."""
        if self.kind == "float":
            return np.float64
        return np.int32 if self.kind == "string" or (self.kind == "int" and self.high < 2**31) else np.int64


@dataclass(frozen=True)
class Format:
    """delimiter: one character between fields; None: a tab in files called .tsv, a comma in others.
    names: the columns of files that have no header line."""

    delimiter: str | None = ","
    names: tuple[str, ...] | None = None

    def of(self, path: Path) -> "Format":
        """With the delimiter that the file's name implies, unless one is given."""
        if self.delimiter is not None:
            return self
        name = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
        return Format("\t" if name.suffix.lower() == ".tsv" else ",", self.names)


COMMAS = Format()


class Strings(NamedTuple):
    """A string column: values[codes[i]] is row i, code -1 is null. codes [n] int32."""

    codes: np.ndarray
    values: pa.Array


@dataclass(frozen=True)
class Block:
    """Bytes [start, stop) of the (decompressed) file: whole lines. `data` holds them if the file is compressed."""

    path: Path
    header: tuple[str, ...]
    start: int
    stop: int
    data: bytes | None = None
    format: Format = COMMAS

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.stop - self.start)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(data) < self.stop - self.start:
            raise changed(self.path)
        return data


def find(directory: str | Path, name: str) -> Path | None:
    """`directory/name.csv`, or its .gz or .zst form; None if there is none."""
    paths = (Path(directory) / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def text_bytes(path: Path) -> int | None:
    """Bytes of all blocks of the file; None for a compressed one, which does not say."""
    return None if path.suffix in _COMPRESSIONS else path.stat().st_size


def read_header(path: Path, format: Format) -> tuple[str, ...]:
    """The column names as they stand. InputError when the file is missing, unreadable or empty."""
    with _open(path) as file:
        return _header(path, _call(path, file.readline), (), format.of(path))


def blocks(path: Path, columns: Sequence[Column], block_bytes: int, format: Format = COMMAS) -> Iterator[Block]:
    """Cuts the file after its header, if it has one, into blocks of about `block_bytes`, at line ends.

    Raises:
        InputError: the file is missing, unreadable or empty, or its header lacks one of `columns` or names one twice.
    """
    format = format.of(path)
    with _open(path) as file:
        first = _call(path, file.readline)
        names = _header(path, first, columns, format)
        # pyarrow wants distinct names; columns that are not read may share one.
        header = tuple(name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names))
        # Without a header the first line holds data, behind a byte order mark perhaps.
        head = first.removeprefix(codecs.BOM_UTF8) if format.names else b""
        start = len(first) - len(head)
        if path.suffix not in _COMPRESSIONS:
            size = os.path.getsize(path)
            # Blocks of one size: workers that begin together end together.
            block_bytes = -(-(size - start) // max(-(-(size - start) // block_bytes), 1))
            while start < size:
                file.seek(min(start + block_bytes, size) - 1)
                _call(path, file.readline)
                stop = file.tell()
                yield Block(path, header, start, stop, format=format)
                start = stop
        else:
            while data := head + _call(path, file.read, block_bytes):
                data += b"" if data.endswith(b"\n") else _call(path, file.readline)
                yield Block(path, header, start, start + len(data), data, format)
                start, head = start + len(data), b""


def read_block(block: Block, columns: Sequence[Column]) -> dict[str, np.ndarray | pa.DictionaryArray]:
    """Parses a block: {name: [n] array of `Column.dtype`, or for strings a dictionary array (see `unify`)}.

    Raises:
        InputError: a row has the wrong number of fields, or a value the wrong type or range; names file and line.
    """
    data = block.read()
    if not _TEXT.search(data):
        return {c.name: _empty(c) for c in columns}
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            pa_csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=list(block.header)),
            pa_csv.ParseOptions(delimiter=block.format.delimiter, newlines_in_values=False),
            pa_csv.ConvertOptions(
                column_types={c.name: _TYPES[c.kind] for c in columns},
                include_columns=[c.name for c in columns],
                null_values=list(NULLS),
                strings_can_be_null=True,
                timestamp_parsers=[pa_csv.ISO8601],
            ),
        )
        # An unclosed quote swallows the lines that follow, or the last line's end, without a word.
        if b'"' in data:
            lines = [line for line in data.splitlines() if line]
            if table.num_rows != len(lines) or _is_open(lines[-1].decode("latin-1"), block.format):
                raise _Refused("a quoted field spans lines")
        return {c.name: _to_numpy(table.column(c.name), c) for c in columns}
    except (pa.ArrowInvalid, pa.ArrowKeyError, _Refused) as error:
        raise _diagnose(block, data, columns, error) from error


def unify(pieces: Sequence[pa.DictionaryArray]) -> Strings:
    """The string columns of consecutive blocks as one; values in order of first appearance, whatever the blocks."""
    whole = pa.chunked_array(pieces or [_no_strings()]).unify_dictionaries()
    codes = [_filled(chunk.indices, np.int32, NULL_INT) for chunk in whole.chunks]
    return Strings(np.concatenate(codes), whole.chunk(0).dictionary)


def line_of(path: Path, row: int, format: Format = COMMAS) -> int:
    """The line number of a data row (0-based, blank lines not counted), for messages about rows found wrong later."""
    with _open(path) as file:
        line = 0
        if format.names is None:
            _call(path, file.readline)
            line = 1
        while data := _call(path, file.readline):
            for piece in data.splitlines():  # as the parser, which ends a line at a carriage return too
                line += 1
                row -= bool(piece)
                if row < 0:
                    return line
    return line


class _Refused(ValueError):
    """Parsed by pyarrow, but not what the columns allow."""


def _open(path: Path) -> IO[bytes]:
    compression = _COMPRESSIONS.get(path.suffix)
    try:
        if compression is None:
            with open(path, "rb") as file:
                other = other_than_text(file.read(BEGINNING))
            if other:
                raise InputError(f"{path}: expected text, found {other}")
            return open(path, "rb")
        return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _call(path: Path, read, *arguments):
    try:
        return read(*arguments)
    except OSError as error:
        raise InputError(f"{path}: cannot be read to its end: {error}") from error


def _header(path: Path, line: bytes, columns: Sequence[Column], format: Format) -> tuple[str, ...]:
    if format.names is not None:
        if missing := [column.name for column in columns if column.name not in format.names]:
            raise InputError(f"{path}: column {missing[0]} is missing; the format names {listed(format.names)}")
        return format.names
    if not line.strip():
        wanted = f" with {', '.join(c.name for c in columns)}" if columns else ""
        raise InputError(f"{path}: the {'first line' if line else 'file'} is empty, expected a header line{wanted}")
    try:
        header = tuple(next(_reader([line.decode("utf-8-sig").rstrip("\r\n")], format)))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line 1: expected a header line in UTF-8: {error}") from error
    except csv.Error as error:
        why = "lines that end in a line feed, found carriage returns alone" if b"\r" in line.rstrip(b"\r\n") else error
        raise InputError(f"{path}, line 1: expected {why}") from error
    for column in columns:
        if (count := header.count(column.name)) != 1:
            fault = "missing" if not count else "there twice"
            hint = NO_HEADER if are_values(header) else ""
            raise InputError(f"{path}, line 1: column {column.name} is {fault}; the header has {listed(header)}{hint}")
    return header


def _empty(column: Column) -> np.ndarray | pa.DictionaryArray:
    return _no_strings() if column.kind == "string" else np.empty(0, column.dtype)


def _no_strings() -> pa.DictionaryArray:
    return pa.nulls(0, _STRINGS)


def _to_numpy(chunked: pa.ChunkedArray, column: Column) -> np.ndarray | pa.DictionaryArray:
    if chunked.null_count and not column.nullable:
        raise _Refused("null")
    array = chunked.combine_chunks() if chunked.num_chunks != 1 else chunked.chunk(0)
    if column.kind == "string":
        return array
    if column.kind == "time":
        return _filled(array, np.int64, NULL_TIME)
    values, valid = _parts(array, np.float64 if column.kind == "float" else np.int64)
    checked = values if valid is None else values[valid]
    # The negated form also refuses NaN.
    if checked.size and not (checked.min() >= column.low and checked.max() <= column.high):
        raise _Refused("range")
    return (values if valid is None else np.where(valid, values, NULL_INT)).astype(column.dtype, copy=False)


def _parts(array: pa.Array, dtype: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """A number array as numpy, without a copy, and which of it is valid; None if all is.

    From the buffers, because pyarrow's own functions import pandas where it is installed: 0.4 s and 60 MB.
    """
    validity, data = array.buffers()
    rows = slice(array.offset, array.offset + len(array))
    values = np.frombuffer(data, dtype)[rows] if len(array) else np.empty(0, dtype)
    if not array.null_count:
        return values, None
    return values, np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[rows].view(bool)


def _filled(array: pa.Array, dtype: Any, null: int) -> np.ndarray:
    values, valid = _parts(array, dtype)
    return values if valid is None else np.where(valid, values, dtype(null))


def _diagnose(block: Block, data: bytes, columns: Sequence[Column], error: Exception) -> InputError:
    where = {c.name: block.header.index(c.name) for c in columns}
    line = _lines_before(block)
    for raw in data.splitlines():
        line += 1
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            return InputError(f"{block.path}, line {line}: expected UTF-8 text")
        if not text:
            continue
        if _is_open(text, block.format):
            found = "an open quote; a quoted field that spans lines is not supported"
            return InputError(f"{block.path}, line {line}: expected {len(block.header)} fields, found {found}")
        try:  # as pyarrow: quotes after a quoted field are text
            fields = next(_reader([text], block.format))
        except csv.Error as why:
            return InputError(f"{block.path}, line {line}: expected {len(block.header)} fields, found {why}")
        if len(fields) != len(block.header):
            mark = other_delimiter(fields)
            found = f"{len(fields)}{'' if mark is None else f'; its delimiter may be {mark!r}'}"
            return InputError(f"{block.path}, line {line}: expected {len(block.header)} fields, found {found}")
        for column in columns:
            if fault := _fault(column, fields[where[column.name]]):
                return InputError(f"{block.path}, line {line}: column {column.name}: {fault}")
    return InputError(f"{block.path}: cannot be parsed: {' '.join(str(error).split())}")


def _is_open(line: str, format: Format) -> bool:
    """Whether a line ends within a quoted field, so that the next one belongs to the same row."""
    reader = _reader([line, ""], format)
    try:
        next(reader)
    except csv.Error:  # a field longer than the module takes
        return False
    return reader.line_num == 2


def _reader(lines: list[str], format: Format):
    assert format.delimiter is not None  # see `Format.of`
    return csv.reader(lines, delimiter=format.delimiter)


def _lines_before(block: Block) -> int:
    """Ends of lines, as `bytes.splitlines` has them: line feeds, and carriage returns that none follows."""
    with _open(block.path) as file:
        count, left, ends_in_return = 0, block.start, False
        while left and (data := file.read(min(left, 1 << 24))):
            count += data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
            count -= ends_in_return and data.startswith(b"\n")
            ends_in_return = data.endswith(b"\r")
            left -= len(data)
    return count


def _fault(column: Column, field: str) -> str | None:
    expected, found = _EXPECTED[column.kind], f"found {field[:60]!r}"
    if field in NULLS:
        return None if column.nullable else f"expected {expected}, found no value"
    if column.kind == "string":
        return None
    if column.kind in ("int", "float"):
        field = field.strip(" \t")
    if not _PATTERNS[column.kind].fullmatch(field):
        return f"expected {expected}, {found}"
    if column.kind == "time":
        try:
            datetime.fromisoformat(field)
        except ValueError:
            return f"expected {expected}, {found}"
        return None
    value = int(field) if column.kind == "int" else float(field)
    if not column.low <= value <= column.high:
        return f"expected {expected} from {column.low:g} to {column.high:.10g}, {found}"
    return None
