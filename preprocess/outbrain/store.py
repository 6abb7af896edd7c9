"""Tables on disk: one .npy file an array, memory-mapped by every worker, so that a table is in memory once."""

import threading
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from preprocess.xp import arrays, release, upload
from widedeep import atomic

T = TypeVar("T")
_MAPPED_FROM = 4096  # bytes
_lock = threading.Lock()


def save(directory: Path, group: str, table: Any) -> None:
    """Writes every field of a dataclass of arrays (and of such dataclasses) as `<group>.<field>.npy`."""
    for field in fields(table):
        value = getattr(table, field.name)
        if isinstance(value, np.ndarray):
            save_array(directory / f"{group}.{field.name}.npy", value)
        else:
            save(directory, f"{group}.{field.name}", value)


def save_array(path: Path, array: np.ndarray) -> None:
    """As `np.save`, whole or not at all: a task may be done twice, when a worker was lost or outlives its run.

    np.save itself does not notice when the disk fails, or has no room, at its last buffer.
    """
    array = np.asarray(array, order="C")
    with atomic.file(path) as partial, open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


def load(directory: Path, group: str, kind: type[T], device: str) -> T:
    """The table as it was saved: memory maps on "cpu", device arrays on "cuda", complete for every stream.

    Kept for the next chunk; threads that ask at the same time get the same one, so a device holds it once.
    """
    with _lock:
        return _load(directory, group, kind, device)  # type: ignore[arg-type]  # every class is hashable


@cache
def _load(directory: Path, group: str, kind: Any, device: str) -> Any:
    values = {}
    with arrays(device) as xp:
        for field in fields(kind):
            path = directory / f"{group}.{field.name}.npy"
            if not path.exists():
                inner: Any = field.type
                values[field.name] = _load(directory, f"{group}.{field.name}", inner, device)
                continue
            # A small file (an empty array cannot be mapped) is read. The plain view drops memmap's slow indexing.
            mode: Literal["r"] | None = "r" if path.stat().st_size > _MAPPED_FROM else None
            array = np.load(path, mmap_mode=mode).view(np.ndarray)
            values[field.name] = array if xp is np else upload(array, xp)
    return kind(**values)


def forget() -> None:
    """Drops what `load` keeps: the tables of another run may have the same paths."""
    with _lock:
        _load.cache_clear()
    release()


def size(directory: Path, besides: Sequence[str]) -> int:
    """Bytes of all arrays in the directory, without those whose names begin with `<besides>-`."""
    left_out = tuple(f"{name}-" for name in besides)
    return sum(path.stat().st_size for path in directory.glob("*.npy") if not path.name.startswith(left_out))
