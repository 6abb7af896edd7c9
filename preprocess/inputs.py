"""The files that a run reads must stay as they are until it ends: its passes would see different rows."""

import contextlib
import os
from collections.abc import Iterable, Iterator

from widedeep.errors import InputError


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
