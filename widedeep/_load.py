"""Loads the shared libraries; the one file that touches them. Importing it registers `torch.ops.widedeep.*`."""

import functools
from pathlib import Path

import torch

from widedeep import _C
from widedeep.errors import InputError

CUDA_LIBRARY = Path(__file__).with_name("libwidedeep_cuda.so")


@functools.cache
def build_info() -> dict:
    """What was built: versions, architectures, and what was left out and why."""
    return dict(_C.build_info())


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    return _C.multiplies_bf16()


def bf16_products() -> str:
    """Whose products the hidden layers take in bf16 on this CPU, and why, in words.

    oneDNN's where the CPU multiplies bfloat16, else ours, which cost what float32 does. WIDEDEEP_BF16_PRODUCTS (`own`,
    `library`, `auto`) in the environment overrules that; it is read at every product.

    Raises:
        InputError: the variable holds anything else.
    """
    try:
        products = "oneDNN's products" if _C.library_bf16() else "our own products in float32"
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return f"{products} (this CPU has {'bf16' if cpu_multiplies_bf16() else 'no bf16'} instructions)"


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
