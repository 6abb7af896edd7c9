"""Loads the shared libraries; the one file that touches them. Importing it registers `torch.ops.widedeep.*`."""

import functools
from pathlib import Path

import torch

from widedeep import _C

CUDA_LIBRARY = Path(__file__).with_name("libwidedeep_cuda.so")


@functools.cache
def build_info() -> dict:
    """What was built: versions, architectures, and what was left out and why."""
    return dict(_C.build_info())


def _load_cuda() -> bool:
    """Loads the CUDA kernels beside a CUDA torch. Its stream symbols live in libtorch_cuda, which a CPU torch lacks.

    Raises:
        OSError: the library exists, torch is a CUDA build, and the two do not fit: reinstall widedeep for this torch.
    """
    if torch.version.cuda is None or not CUDA_LIBRARY.exists():
        return False
    torch.ops.load_library(str(CUDA_LIBRARY))
    return True


has_cuda_kernels = _load_cuda()
