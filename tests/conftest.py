"""Fixtures shared by every test: devices, and the folder of external check data beside the checkout."""

import os
import sys
from pathlib import Path

import pytest

# Before torch is loaded: several processes share the cores, and a thread of theirs that waits must not spin on one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A pytest that a test starts is not one of the processes that share this run, as pytest-benchmark would think.
os.environ.pop("PYTEST_XDIST_WORKER", None)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure():
    try:
        import widedeep._load  # noqa: F401
    except (ImportError, OSError) as error:
        pytest.exit(f"widedeep is not built for {sys.executable}: `make build` builds it ({error})", returncode=3)


def _cuda_reason() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    from widedeep._load import has_cuda_kernels

    return None if has_cuda_kernels else "the CUDA kernels are not built"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    """`cpu` always; `cuda` where there is a GPU and the kernels are built."""
    if request.param == "cuda" and (reason := _cuda_reason()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["double", pytest.param("cuda", marks=pytest.mark.cuda)])
def cupy(request, monkeypatch):
    """What device "cuda" of preprocessing computes with: `strict_cupy` always; the real one where there is a GPU."""
    from preprocess.outbrain import store

    if request.param == "double":
        import strict_cupy as module

        monkeypatch.setitem(sys.modules, "cupy", module)
    else:
        module = pytest.importorskip("cupy")
    store.forget()
    yield module
    store.forget()


@pytest.fixture
def shared() -> Path:
    """The folder of external check data (golden numbers, real rows) beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip("the folder of external check data is not beside this checkout")
    return SHARED


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` that do not use the `device` fixture are skipped with the same words."""
    reason = None
    for item in items:
        if item.get_closest_marker("cuda") and "device" not in getattr(item, "fixturenames", ()):
            reason = reason or _cuda_reason() or ""
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
