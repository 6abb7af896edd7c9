"""Prints registers and spills of every kernel of this interpreter's last build, and fails when one of ours spills.

Other folders of builds, those of other interpreters or older, are not looked at, nor reports without their object.
"""

import re
import subprocess
import sys
from pathlib import Path

LIBRARY = "libwidedeep_cuda.so"
COMPILED = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


def kernels(report: str):
    """Yields (mangled name, architecture, registers, spill bytes) in the order of the report."""
    name = arch = None
    spill = 0
    for line in report.splitlines():
        if found := COMPILED.search(line):
            name, arch, spill = found[1], found[2], 0
        elif found := FRAME.search(line):
            spill = int(found[2]) + int(found[3])
        elif (found := USED.search(line)) and name:
            yield name, arch, int(found[1]), spill
            name = None


def last_build(builds: Path) -> Path | None:
    """The folder that setup.py installed from last, isolated or not."""
    installed = list(builds.glob(f"{sys.implementation.cache_tag}-*/install"))
    return max(installed, key=lambda place: place.stat().st_mtime_ns).parent if installed else None


def main(builds: Path) -> int:
    build = last_build(builds)
    reports = sorted(build.rglob("*.ptxas.txt")) if build and (build / "install" / LIBRARY).exists() else []
    there = [report for report in reports if Path(f"{str(report).removesuffix('.ptxas.txt')}.o").exists()]
    rows = [row for report in there for row in kernels(report.read_text())]
    if not rows:
        print(f"no ptxas reports of {build or f'a build under {builds}'}: build with nvcc first", file=sys.stderr)
        return 1
    names = "\n".join(row[0] for row in rows)
    plain = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True).stdout.splitlines()
    spilled = 0
    for (_, arch, registers, spill), name in zip(rows, plain, strict=True):
        spilled += spill > 0 and not name.removeprefix("void ").startswith("cub::")  # CUB tunes its own kernels
        print(f"{arch:8} {registers:4} registers {spill:6} spill bytes  {name}")
    print(f"{len(rows)} kernels, {spilled} with spills")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build")))
