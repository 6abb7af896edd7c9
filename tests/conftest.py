"""Fixtures of several files of tests: devices, the folder of external check data, a finished run."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import main, train_words

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


@pytest.fixture
def refuse(capfd) -> Callable[..., str]:
    """Runs a command that must fail with a code and one sentence; returns the sentence."""

    def run(words: list, code: int, *said: str) -> str:
        capfd.readouterr()
        assert main(list(map(str, words))) == code
        err = capfd.readouterr().err
        assert err.startswith("widedeep: ")
        assert err.count("\n") == 1, err
        for text in said:
            assert text in err
        return err

    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A data set and a finished run of it, to be copied."""
    from planted import planted_data

    root = tmp_path_factory.mktemp("good")
    planted_data(root / "data", train=700, test=100)
    assert main(list(map(str, train_words(root / "data", root)))) == 0
    return root


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` that do not use the `device` fixture are skipped with the same words."""
    reason = None
    for item in items:
        if item.get_closest_marker("cuda") and "device" not in getattr(item, "fixturenames", ()):
            reason = reason or _cuda_reason() or ""
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
