"""Directories that appear whole or not at all.

A run writes into a hidden directory beside its target and renames it at the end, so whatever stops the run leaves the
previous output as it was.
"""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, RunError

SHORT_WRITE = "requested and"  # numpy's "8192 requested and 4096 written": an OSError without a number


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn an OSError of writing `target` into one sentence: RunError if the disk is full, else InputError."""
    try:
        yield
    except OSError as error:
        short = error.errno is None and SHORT_WRITE in str(error)
        if short or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "No space left on device, or the limit of a file's size is reached" if short else error.strerror
            raise RunError(f"cannot write {target}: {why}; what was there before is untouched") from error
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def check(target: Path, marker: str) -> None:
    """Raise InputError if `target` is a file, or a directory neither empty nor an earlier output (which holds a file
    `marker`)."""
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot write the directory {target}: a file of that name exists")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).exists():
        raise InputError(
            f"will not replace {target}: it is not empty and holds no {marker}, so it is not an earlier output"
        )


def begin(target: Path, marker: str) -> Path:
    """Create and return an empty hidden directory beside `target`.

    Raises:
        InputError: `target` cannot be written, or `check` refuses it.
    """
    target = Path(os.path.abspath(target))
    check(target, marker)
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial = target.parent / f"{_prefix(target)}{os.getpid()}"
        partial.mkdir()
    return partial


def commit(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an earlier `target` is moved aside first, and put back should the rename fail."""
    target = Path(os.path.abspath(target))
    previous = None
    with write_errors(target):
        if target.exists():
            previous = partial.with_name(partial.name + "-previous")
            target.rename(previous)
        try:
            partial.rename(target)
        except OSError:
            if previous is not None:
                previous.rename(target)
            raise
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def directory(target: Path, marker: str) -> Iterator[Path]:
    """`begin`, then `commit` when the block ends well; the partial directory is removed when it does not."""
    partial = begin(target, marker)
    try:
        with write_errors(target):
            yield partial
        commit(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(target: Path) -> None:
    """Delete partial directories of this host's dead processes; put an output back that a kill left moved aside."""
    for path in target.parent.glob(f"{_prefix(target)}*"):
        pid, _, suffix = path.name.removeprefix(_prefix(target)).partition("-")
        if not pid.isdigit() or (int(pid) != os.getpid() and _is_running(int(pid))):
            continue
        if suffix == "previous" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
