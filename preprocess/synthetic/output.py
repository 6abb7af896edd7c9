"""CSV files and a directory that appear whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc
import xxhash

from widedeep import atomic
from widedeep.errors import InputError

_WRITE = pc.WriteOptions(include_header=False, quoting_style="none", batch_size=1 << 16)


def csv_bytes(table: pa.Table) -> pa.Buffer:
    """Rows without a header, unquoted."""
    sink = pa.BufferOutputStream()
    pc.write_csv(table, sink, _WRITE)
    return sink.getvalue()


class CsvFile:
    """One raw file; keeps its row count and xxh3-64 while it is written."""

    def __init__(self, path: Path, columns: list[str]):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close(), or with the process on failure
        self._hash = xxhash.xxh3_64()
        self.rows = 0
        self.size = 0
        self._write((",".join(columns) + "\n").encode())

    def _write(self, data) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def append(self, data: pa.Buffer, rows: int) -> None:
        self._write(memoryview(data))
        self.rows += rows

    def close(self) -> dict:
        self._file.close()
        return {"rows": self.rows, "bytes": self.size, "xxh3_64": self._hash.hexdigest()}


@contextmanager
def fresh_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out`, renamed to `out` at the end; removed if the body fails.

    Raises:
        InputError: `out` exists and is not an empty directory, or it cannot be written.
        RunError: the disk is full.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory, expected a new or empty one")
    with atomic.directory(out, atomic.Output("ground_truth")) as part:
        yield part
