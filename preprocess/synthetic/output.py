"""CSV files and a directory that appear whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc
import xxhash

from widedeep.errors import InputError, RunError

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
        InputError: `out` exists and is not an empty directory, or its parent cannot be written.
        RunError: writing failed later, for instance because the disk is full.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory, expected a new or empty one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(
            f"{out} cannot be created ({error.strerror}), expected a path in a writable directory"
        ) from error
    try:
        yield part
        part.chmod(0o777 & ~_umask())
        os.replace(part, out)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise RunError(f"{out} could not be written: {why}; nothing was left there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
