"""The arrows of docs/architecture.md: who may include or import whom. A failing test names the file and the arrow.
And what else it says of every source file: how an error's message ends.

What is not allowed here fails: a new file, or a new arrow, finds its place here and there first.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

STANDARD = r"(?!torch$)[a-z_]+"
CUDA = r"(cub|thrust)/.+|cu(da|blas).*\.h"
STABLE_TORCH = r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/.+|pybind11/.+"
BINDINGS = rf"core/.+|{STANDARD}|{STABLE_TORCH}|bindings/"
MAY_INCLUDE = {  # files: includes; the first line that fits a file counts
    r"core/.+": r"core/.+|cstdint|cmath",
    r"cpu/.+": rf"core/.+|cpu/.+|{STANDARD}|immintrin\.h|arm_neon\.h|sys/.+",
    r"kernels/.+": rf"core/.+|kernels/.+|{STANDARD}|{CUDA}",
    r"bindings/(.+_cpu|columns|module)\..+": rf"{BINDINGS}(?!.+_cuda|stream).+|cpu/.+",
    r"bindings/(.+_cuda|stream)\..+": rf"{BINDINGS}(?!.+_cpu).+|kernels/.+|{CUDA}",
    r"bindings/.+": rf"{BINDINGS}(?!.+_(cpu|cuda)|stream).+",
}


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*/*")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_native_arrows_point_one_way(source):
    name = source.relative_to(ROOT / "csrc").as_posix()
    allowed = next((includes for files, includes in MAY_INCLUDE.items() if re.fullmatch(files, name)), None)
    assert allowed, "a line in MAY_INCLUDE"
    assert [i for i in INCLUDE.findall(source.read_text()) if not re.fullmatch(allowed, i) or ".." in i] == []


def test_built_libraries_hold_no_symbol_of_the_unstable_interface():
    libraries = list((ROOT / "widedeep").glob("*.so"))
    assert libraries, "the package is not built in place"
    for library in libraries:
        command = ["nm", "-DC", "--undefined-only", library]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\b(?:at|c10)::\w+", names) == [], library.name


LINES = {  # modules and folders of the package. Each may import those that stand before it in its line, and ...
    "files": "errors features feature_spec_parse splitmix shuffle atomic feature_spec shard_manifest shard_part shards",
    "settings": "config schedule affinity devices",
    "ops": "_C _load ops",
    "reference": "reference_order reference",
    "ranks": "dist share",
    "model": "model",
    "optim": "optim",
    "metrics": "metrics_calibration metrics_groups metrics",
    "reader": "readers data",
    "step": "steps step",
    "records": "outputs logs tensors progress checkpoint",
    "restore": "restore",
    "run": "run resume journal evaluate predict predict_rows termination train benchmark",
    "tools": "golden parity export_triton export scoring",
    "pages": "html_page describe describe_page report_checks report_files report_html report_plots report",
    "doctor": "terminal doctor",
    "commands": "commands",
    "cli": "cli __main__",
    "public": "__init__",
    "testing": "testing",
    "preprocess": "preprocess",
}
MAY_IMPORT = {  # ... what is named here: lines, or single modules of them
    "settings": "errors",
    "ops": "errors",
    "ranks": "errors devices",
    "model": "files ops ranks",
    "optim": "ops",
    "metrics": "errors ops",
    "reader": "files settings ops",
    "step": "files settings ops reference ranks model reader",
    "records": "files ranks",
    "restore": "files settings model records",
    "run": "files settings ranks model metrics reader step records",
    "tools": "files settings ranks model metrics reader step records restore",
    "pages": "files records",
    "doctor": "_load",
    "commands": "files settings records run tools pages doctor preprocess",
    "cli": "errors feature_spec commands doctor",
    "public": "files model optim reader step restore",
    "preprocess": "errors splitmix atomic feature_spec shards",
}
PLACE = {module: line for line, modules in LINES.items() for module in modules.split()}


def imports(source: Path) -> set[str]:
    """Every name that a Python file imports, at any depth of it: `from a import b` is a.b, but `import a.b` binds a."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(name: str) -> str:
    """The word of LINES for an imported name: `ops` for `widedeep.ops.linear.transpose_out`.

    The package itself has none: through it every public name can be reached.
    """
    return (name.removeprefix("widedeep.") + ".").split(".")[0]


@pytest.mark.parametrize("source", sources("widedeep", "preprocess"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_arrows_point_one_way(source):
    me = module_of(".".join(source.relative_to(ROOT).with_suffix("").parts))
    assert me in PLACE, "a place in LINES"
    line = LINES[PLACE[me]].split()
    allowed = {me, "__version__", *line[: line.index(me)]}
    for word in MAY_IMPORT.get(PLACE[me], "").split():
        allowed |= set(LINES[word].split()) if word in LINES else {word}
    ours = {name for name in imports(source) if name.split(".")[0] in ("widedeep", "preprocess", "tests", "bench")}
    assert {name for name in ours if module_of(name) not in allowed} == set()


def test_libraries_stay_where_they_belong():
    """Only the command line reads jsonargparse's flags; preprocessing loads neither torch nor pandas."""

    def users(*libraries):
        return {p for p in sources("widedeep", "preprocess") if {n.split(".")[0] for n in imports(p)} & {*libraries}}

    assert users("jsonargparse") == {ROOT / "widedeep/cli.py"}
    assert users("torch", "pandas") & {*sources("preprocess")} == set()


def test_messages_of_errors_end_without_a_period():
    raised = [
        (source.relative_to(ROOT).as_posix(), text)
        for source in sources("widedeep", "preprocess", "bench")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for text in node.exc.args
    ]
    assert [f"{name}:{text.lineno}" for name, text in raised if re.search(r"""\.['"]+$""", ast.unparse(text))] == []


@pytest.mark.parametrize("name", ["shards", "shuffle", "splitmix", "feature_spec", "features", "atomic", "errors"])
def test_modules_that_preprocessing_uses_do_not_load_torch(name):
    code = f"import sys, widedeep.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
