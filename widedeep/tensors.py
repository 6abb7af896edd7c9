"""Files of safetensors, with errors that say what the system said."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from widedeep.errors import InputError


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """`safe_open` of a file. Raises InputError where it cannot be opened."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: of torch, which maps it
            raise InputError(f"{path}: cannot be read: {error}") from error
        yield file


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors on the CPU. Raises OSError."""
    path.touch()  # with the mode that other files get; the library's own is its owner's alone
    mode = path.stat().st_mode
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        path.chmod(mode)
    except SafetensorError as error:  # carries the system's error number in its text only
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO  # without: the system took no more bytes, and named no reason
        raise OSError(number, os.strerror(number), str(path)) from error
