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

from widedeep import atomic
from widedeep.errors import InputError
from widedeep.features import STATISTICS
from widedeep.shard_manifest import FORMAT, MANIFEST, UNLABELLED, VERSION, Column, columns_of, padded, seal
from widedeep.shard_manifest import read as read_manifest
from widedeep.shard_part import Part

__all__ = ["DATA_SET_OUTPUT", "MANIFEST", "UNLABELLED", "Column", "ShardSet", "ShardWriter", "columns_of", "decode_ids"]

# What an earlier output holds: a shard set, or what preprocessing writes.
SHARD_SET_OUTPUT = atomic.Output(MANIFEST, (MANIFEST, "part-*.shard"))
DATA_SET_OUTPUT = atomic.Output(
    f"train/{MANIFEST}",
    (
        "feature_spec.yaml",
        "report.json",
        f"{STATISTICS}/*",
        *(f"{split}/{name}" for split in ("train", "test") for name in SHARD_SET_OUTPUT.files),
    ),
)


class ShardWriter:
    """Write a shard set: `append` columns of any number of rows, `finish`; the directory appears only then.

    As a with-block, an exception removes what was written and leaves an earlier set at `directory` as it was; a normal
    end calls `finish`. Memory: one part of `rows_per_shard` rows; with threads at most one more for each, but only what
    they have not written yet.

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
        rows: int | None = None,
        final: str | os.PathLike | None = None,
    ):
        """spec: gives the columns. numeric: what numerics are stored as, "float32" or "float16". group: whether the
        group column is stored. final: what messages name, where the caller will rename a directory above `directory`.
        threads: they check and write rows, each thread those of a part, while `append` takes the next, so its arrays
        must not change afterwards, and it or `finish` may tell of earlier rows. They need `rows`, the number of rows
        that will come, from which every column has its place in the file. With 0, `append` does all and copies. The
        bytes are the same."""
        if rows_per_shard < 1:
            raise InputError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
        if threads and rows is None:
            raise ValueError("threads need the number of rows that will be appended")
        self.directory = Path(directory if final is None else final)
        self._target = Path(directory)
        self.columns = columns_of(spec, numeric, group)
        self.rows = 0
        self._rows_per_shard = rows_per_shard
        self._parts: list[dict] = []
        self._buffer: dict[str, np.ndarray] = {}
        self._buffered = 0
        self._expected = rows
        self._threads = [ThreadPoolExecutor(1) for _ in range(threads)]
        self._jobs: deque[Future] = deque()  # theirs, in the order of the rows; the last of a part gives its entry
        self._part: Part | None = None  # theirs, begun and not yet full
        self._full = 0  # of their parts, those that are not in `_parts` yet
        self._partial: Path | None = atomic.begin(self._target, SHARD_SET_OUTPUT, asked=self.directory)

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
        if self._expected is not None and self.rows + rows > self._expected:
            raise InputError(f"{self.directory}: more than the {self._expected} rows that were expected")
        for column in self.columns:
            self._check_shape(column, arrays[column.name], rows)
            if not self._threads:
                arrays[column.name] = self._encode(column, arrays[column.name], self.rows)
        for start in _steps(rows, self._rows_per_shard, self._buffered):
            stop = min(rows, start + self._rows_per_shard - self._buffered)
            if self._threads:
                self._send({name: array[start:stop] for name, array in arrays.items()}, self.rows + start)
            else:
                self._fill(arrays, start, stop)
            self._buffered += stop - start
            if self._buffered == self._rows_per_shard:
                self._flush()
        self.rows += rows
        self._collect(len(self._threads))

    def finish(self, statistics: Mapping | None = None, provenance: Mapping | None = None) -> None:
        """Write the last part and the manifest, and rename the directory into place."""
        if self._partial is None:
            raise InputError(f"{self.directory}: this writer is already finished")
        try:
            if self._expected not in (None, self.rows):
                raise InputError(f"{self.directory}: {self.rows} rows, expected {self._expected}")
            if self._buffered:
                self._flush()
            self._collect(0)
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
            atomic.commit(self._partial, self._target, self.directory)
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
        self._buffer = {}

    def _check_shape(self, column: Column, values: np.ndarray, rows: int) -> None:
        if values.shape != column.shape(rows):
            found, expected = list(values.shape), list(column.shape(rows))
            raise InputError(f"{self.directory}: column {column.name!r} has shape {found}, expected {expected}")

    def _encode(self, column: Column, values: np.ndarray, first: int) -> np.ndarray:
        """values as they are stored; first: row number of values[0]."""
        kinds, expected = ("iu", "integers") if column.kind in ("categorical", "group") else ("biuf", "numbers")
        if values.dtype.kind not in kinds:
            raise InputError(f"{self.directory}: column {column.name!r} holds {values.dtype}, expected {expected}")
        if column.kind == "categorical":
            return self._encode_ids(column, values, first)
        if column.kind == "label":
            self._reject(column, values, first, (values != 0) & (values != 1), "a label is 0 or 1")
        with np.errstate(over="ignore"):
            encoded = values.astype(column.stored, copy=False)
        if column.kind == "numeric":
            fault = f"expected a finite number that fits {column.dtype}"
            self._reject(column, values, first, ~np.isfinite(encoded), fault)
        if column.kind == "group" and values.dtype.kind == "u":
            self._reject(column, values, first, encoded < 0, "a group is below 2^63")
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

    def _send(self, arrays: dict[str, np.ndarray], first: int) -> None:
        """Gives rows to the thread of their part; first: row number of the first."""
        if self._part is None:
            self._part = self._begin(min(self._rows_per_shard, self._expected - first))  # type: ignore[operator]  # threads need it
        self._jobs.append(self._thread().submit(self._write, self._part, arrays, first))

    def _write(self, part: Part, arrays: dict[str, np.ndarray], first: int) -> None:
        part.append((column.name, self._encode(column, arrays[column.name], first)) for column in self.columns)

    def _thread(self) -> ThreadPoolExecutor:
        return self._threads[(len(self._parts) + self._full) % len(self._threads)]

    def _begin(self, rows: int) -> Part:
        if self._partial is None:
            raise InputError(f"{self.directory}: this writer is already finished")
        path = self._partial / f"part-{len(self._parts) + self._full:05d}.shard"
        return Part(path, rows, self.columns, self.directory)

    def _flush(self) -> None:
        """Ends the part: it is full, or no rows follow."""
        if self._threads:
            self._jobs.append(self._thread().submit(self._part.entry))  # type: ignore[union-attr]  # `_send` began it
            self._part, self._full = None, self._full + 1
            self._collect(len(self._threads))
        else:
            part = self._begin(self._buffered)
            part.append((c.name, self._buffer[c.name][: self._buffered]) for c in self.columns)
            self._parts.append(part.entry())
        self._buffered = 0

    def _collect(self, most: int) -> None:
        """Takes what the threads have done, waiting until they have at most `most` full parts; raises their errors."""
        while self._jobs and (self._full > most or self._jobs[0].done()):
            if (entry := self._jobs.popleft().result()) is not None:
                self._parts.append(entry)
                self._full -= 1

    def _end_threads(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()


def _steps(rows: int, size: int, filled: int) -> Iterator[int]:
    """Row numbers at which an append continues in a new part, the first being 0."""
    start = 0
    while start < rows:
        yield start
        start += size - filled
        filled = 0


class ShardSet:
    """A shard set opened for reading; all parts are memory-mapped at once, so that one that replaces it later changes
    nothing here. Safe to share between threads.

    Attributes:
        rows: number of rows.
        columns: {name: Column} in file order.
        manifest: the manifest as a dict (with `statistics` and `provenance`).
        ends: [parts] int64, the number of rows up to the end of each part.
    """

    def __init__(self, directory: Path, manifest: dict):
        self.directory = directory
        self.manifest = manifest
        self.rows: int = manifest["rows"]
        self.columns = {c["name"]: Column(**c) for c in manifest["columns"]}
        self._parts: list[dict] = manifest["parts"]
        self.ends = np.cumsum([part["rows"] for part in self._parts], dtype=np.int64)
        self._maps = [self._map(part) for part in self._parts]

    @classmethod
    def open(cls, directory: str | os.PathLike, verify: bool = False) -> "ShardSet":
        """Open the shard set at `directory`, checking the manifest and every file's size; with `verify` every checksum.

        Raises:
            InputError: something is missing, truncated or damaged; names the file, the column, expected and found.
        """
        directory = Path(directory)
        shards = cls(directory, read_manifest(directory / MANIFEST))
        if verify:
            shards.verify()
        return shards

    def verify(self) -> None:
        """Compare every block with its checksum; InputError names the first that differs."""
        for index, part in enumerate(self._parts):
            path, data = self.directory / part["file"], self._maps[index]
            for name, block in part["blocks"].items():
                stop = block["offset"] + padded(block["bytes"])
                found = xxhash.xxh3_64(data[block["offset"] : stop].data).hexdigest()
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
        column = self._column(name)
        return [self._block(index, column) for index in range(len(self._parts))]

    def read(self, start: int, stop: int, columns: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Rows [start, stop) as fresh arrays: ids int32 with -1 for padding, everything else as stored."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"{self.directory}: rows {start}..{stop} are not within 0..{self.rows}")
        result = self._empty(stop - start, columns)
        first = int(np.searchsorted(self.ends, start, side="right"))
        for index in range(first, len(self._parts)):
            part_start = int(self.ends[index]) - self._parts[index]["rows"]
            if part_start >= stop:
                break
            low, high = max(start, part_start), min(stop, int(self.ends[index]))
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
        bounds = np.searchsorted(ascending, np.concatenate([[0], self.ends]))
        result = self._empty(len(rows), columns)
        for name, out in result.items():
            for index, part in enumerate(self._parts):
                slots = slice(bounds[index], bounds[index + 1])
                if slots.stop > slots.start:
                    local = ascending[slots] - (self.ends[index] - part["rows"])
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
        data = self._maps[index][block["offset"] : block["offset"] + block["bytes"]]
        return data.view(column.stored).reshape(column.shape(self._parts[index]["rows"]))

    def _map(self, part: dict) -> np.ndarray:
        path = self.directory / part["file"]
        if not path.is_file():
            raise InputError(f"{path}: the file is missing; {MANIFEST} lists it")
        if (size := path.stat().st_size) != part["bytes"]:
            raise InputError(f"{path}: the file has {size} bytes, {MANIFEST} says {part['bytes']}")
        try:
            return np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error


def decode_ids(stored: np.ndarray) -> np.ndarray:
    """Stored ids (unsigned, the type's maximum = padding) as int32 with -1 for padding; same shape."""
    if stored.dtype.itemsize == 4:
        return stored.astype(np.uint32, copy=False).view(np.int32)
    ids = stored.astype(np.int32)
    ids[stored == np.iinfo(stored.dtype).max] = -1
    return ids
