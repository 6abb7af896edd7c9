"""The shard format: columnar blocks on disk, described and checked by one manifest. numpy and xxhash only.

A shard set is a directory of `manifest.json` and `part-00000.shard`, ... Each part holds its columns one after the
other, little-endian; each block starts at a multiple of 64 bytes and is padded with zeros to one, and the manifest
holds the xxh3-64 of block and padding. Ids are stored in the smallest unsigned type that holds the cardinality;
padding (id -1) is that type's maximum. `ShardSet.read` and `gather` give ids as int32 with -1, `column` as stored.
"""

import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from . import atomic
from .errors import InputError
from .shard_manifest import ALIGNMENT, FORMAT, MANIFEST, VERSION, Column, columns_of, padded, seal
from .shard_manifest import read as read_manifest

__all__ = ["MANIFEST", "Column", "ShardSet", "ShardWriter", "columns_of", "decode_ids"]


class ShardWriter:
    """Write a shard set: `append` columns of any number of rows, `finish`; the directory appears only then.

    As a with-block, an exception removes what was written and leaves an earlier set at `directory` as it was; a normal
    end calls `finish`. Memory: one part of `rows_per_shard` rows, and with threads one more for each.

    Raises:
        InputError: the place cannot be written, or an array does not fit its column (named, with row and value).
        RunError: the disk is full.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        spec: Any,
        *,
        rows_per_shard: int = 1 << 22,
        numeric: str = "float32",
        group: bool = False,
        threads: int = 0,
    ):
        """threads: they check and write full parts while `append` takes the next rows, so its arrays must not change
        afterwards, and it or `finish` may tell of earlier rows. With 0, `append` does all and copies. The bytes are the
        same."""
        if rows_per_shard < 1:
            raise InputError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
        self.directory = Path(directory)
        self.columns = columns_of(spec, numeric, group)
        self.rows = 0
        self._rows_per_shard = rows_per_shard
        self._parts: list[dict] = []
        self._buffer: dict[str, np.ndarray] = {}
        self._pieces: list[tuple[int, dict[str, np.ndarray]]] = []  # with threads: first row and arrays
        self._buffered = 0
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._writing: deque[Future] = deque()
        self._partial: Path | None = atomic.begin(self.directory, MANIFEST)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.abort()
        elif self._partial is not None:
            self.finish()

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add rows: one array per column, ids integer [rows] or [rows, hotness] with -1 for padding, numerics and label
        of any number type, all of one length. Ids must lie in [-1, cardinality), labels be 0 or 1, numerics finite."""
        names = [column.name for column in self.columns]
        if odd := [n for n in names if n not in arrays] + [n for n in arrays if n not in names]:
            raise InputError(f"{self.directory}: columns {odd} are missing or unknown; expected exactly {names}")
        arrays = {name: np.asarray(arrays[name]) for name in names}
        rows = len(arrays[names[-1]])
        for column in self.columns:
            self._check_shape(column, arrays[column.name], rows)
            if not self._threads:
                arrays[column.name] = self._encode(column, arrays[column.name], self.rows)
        for start in _steps(rows, self._rows_per_shard, self._buffered):
            stop = min(rows, start + self._rows_per_shard - self._buffered)
            if self._threads:
                self._pieces.append((self.rows + start, {name: array[start:stop] for name, array in arrays.items()}))
            else:
                self._fill(arrays, start, stop)
            self._buffered += stop - start
            if self._buffered == self._rows_per_shard:
                self._flush()
        self.rows += rows

    def finish(self, statistics: Mapping | None = None, provenance: Mapping | None = None) -> None:
        """Write the last part and the manifest, and rename the directory into place."""
        if self._partial is None:
            raise InputError(f"{self.directory}: this writer is already finished")
        try:
            if self._buffered:
                self._flush()
            while self._writing:
                self._parts.append(self._writing.popleft().result())
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "rows": self.rows,
                "columns": [asdict(column) for column in self.columns],
                "parts": self._parts,
                "statistics": dict(statistics or {}),
                "provenance": dict(provenance or {}),
            }
            with atomic.write_errors(self.directory):
                (self._partial / MANIFEST).write_text(seal(manifest), encoding="utf-8")
            atomic.commit(self._partial, self.directory)
        except BaseException:
            self.abort()
            raise
        self._partial = None
        self._end_threads()

    def abort(self) -> None:
        """Remove what was written; an earlier set at the same place stays."""
        self._end_threads()
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._partial = None
        self._buffer, self._pieces = {}, []

    def _check_shape(self, column: Column, values: np.ndarray, rows: int) -> None:
        if values.shape != column.shape(rows):
            found, expected = list(values.shape), list(column.shape(rows))
            raise InputError(f"{self.directory}: column {column.name!r} has shape {found}, expected {expected}")

    def _encode(self, column: Column, values: np.ndarray, first: int) -> np.ndarray:
        """values as they are stored; first: row number of values[0]."""
        if column.kind in ("categorical", "group") and values.dtype.kind not in "iu":
            raise InputError(f"{self.directory}: column {column.name!r} holds {values.dtype}, expected integers")
        if column.kind == "categorical":
            return self._encode_ids(column, values, first)
        if column.kind == "label":
            self._reject(column, values, first, (values != 0) & (values != 1), "a label is 0 or 1")
        with np.errstate(over="ignore"):
            encoded = values.astype(column.stored, copy=False)
        if column.kind == "numeric":
            fault = f"expected a finite number that fits {column.dtype}"
            self._reject(column, values, first, ~np.isfinite(encoded), fault)
        return encoded

    def _encode_ids(self, column: Column, values: np.ndarray, first: int) -> np.ndarray:
        if values.size and (values.min() < -1 or values.max() >= column.cardinality):
            self._reject(
                column,
                values,
                first,
                (values < -1) | (values >= column.cardinality),
                f"the cardinality is {column.cardinality}",
            )
        # -1 wraps round to the maximum of the unsigned type: the padding value.
        return values.astype(column.stored, copy=False)

    def _reject(self, column: Column, values: np.ndarray, first: int, bad: np.ndarray, why: str) -> None:
        if bad.any():
            at = np.unravel_index(int(bad.argmax()), bad.shape)
            raise InputError(f"{self.directory}: column {column.name!r}, row {first + at[0]}: {values[at]} ({why})")

    def _fill(self, arrays: Mapping[str, np.ndarray], start: int, stop: int) -> None:
        end = self._buffered + stop - start
        for column in self.columns:
            if column.name not in self._buffer:
                self._buffer[column.name] = np.empty(column.shape(self._rows_per_shard), column.stored)
            self._buffer[column.name][self._buffered : end] = arrays[column.name][start:stop]

    def _flush(self) -> None:
        if self._partial is None:
            raise InputError(f"{self.directory}: this writer is already finished")
        path = self._partial / f"part-{len(self._parts) + len(self._writing):05d}.shard"
        if self._pool is None:
            columns = ((c.name, [self._buffer[c.name][: self._buffered]]) for c in self.columns)
            self._parts.append(_write_part(path, self._buffered, columns, self.directory))
        else:
            if len(self._writing) == self._threads:
                self._parts.append(self._writing.popleft().result())
            self._writing.append(self._pool.submit(self._write_pieces, path, self._buffered, self._pieces))
            self._pieces = []
        self._buffered = 0

    def _write_pieces(self, path: Path, rows: int, pieces: list[tuple[int, dict[str, np.ndarray]]]) -> dict[str, Any]:
        columns = ((c.name, [self._encode(c, piece[c.name], first) for first, piece in pieces]) for c in self.columns)
        return _write_part(path, rows, columns, self.directory)

    def _end_threads(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._writing.clear()


def _write_part(
    path: Path, rows: int, columns: Iterable[tuple[str, list[np.ndarray]]], directory: Path
) -> dict[str, Any]:
    """One file of a shard set; returns its entry in the manifest. columns: name, and the column in pieces; directory:
    for messages."""
    blocks, offset = {}, 0
    with atomic.write_errors(directory), open(path, "wb") as file:
        for name, pieces in columns:
            digest, size = xxhash.xxh3_64(), 0
            for piece in pieces:
                data = memoryview(np.ascontiguousarray(piece)).cast("B")
                file.write(data)
                digest.update(data)
                size += data.nbytes
            padding = bytes(-size % ALIGNMENT)
            file.write(padding)
            digest.update(padding)
            blocks[name] = {"offset": offset, "bytes": size, "xxh3_64": digest.hexdigest()}
            offset += size + len(padding)
    return {"file": path.name, "rows": rows, "bytes": offset, "blocks": blocks}


def _steps(rows: int, size: int, filled: int) -> Iterator[int]:
    """Row numbers at which an append continues in a new part, the first being 0."""
    start = 0
    while start < rows:
        yield start
        start += size - filled
        filled = 0


class ShardSet:
    """A shard set opened for reading; parts are memory-mapped when first touched. Safe to share between threads.

    Attributes:
        rows: number of rows.
        columns: {name: Column} in file order.
        manifest: the manifest as a dict (with `statistics` and `provenance`).
    """

    def __init__(self, directory: Path, manifest: dict):
        self.directory = directory
        self.manifest = manifest
        self.rows: int = manifest["rows"]
        self.columns = {c["name"]: Column(**c) for c in manifest["columns"]}
        self._parts: list[dict] = manifest["parts"]
        self._ends = np.cumsum([part["rows"] for part in self._parts], dtype=np.int64)
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike, verify: bool = False) -> "ShardSet":
        """Open the shard set at `directory`, checking the manifest and every file's size; with `verify` every checksum.

        Raises:
            InputError: something is missing, truncated or damaged; names the file, the column, expected and found.
        """
        directory = Path(directory)
        shards = cls(directory, read_manifest(directory / MANIFEST))
        shards._check_sizes()
        if verify:
            shards.verify()
        return shards

    def verify(self) -> None:
        """Compare every block with its checksum; InputError names the first that differs."""
        for index, part in enumerate(self._parts):
            path, data = self.directory / part["file"], self._map(index)
            for name, block in part["blocks"].items():
                stop = block["offset"] + padded(block["bytes"])
                found = xxhash.xxh3_64(data[block["offset"] : stop]).hexdigest()
                if found != block["xxh3_64"]:
                    raise InputError(
                        f"{path}: column {name!r} (bytes {block['offset']} to {stop}) is damaged: "
                        f"its xxh3-64 is {found}, the manifest says {block['xxh3_64']}"
                    )

    def check(self, spec: Any) -> None:
        """Raise InputError unless every feature of `spec` is here with the same cardinality and hotness.

        Further columns are allowed, and the group column may be missing: only ranked metrics need it.
        """
        for want in columns_of(spec):
            have = self.columns.get(want.name)
            if have is None or have.kind != want.kind:
                found = "is missing" if have is None else f"is a {have.kind} column"
                raise InputError(f"{self.directory}: {want.kind} column {want.name!r} of the feature spec {found}")
            for field in ("cardinality", "hotness"):
                if getattr(have, field) != getattr(want, field):
                    raise InputError(
                        f"{self.directory}: column {want.name!r} has {field} {getattr(have, field)}, "
                        f"the feature spec says {getattr(want, field)}"
                    )

    def column(self, name: str) -> list[np.ndarray]:
        """A column as stored, one read-only memory map per part: [rows of part] or [rows of part, hotness]."""
        return [self._block(index, self._column(name)) for index in range(len(self._parts))]

    def read(self, start: int, stop: int, columns: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Rows [start, stop) as fresh arrays: ids int32 with -1 for padding, everything else as stored."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"{self.directory}: rows {start}..{stop} are not within 0..{self.rows}")
        result = self._empty(stop - start, columns)
        first = int(np.searchsorted(self._ends, start, side="right"))
        for index in range(first, len(self._parts)):
            part_start = int(self._ends[index]) - self._parts[index]["rows"]
            if part_start >= stop:
                break
            low, high = max(start, part_start), min(stop, int(self._ends[index]))
            for name, out in result.items():
                out[low - start : high - start] = self._block(index, self.columns[name])[
                    low - part_start : high - part_start
                ]
        return {name: self._decode(name, out) for name, out in result.items()}

    def gather(self, rows: Sequence[int] | np.ndarray, columns: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The given rows, in any order: ids int32 with -1 for padding, everything else as stored."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"{self.directory}: rows {rows.min()}..{rows.max()} are not within 0..{self.rows - 1}")
        # Ascending order touches each page once, and gives each part one slice.
        order = np.argsort(rows)
        ascending = rows[order]
        bounds = np.searchsorted(ascending, np.concatenate([[0], self._ends]))
        result = self._empty(len(rows), columns)
        for name, out in result.items():
            for index, part in enumerate(self._parts):
                slots = slice(bounds[index], bounds[index + 1])
                if slots.stop > slots.start:
                    local = ascending[slots] - (self._ends[index] - part["rows"])
                    out[order[slots]] = self._block(index, self.columns[name])[local]
        return {name: self._decode(name, out) for name, out in result.items()}

    def _column(self, name: str) -> Column:
        if name not in self.columns:
            raise InputError(f"{self.directory}: no column {name!r}; it has {list(self.columns)}")
        return self.columns[name]

    def _empty(self, rows: int, columns: Iterable[str] | None) -> dict[str, np.ndarray]:
        chosen = [self._column(name) for name in (self.columns if columns is None else columns)]
        return {c.name: np.empty(c.shape(rows), np.dtype(c.dtype)) for c in chosen}

    def _decode(self, name: str, stored: np.ndarray) -> np.ndarray:
        return decode_ids(stored) if self.columns[name].kind == "categorical" else stored

    def _block(self, index: int, column: Column) -> np.ndarray:
        block = self._parts[index]["blocks"][column.name]
        data = self._map(index)[block["offset"] : block["offset"] + block["bytes"]]
        return data.view(column.stored).reshape(column.shape(self._parts[index]["rows"]))

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            path = self.directory / self._parts[index]["file"]
            try:
                self._maps[index] = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: cannot be read: {error}") from error
        return self._maps[index]

    def _check_sizes(self) -> None:
        for part in self._parts:
            path = self.directory / part["file"]
            if not path.is_file():
                raise InputError(f"{path}: the file is missing; {MANIFEST} lists it")
            if (size := path.stat().st_size) != part["bytes"]:
                raise InputError(f"{path}: the file has {size} bytes, {MANIFEST} says {part['bytes']}")


def decode_ids(stored: np.ndarray) -> np.ndarray:
    """Stored ids (unsigned, the type's maximum = padding) as int32 with -1 for padding; same shape."""
    if stored.dtype.itemsize == 4:
        return stored.astype(np.uint32, copy=False).view(np.int32)
    ids = stored.astype(np.int32)
    ids[stored == np.iinfo(stored.dtype).max] = -1
    return ids
