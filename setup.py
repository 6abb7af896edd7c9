"""Finds the installed torch, runs CMake (which holds every flag), and puts the libraries beside the package."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "libwidedeep_cuda.so"
MIN_TORCH = "2.11"
# For an interpreter of this very kind alone: its environment is the one that asked for the build.
FIND_TORCH = (
    f"import sys, importlib.util as u; s = sys.implementation.cache_tag == {sys.implementation.cache_tag!r} "
    "and u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
)
OVERLAYS = ("build-env-", "builds-v0")  # in the paths of isolated builds: of pip, `python -m build` and pdm; of uv
HINT = (
    "Install torch first, or set WIDEDEEP_TORCH_DIR to its package directory, "
    "which `python -c 'import torch; print(torch.__path__[0])'` prints."
)


def torch_dir() -> str:
    """The torch package to compile against: the named one, else that of the first interpreter that has one."""
    named = os.environ.get("WIDEDEEP_TORCH_DIR")
    found = named or next(filter(None, map(torch_of, interpreters())), None)
    if not found:
        sys.exit(f"widedeep: no torch found for {sys.executable}, expected {MIN_TORCH} or later. {HINT}")
    try:
        text = Path(found, "version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    version = re.search(r"^__version__ = ['\"](\d[^'\"]*)", text, re.MULTILINE)
    if not version or not Path(found, "include", "torch", "csrc").is_dir():
        sys.exit(f"widedeep: expected a torch package with version.py and include/ in {found}. {HINT}")
    if numbers(version[1]) < numbers(MIN_TORCH):
        sys.exit(f"widedeep: {found} holds torch {version[1]}, expected {MIN_TORCH} or later. {HINT}")
    return found


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def interpreters() -> list[str]:
    """Where to look for torch. Some front ends build with an interpreter of their own, and name the asking one at most
    by VIRTUAL_ENV and on PATH."""
    if not any(name in sys.prefix for name in OVERLAYS):
        return [sys.executable]
    places = [Path(os.environ.get("VIRTUAL_ENV", sys.prefix), "bin"), *os.environ.get("PATH", "").split(os.pathsep)]
    found = (shutil.which(name, path=str(place)) for place in places for name in ("python3", "python"))
    return list(dict.fromkeys(filter(None, found)))


def torch_of(python: str) -> str:
    """Its torch package, "" if there is none. `-I` looks past an isolated build's overlay of its own packages."""
    return subprocess.run([python, "-I", "-c", FIND_TORCH], capture_output=True, text=True).stdout.strip()


def interpreter() -> str:
    """This interpreter by one name: `python` after `python3` in the compiler commands would compile all CUDA again."""
    name = Path(sys.executable).with_name("python3")
    return str(name) if name.exists() and name.samefile(sys.executable) else sys.executable


def isolated() -> bool:
    """A PEP 517 overlay vanishes after the build, and cached paths into it would poison the next one."""
    return any(
        name in place for name in OVERLAYS for place in (sys.prefix, os.environ.get("PYTHONPATH", ""), *sys.path)
    )


class CMakeBuild(build_ext):
    def run(self):
        # setuptools hides `inplace` while it builds, and afterwards copies `_C` alone into the source tree.
        self.into_source = self.inplace or self.editable_mode
        super().run()

    def build_extension(self, ext):
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = ROOT / "build" / (f"{tag}-isolated" if isolated() else tag)
        if isolated():
            shutil.rmtree(build, ignore_errors=True)
        torch = torch_dir()
        if not isolated() and f"={torch}\n" not in (
            cache.read_text() if (cache := build / "CMakeCache.txt").exists() else ""
        ):
            shutil.rmtree(build, ignore_errors=True)  # another torch: nothing in the cache can be trusted
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DWIDEDEEP_TORCH_DIR={torch}"]
        configure += [f"-DPython_EXECUTABLE={interpreter()}", f"-DWIDEDEEP_VERSION={self.distribution.get_version()}"]
        # cmake and ninja beside this interpreter go before the system's, which may be too old for its nvcc.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        subprocess.check_call(configure + shlex.split(os.environ.get("WIDEDEEP_CMAKE_ARGS", "")))
        subprocess.check_call(
            ["cmake", "--build", str(build), "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count()))]
        )
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        staging = build / "install"
        shutil.rmtree(staging, ignore_errors=True)
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(staging)])
        for place in {target, ROOT / "widedeep"} if self.into_source else {target}:
            place.mkdir(parents=True, exist_ok=True)
            if not (staging / CUDA_LIBRARY).exists():  # one of an earlier build would be loaded
                (place / CUDA_LIBRARY).unlink(missing_ok=True)
            for library in staging.iterdir():  # copied aside, then renamed: a running process keeps its mapping
                shutil.copy2(library, place / f".{library.name}")
                os.replace(place / f".{library.name}", place / library.name)


setup(ext_modules=[Extension("widedeep._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
