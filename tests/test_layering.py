"""The arrows of docs/architecture.md: who may include or import whom. A failing test names the file and the arrow."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def native_sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / "csrc" / folder).iterdir() if p.is_file())


def includes(source: Path) -> list[str]:
    return INCLUDE.findall(source.read_text())


def imports(source: Path) -> set[str]:
    """Every module that a Python file imports, at any depth of it (`from a import b` counts as a and a.b)."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}:{node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def touches(source: Path, *modules: str) -> set[str]:
    return {name for name in imports(source) if any(name == m or name.startswith(m + ".") for m in modules)}


@pytest.mark.parametrize("source", native_sources("core", "kernels", "cpu"), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_below_the_bindings_includes_torch(source):
    assert [name for name in includes(source) if re.match(r"(torch|ATen|c10|pybind11)/", name)] == []


@pytest.mark.parametrize("source", native_sources("core"), ids=lambda p: p.name)
def test_core_includes_only_itself_and_the_standard_library(source):
    foreign = [name for name in includes(source) if "/" in name and not name.startswith("core/")]
    assert foreign == []
    assert [name for name in includes(source) if name.startswith("cuda")] == []


@pytest.mark.parametrize("source", native_sources("bindings"), ids=lambda p: p.name)
def test_bindings_use_the_stable_abi_alone(source):
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/", "pybind11/")
    torch_headers = [name for name in includes(source) if name.startswith(("torch/", "ATen/", "c10/", "pybind11/"))]
    assert [name for name in torch_headers if not name.startswith(allowed)] == []


def test_built_libraries_hold_no_symbol_of_the_unstable_interface():
    libraries = list((ROOT / "widedeep").glob("*.so"))
    assert libraries, "the package is not built in place"
    for library in libraries:
        command = ["nm", "-DC", "--undefined-only", library]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\b(?:at|c10)::\w+", names) == [], library.name


ARROWS = {
    # folder or file: what it must never import
    "widedeep/ops": ("widedeep.reference", "widedeep.model", "widedeep.step", "widedeep.train", "preprocess"),
    "widedeep/reference.py": ("widedeep.ops", "widedeep._load"),
    "widedeep/model.py": ("widedeep.step", "widedeep.train", "widedeep.data", "preprocess"),
    "widedeep/optim.py": ("widedeep.step", "widedeep.train", "preprocess"),
    "widedeep/metrics.py": ("widedeep.step", "widedeep.train", "preprocess"),
    "widedeep/steps": ("widedeep.step", "widedeep.train", "widedeep.run", "widedeep.cli", "preprocess"),
    "widedeep/step.py": ("widedeep.train", "widedeep.cli", "preprocess"),
    "widedeep/resume.py": ("widedeep.train", "widedeep.journal", "widedeep.cli", "preprocess"),
    "widedeep/train.py": ("widedeep.cli", "preprocess"),
    "widedeep/data.py": ("widedeep.step", "widedeep.train", "widedeep.model", "preprocess"),
    "preprocess": ("torch", "pandas", *(f"widedeep.{name}" for name in ("ops", "model", "train", "data", "cli"))),
    "widedeep": ("tests", "bench"),
}


@pytest.mark.parametrize("place", ARROWS)
def test_python_arrows_point_one_way(place):
    path = ROOT / place
    for source in [path] if path.suffix else sorted(path.rglob("*.py")):
        assert touches(source, *ARROWS[place]) == set(), source.relative_to(ROOT)


@pytest.mark.parametrize("name", ["shards", "shuffle", "splitmix", "feature_spec", "features", "atomic", "errors"])
def test_modules_that_preprocessing_uses_do_not_load_torch(name):
    code = f"import sys, widedeep.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_the_command_line_needs_jsonargparse():
    users = {p.relative_to(ROOT).as_posix() for p in (ROOT / "widedeep").rglob("*.py") if touches(p, "jsonargparse")}
    assert users <= {"widedeep/cli.py"} | {u for u in users if u.startswith("widedeep/commands/")}
