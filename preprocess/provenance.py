"""What tells data sets apart whose ids and numbers mean different things."""

from pathlib import Path

import numpy as np
import xxhash


def statistics_digest(directory: Path) -> str:
    """xxh3-64 of what a directory of statistics holds, hexadecimal: equal where ids and numbers mean the same.

    Args:
        directory: of JSON files and of .npz archives, whose arrays count, not how they are packed.
    """
    digest = xxhash.xxh3_64()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode())
        if path.suffix != ".npz":
            digest.update(path.read_bytes())
            continue
        with np.load(path) as arrays:
            for name in sorted(arrays.files):
                array = arrays[name]
                digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
