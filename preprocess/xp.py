"""The array module: numpy on a CPU, cupy on a GPU. Chunk functions take it as an argument and never import either."""

from types import ModuleType
from typing import Any

import numpy as np

from widedeep.errors import InputError

DEVICES = ("cpu", "cuda")


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
        raise InputError("device 'cuda' needs cupy: pip install widedeep[gpu], or take device 'cpu'") from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InputError(f"device 'cuda': expected a GPU, found none ({error}); take device 'cpu'") from error
    return cupy


def to_host(array: Any) -> np.ndarray:
    """The same values as a numpy array; a copy only where they lie on a GPU."""
    return array if isinstance(array, np.ndarray) else array.get()
