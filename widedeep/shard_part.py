"""A file of a shard set while it is written."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from widedeep import atomic
from widedeep.shard_manifest import Column, padded


class Part:
    """A file of a shard set, to which rows are appended; each column has its place from the start.

    The bytes and the entry do not depend on how the rows were cut.

    Args:
        rows: how many will come.
        directory: for messages.
    """

    def __init__(self, path: Path, rows: int, columns: Sequence[Column], directory: Path):
        self.path, self._rows, self._directory = path, rows, directory
        self._digests = {column.name: xxhash.xxh3_64() for column in columns}
        self._sizes = {column.name: column.nbytes(rows) for column in columns}
        places = [0, *accumulate(map(padded, self._sizes.values()))]
        self._starts, self._bytes = dict(zip(self._sizes, places)), places[-1]
        self._ends = dict(self._starts)  # of what is written
        with atomic.write_errors(directory), open(path, "xb") as file:
            file.truncate(self._bytes)  # what is not written is zero: the padding

    def append(self, columns: Iterable[tuple[str, np.ndarray]]) -> None:
        """columns: each name with the next rows as they are stored."""
        with atomic.write_errors(self._directory), open(self.path, "r+b", buffering=0) as file:
            for name, values in columns:
                data = np.ascontiguousarray(values).data.cast("B")
                self._digests[name].update(data)
                file.seek(self._ends[name])
                self._ends[name] += data.nbytes
                while data:
                    data = data[file.write(data) :]

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it; once, when all rows are there."""
        blocks = {}
        for name, size in self._sizes.items():
            if self._ends[name] != self._starts[name] + size:
                raise ValueError(f"{self.path}: column {name!r} lacks rows")
            self._digests[name].update(bytes(padded(size) - size))
            blocks[name] = {"offset": self._starts[name], "bytes": size, "xxh3_64": self._digests[name].hexdigest()}
        return {"file": self.path.name, "rows": self._rows, "bytes": self._bytes, "blocks": blocks}
