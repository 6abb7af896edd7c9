"""Files and directories that appear whole or not at all.

A run writes into a hidden one beside its target and renames it at the end, so whatever stops the run leaves the
previous output as it was.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, NamedTuple

from widedeep.errors import DISK_FULL, InputError, RunError

PREVIOUS = "-previous"  # ends the name of an output that is moved aside for its successor
# What follows the host in a hidden name. One host may be called as the beginning of another: node and node-12.
OURS = re.compile(rf"(?P<pid>\d+)(?P<suffix>|{PREVIOUS}|-[0-9a-f]{{8}})")
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # EPERM: containers that filter system calls
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux

_libc = ctypes.CDLL(None, use_errno=True)
_unfinished: set[Path] = set()  # files that this process is writing


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
        if error.errno in DISK_FULL:
            raise RunError(f"cannot write {target}: {_why(error)}; {kept}") from error
        raise InputError(f"cannot write {target}: {_why(error)}") from error


def _why(error: OSError) -> str:
    """In the system's words: pyarrow's own account names the temporary file."""
    return os.strerror(error.errno) if error.errno else error.strerror or str(error)


@contextlib.contextmanager
def file(target: Path) -> Iterator[Path]:
    """Gives the path of a file to write, beside `target` or what it links to, and renames it when the block ends well;
    else removes it.

    Makes the target's directory. No two blocks get the same path, so one file may be written twice at a time. Errors
    are left to the caller's `write_errors`, who knows what was asked for.

    Raises:
        InputError: `target` is a device or a pipe, in whose place a file would come.
    """
    asked, target = target, _real(target)
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(f"cannot write {asked}: it is there, and no regular file")
    partial = target.with_name(f"{_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    _unfinished.add(partial)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        yield partial
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):  # it must not hide what went wrong before
            partial.unlink()
        _unfinished.discard(partial)


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


def begin(target: Path, output: Output, reads: Iterable[str | os.PathLike] = (), asked: Path | None = None) -> Path:
    """Create and return an empty hidden directory beside `target`, or beside what it links to.

    asked: what messages name, where that is not `target`.

    Raises:
        InputError: `target` cannot be written, or `check` refuses it.
    """
    check(target, output, reads)
    with write_errors(asked or target):
        target = _real(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial = target.parent / f"{_prefix(target)}{os.getpid()}"
        partial.mkdir()
    return partial


def commit(partial: Path, target: Path, asked: Path | None = None) -> None:
    """Rename `partial` to `target` in place of an earlier one, which is removed. Where the two cannot be exchanged at
    once, the earlier one is moved aside first, and put back should the rename fail.

    asked: what messages name, where that is not `target`.

    Raises:
        InputError: it cannot be renamed.
        RunError: the disk fails, or the earlier one could not be put back: names where it is.
    """
    asked, target = asked or target, _real(target)
    previous = partial.with_name(f"{partial.name}{PREVIOUS}")
    with write_errors(asked):
        try:
            replaces = target.exists()
            exchanged = replaces and _exchange(partial, target)
            if not exchanged:
                if replaces:
                    target.rename(previous)
                partial.rename(target)
        except BaseException as error:
            _put_back(previous, target, asked, error)
            raise
    if replaces:
        shutil.rmtree(partial if exchanged else previous, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Give each of two directories the other's name, so that a kill finds both; False where the system cannot."""
    rename = getattr(_libc, "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _put_back(previous: Path, target: Path, asked: Path, error: BaseException) -> None:
    """After an error or Ctrl-C."""
    try:
        if previous.exists() and not target.exists():
            previous.rename(target)
    except OSError:
        why = _why(error) if isinstance(error, OSError) else "interrupted"
        raise RunError(f"cannot write {asked}: {why}; what was there before is now {previous}") from error


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


def check_name(path: str | os.PathLike) -> None:
    """Raises InputError where a path is no text, for libraries that open no such file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: expected a path in UTF-8") from error


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
    """Delete what this host's dead processes left unfinished; put an output back that a kill left moved aside."""
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        found = OURS.fullmatch(path.name.removeprefix(_prefix(target)))
        if not found or (int(found["pid"]) != os.getpid() and _is_running(int(found["pid"]))):
            continue
        if found["suffix"] == PREVIOUS and not target.exists():
            with contextlib.suppress(FileNotFoundError):  # another run has just put it back
                path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path not in _unfinished:
            with contextlib.suppress(OSError):  # as above: what may not be removed is no reason not to write
                path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
