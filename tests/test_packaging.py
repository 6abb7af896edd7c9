"""What is packed, what a build asks for and which torch it finds, and the names that type checkers see."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import widedeep

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def setup(monkeypatch) -> SimpleNamespace:
    """What setup.py defines, without running a build."""
    setuptools = pytest.importorskip("setuptools", reason="a build needs setuptools, which is not installed")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.delenv("WIDEDEEP_TORCH_DIR", raising=False)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def torch_package(place: Path, version: str) -> Path:
    (place / "include" / "torch" / "csrc").mkdir(parents=True)
    (place / "version.py").write_text(f"__all__ = ['__version__']\n__version__ = '{version}'\ndebug = False\n")
    return place


def test_a_build_with_and_without_isolation_asks_for_the_same():
    assert PROJECT["dependency-groups"]["build"] == PROJECT["build-system"]["requires"]


def test_setup_asks_for_the_torch_that_the_package_asks_for(setup):
    assert f"torch>={setup.MIN_TORCH}" in PROJECT["project"]["dependencies"]


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0+cpu", "3.0.0", "2.12.0a0+git1234567"])
def test_setup_takes_the_torch_that_is_named(setup, tmp_path, monkeypatch, version):
    monkeypatch.setenv("WIDEDEEP_TORCH_DIR", str(torch_package(tmp_path / "torch", version)))
    assert setup.torch_dir() == str(tmp_path / "torch")


def test_setup_refuses_an_old_torch_and_what_is_none(setup, tmp_path, monkeypatch):
    old = torch_package(tmp_path / "old", "2.9.1+cu128")
    for place, said in (
        (old, r"old holds torch 2\.9\.1\+cu128, expected 2\.11 or later"),
        (tmp_path, "expected a torch package"),
    ):
        monkeypatch.setenv("WIDEDEEP_TORCH_DIR", str(place))
        with pytest.raises(SystemExit, match=f"{said}.*WIDEDEEP_TORCH_DIR"):
            setup.torch_dir()


@pytest.mark.parametrize("prefix", ["/tmp/build-env-abc", "/root/.cache/uv/builds-v0/.tmpabc"])
def test_setup_looks_past_the_interpreter_of_a_front_end(setup, tmp_path, monkeypatch, prefix):
    """`python -m build` and uv build in an environment of their own; the asking one is on PATH at most."""
    package = torch_package(tmp_path / "torch", "2.13.0")
    for name, says in (("none", ""), ("asking", package)):
        (tmp_path / name).mkdir()
        python = tmp_path / name / "python3"
        python.write_text(f"#!/bin/sh\necho {says}\n")
        python.chmod(0o755)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'none'}:{tmp_path / 'nowhere'}:{tmp_path / 'asking'}")
    assert setup.interpreters() == [sys.executable]  # the target's own, where pip builds
    assert not setup.isolated()
    monkeypatch.setattr(sys, "prefix", prefix)
    assert setup.isolated()
    assert setup.torch_dir() == str(package)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"no torch found for .*, expected 2\.11 or later\. .*WIDEDEEP_TORCH_DIR"):
        setup.torch_dir()


PACKED = """
import sys, setuptools.build_meta
print(setuptools.build_meta.build_sdist(sys.argv[1]))
"""
FOLDERS = ("bench", "cmake", "csrc", "docs", "preprocess", "tests", "widedeep")


def test_an_sdist_can_be_built_tested_and_linted(tmp_path):
    pytest.importorskip("setuptools", reason="an sdist needs setuptools, which is not installed")
    source = tmp_path / "source"  # a copy: setuptools writes beside setup.py, and packs what an earlier run has listed
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in [*(p for p in ROOT.glob("[!.]*") if p.is_file()), ROOT / ".clang-format"]:
        shutil.copy(path, source)
    (source / "widedeep" / "_C.so").touch()
    (source / "tests" / "__pycache__").mkdir()
    (source / "tests" / "__pycache__" / "conftest.cpython-311.pyc").touch()
    done = subprocess.run([sys.executable, "-c", PACKED, tmp_path], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    there = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    wanted = {"CMakeLists.txt", "csrc/bindings/schema.cpp", "tests/conftest.py", "widedeep/specs/outbrain.yaml"}
    assert wanted <= packed
    assert {f for f in there if not re.search(r"\.(so|pyc)$|\.egg-info/", f)} - packed == set()
    assert [name for name in packed if re.search(r"\.(so|pyc)$|(^|/)__pycache__", name)] == []


def test_type_checkers_see_the_names_that_are_there():
    """Those that the package resolves when they are used, from the modules where it looks for them."""
    tree = ast.parse(Path(widedeep.__file__).read_text())
    (checked,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert seen == {name: f"widedeep.{module}" for name, module in widedeep._LAZY.items()}
    assert sorted(widedeep.__all__) == sorted(["__version__", *widedeep._LAZY])
    for name in widedeep._LAZY:
        assert getattr(widedeep, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'WideDepp'"):
        widedeep.WideDepp  # noqa: B018
