"""Results on their way from another process: the arrays through a file, so that pipes and schedulers carry few bytes.

The file is written once, mapped by whoever takes the result, and unlinked at that moment: it rarely reaches the disk.
"""

import mmap
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INLINE_BYTES = 1 << 16
_ALIGNMENT = 64


@dataclass(frozen=True)
class Filed:
    """A pickled object without its buffers, which stand in a file at multiples of 64 bytes."""

    pickled: bytes
    path: Path
    sizes: tuple[int, ...]

    def load(self) -> Any:
        """The object; its arrays are pages of the file, private and writable. The file is gone afterwards."""
        with open(self.path, "rb") as file:
            pages = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        self.path.unlink()
        buffers, start = [], 0
        for size in self.sizes:
            buffers.append(pages[start : start + size])
            start += _padded(size)
        return pickle.loads(self.pickled, buffers=buffers)


@dataclass(frozen=True)
class Filing:
    """`function`, with results that are large left in a file of `directory`."""

    function: Callable[[Any], Any]
    directory: Path

    def __call__(self, task: Any) -> Any:
        result = self.function(task)
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        sizes = tuple(data.nbytes for data in raw)
        if sum(sizes) < INLINE_BYTES:
            return result
        self.directory.mkdir(exist_ok=True)
        path = self.directory / uuid.uuid4().hex
        with open(path, "wb") as file:
            for data, size in zip(raw, sizes):
                file.write(data)
                file.write(bytes(_padded(size) - size))
        return Filed(pickled, path, sizes)


def loaded(result: Any) -> Any:
    """What the function of a `Filing` returned."""
    return result.load() if isinstance(result, Filed) else result


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
