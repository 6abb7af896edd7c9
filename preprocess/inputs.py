"""The files that a run reads. They must stay as they are until it ends: its passes would see different rows."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from widedeep.errors import InputError


def files_of(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Files, and in the place of a directory the files in it by name, as Spark and others write a table; what begins
    with `_` or `.` there is not of it.

    Raises:
        InputError: there are no files in a directory, or directories in it, or it cannot be read.
    """
    files = []
    for path in map(Path, paths):
        try:
            files += _parts(path) if path.is_dir() else [path]
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return files


def _parts(directory: Path) -> list[Path]:
    parts = sorted(part for part in directory.iterdir() if not part.name.startswith(("_", ".")))
    if inner := next((part for part in parts if part.is_dir()), None):
        raise InputError(f"{directory}: expected a directory of files alone, got the directory {inner.name} in it")
    if not parts:
        raise InputError(f"{directory}: expected files in this directory, found none")
    return parts


def check_outside(out: str | os.PathLike, paths: Iterable[str | os.PathLike]) -> None:
    """Raises InputError where an output would lie below a directory of inputs: the next run would read it, or fail at
    it.
    """
    real = Path(os.path.realpath(out))
    for path in paths:
        if os.path.isdir(path) and Path(os.path.realpath(path)) in real.parents:
            raise InputError(f"cannot write {out}: it lies in {path}, whose files this run reads")


@contextlib.contextmanager
def unchanged(paths: Iterable[str | os.PathLike]) -> Iterator[None]:
    """InputError when the block ends well, but the size or the time of change of a file is not what it was before."""
    before = {path: state(path) for path in paths}
    yield
    for path, was in before.items():
        if state(path) != was:
            raise changed(path)


def state(path: str | os.PathLike) -> list[int] | None:
    """Size and time of change; None for a file that is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def changed(path: str | os.PathLike) -> InputError:
    return InputError(f"{path}: changed while it was read, expected a file that stays as it is until the run ends")
