"""Loads the shared libraries; the one file that touches them. Importing it registers `torch.ops.widedeep.*`."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from widedeep import _C  # type: ignore[attr-defined]  # compiled
from widedeep.errors import InputError

CUDA_LIBRARY = Path(__file__).with_name("libwidedeep_cuda.so")


@functools.cache
def build_info() -> dict:
    """What was built: versions, architectures, and what was left out and why."""
    return _C.build_info()


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    return _C.multiplies_bf16()


def library_bf16() -> bool:
    """Whether they are oneDNN's, whose order of sums follows the number of threads; see `bf16_products`."""
    try:
        return _C.library_bf16()
    except RuntimeError as error:
        raise InputError(str(error)) from None


def bf16_products() -> str:
    """Whose products the hidden layers take in bf16 on this CPU, and why, in words.

    oneDNN's where the CPU multiplies bfloat16, else ours, which cost what float32 does. WIDEDEEP_BF16_PRODUCTS (`own`,
    `library`, `auto`) in the environment overrules that; it is read at every product.

    Raises:
        InputError: the variable holds anything else.
    """
    products = "oneDNN's products" if library_bf16() else "our own products in float32"
    return f"{products} (this CPU has {'bf16' if cpu_multiplies_bf16() else 'no bf16'} instructions)"


def epoch_rows(
    rows: int, block_rows: int, window_rows: int, seed: int, epoch: int, start: int, out: np.ndarray
) -> None:
    """Write the rows at positions start, ... of an epoch's order into `out`, int64 [n]; twin of `EpochOrder.rows_at`.

    Raises:
        IndexError: positions outside [0, rows).
    """
    _C.epoch_rows(rows, block_rows, window_rows, seed, epoch, start, out)


def assemble_rows(
    tables: Sequence[Sequence[np.ndarray]],
    numerics: Sequence[Sequence[np.ndarray]],
    label: Sequence[np.ndarray],
    group: Sequence[np.ndarray] | None,
    ends: Sequence[int],
    rows: np.ndarray,
    slots: np.ndarray | None,
    out: Sequence[np.ndarray | None],
) -> None:
    """Write rows of stored columns into the matrices of a batch. Other threads run meanwhile.

    Args:
        tables, numerics, label, group: columns as `ShardSet.column` gives them, a piece for each part.
        ends: number of rows up to the end of each part.
        rows: [n] int64. In ascending order they are read fastest.
        slots: [n] int64, the row of the matrices that each goes to; None: in order.
        out: ids [n, K] int32 (-1 = padding), numeric [n, N] float32, label [n] float32, group [n] int64 or None.
    Raises:
        IndexError: a row that is not there, or a slot.
        ValueError: an array of another type or shape.
    """
    _C.assemble_rows(tables, numerics, label, group, ends, rows, slots, *out)


def _load_cuda() -> bool:
    """Loads the CUDA kernels beside a CUDA torch. Its stream symbols live in libtorch_cuda, which a CPU torch lacks.

    Raises:
        OSError: the library exists, torch is a CUDA build, and the two do not fit, as after a build beside a CPU torch.
    """
    if torch.version.cuda is None or not CUDA_LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        raise OSError(
            f"{CUDA_LIBRARY} does not load beside torch {torch.__version__} ({error.__cause__ or error}): "
            "install widedeep again for this torch"
        ) from error
    return True


has_cuda_kernels = _load_cuda()
