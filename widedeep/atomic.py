"""Files and directories that appear whole or not at all.

A run writes into a hidden one beside its target and renames it at the end, so whatever stops the run leaves the
previous output as it was.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, NamedTuple

from widedeep.errors import DISK_FULL, InputError, RunError

SHORT_WRITE = "requested and"  # numpy's "8192 requested and 4096 written": an OSError without a number


class Output(NamedTuple):
    """A kind of directory, and how an earlier one is told from others: it holds `marker`, and no file but of `files`.

    marker: a path within it.   files: patterns of such paths, where * stands for any characters.
    """

    marker: str
    files: tuple[str, ...] = ("*",)


@contextlib.contextmanager
def write_errors(target: Path, kept: str = "what was there before is untouched") -> Iterator[None]:
    """Turn an OSError of writing `target` into one sentence: RunError if the disk is full or fails, else InputError.

    kept: what a full disk has not cost. As it stands, true of outputs that are renamed into place; logs say their own.
    """
    try:
        yield
    except OSError as error:
        short = error.errno is None and SHORT_WRITE in str(error)
        if short or error.errno in DISK_FULL:
            why = "No space left on device, or the limit of a file's size is reached" if short else _why(error)
            raise RunError(f"cannot write {target}: {why}; {kept}") from error
        raise InputError(f"cannot write {target}: {_why(error)}") from error


def _why(error: OSError) -> str:
    """In the system's words: pyarrow's own account names the temporary file."""
    return os.strerror(error.errno) if error.errno else error.strerror or str(error)


@contextlib.contextmanager
def file(target: Path) -> Iterator[Path]:
    """Gives the path of a file to write, beside `target`, and renames it when the block ends well; else removes it.

    Makes the target's directory. No two blocks get the same path, so one file may be written twice at a time. Errors
    are left to the caller's `write_errors`, who knows what was asked for.
    """
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):  # it must not hide what went wrong before
            partial.unlink()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk, where they outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def check(target: Path, output: Output, reads: Iterable[str | os.PathLike] = ()) -> None:
    """Raise InputError unless `target` is absent, empty, or an earlier output that holds nothing else.

    reads: files and directories that the run reads, none of which may lie in what it replaces.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot write the directory {target}: a file of that name exists")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / output.marker).exists():
        raise InputError(
            f"will not replace {target}: it is not empty and holds no {output.marker}, so it is not an earlier output"
        )
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not any(fnmatch(name, pattern) for pattern in output.files):
            raise InputError(f"will not replace {target}: beside an earlier output it holds {name}; move it away")
    for path in map(_real, reads):
        if path.is_relative_to(_real(target)):
            raise InputError(f"will not replace {target}: this run reads {path} there")


def begin(target: Path, output: Output, reads: Iterable[str | os.PathLike] = ()) -> Path:
    """Create and return an empty hidden directory beside `target`, or beside what it links to.

    Raises:
        InputError: `target` cannot be written, or `check` refuses it.
    """
    check(target, output, reads)
    with write_errors(target):
        target = _real(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial = target.parent / f"{_prefix(target)}{os.getpid()}"
        partial.mkdir()
    return partial


def commit(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an earlier `target` is moved aside first, and put back should the rename fail."""
    previous = None
    with write_errors(target):
        target = _real(target)
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
def directory(target: Path, output: Output, reads: Iterable[str | os.PathLike] = ()) -> Iterator[Path]:
    """`begin`, then `commit` when the block ends well; the partial directory is removed when it does not."""
    partial = begin(target, output, reads)
    try:
        with write_errors(target):
            yield partial
        commit(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def lock(file: IO, target: Path) -> bool:
    """Lock an open file until it is closed or the process ends; False where the file system has no locks.

    Raises:
        InputError: another process, which is then writing `target`, holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"cannot write {target}: another run is writing it") from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        return False
    return True


def _real(path: str | os.PathLike) -> Path:
    return Path(os.path.realpath(path))


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(target: Path) -> None:
    """Delete partial directories of this host's dead processes; put an output back that a kill left moved aside."""
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
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
