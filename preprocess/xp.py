"""The array module: numpy on a CPU, cupy on a GPU. Chunk functions run inside `arrays` and import neither.

Rules on a GPU, which let one worker thread never wait for another: a thread queues its work on a stream of its own,
where cupy's memory pool gives and takes memory in the order of that stream; arrays of a chunk stay in their thread,
and what leaves it is numpy; only tables are shared, and `outbrain.store` waits for their upload before it gives them
out.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from preprocess import kernels
from widedeep.errors import InputError

DEVICES = ("cpu", "cuda")
_ALIGNMENT = 64  # bytes, of each array in the block that `to_host_all` fills
_threads = threading.local()
_on_devices: set[ModuleType] = set()  # the modules that `arrays` has given out, without numpy


def array_module(device: str) -> ModuleType:
    """numpy for "cpu", cupy for "cuda".

    Raises:
        InputError: an unknown device, or "cuda" without cupy or without a GPU.
    """
    if device not in DEVICES:
        raise InputError(f"device {device!r}: expected one of {', '.join(DEVICES)}")
    if device == "cpu":
        return np
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise InputError("device 'cuda' needs cupy: pip install 'widedeep[gpu]', or take device 'cpu'") from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InputError(f"device 'cuda': expected a GPU, found none ({error}); take device 'cpu'") from error
    return cupy


@contextlib.contextmanager
def arrays(device: str) -> Iterator[ModuleType]:
    """`array_module(device)` for the length of a block, on a GPU with this thread's own stream as the current one."""
    xp = array_module(device)
    if xp is np:
        yield xp
        return
    _on_devices.add(xp)
    streams = _threads.__dict__.setdefault("streams", {})
    if xp not in streams:
        streams[xp] = xp.cuda.Stream(non_blocking=True)
    with streams[xp]:
        yield xp


def take(column: Any, row: Any, xp: ModuleType = np) -> Any:
    """column [size] or [size, width], row [n] as `Lookup.find` gives it -> [n] or [n, width]; row -1 is the last one,
    the null."""
    # np.take needs a third of the time of column[row].
    return np.take(column, row, axis=0) if xp is np else kernels.take(column, row, xp)


def to_host_all(columns: Mapping[Any, Any], xp: ModuleType) -> dict[Any, Any]:
    """The same values as numpy arrays. From a GPU with one wait for it: they share a block of pinned memory, which goes
    back to its pool when the last of them is dropped."""
    if xp is np:
        return dict(columns)
    starts, total = [], 0
    for array in columns.values():
        starts.append(total)
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = np.frombuffer(xp.cuda.alloc_pinned_memory(max(total, 1)), np.uint8)
    host = {}
    for (name, array), start in zip(columns.items(), starts):
        host[name] = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        if array.size:
            array.get(out=host[name], blocking=False)
    xp.cuda.get_current_stream().synchronize()
    return host


def upload(array: np.ndarray, xp: ModuleType) -> Any:
    """A copy on the device, complete when this returns. Without `asarray`'s pinned copy, which its pool would keep."""
    out = xp.empty(array.shape, array.dtype)
    if array.size:
        out.set(array)
    xp.cuda.get_current_stream().synchronize()
    return out


def release() -> None:
    """Gives back the memory that cupy keeps for later arrays, on the device and pinned."""
    for xp in _on_devices:
        xp.get_default_memory_pool().free_all_blocks()
        xp.get_default_pinned_memory_pool().free_all_blocks()
