"""Finds the installed torch, runs CMake (which holds every flag), and puts the libraries beside the package."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "libwidedeep_cuda.so"
FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


def torch_dir() -> str:
    """The torch package of the target interpreter. `-I` looks past an isolated build's overlay of its own packages."""
    found = os.environ.get("WIDEDEEP_TORCH_DIR")
    if not found:
        found = subprocess.run([sys.executable, "-I", "-c", FIND_TORCH], capture_output=True, text=True).stdout.strip()
    if not found or not Path(found, "include", "torch", "csrc", "stable").is_dir():
        sys.exit(
            "widedeep: no torch >= 2.11 found for this interpreter. Install torch first, "
            "or name its package directory in WIDEDEEP_TORCH_DIR."
        )
    return found


def interpreter() -> str:
    """This interpreter by one name: `python` after `python3` in the compiler commands would compile all CUDA again."""
    name = Path(sys.executable).with_name("python3")
    return str(name) if name.exists() and name.samefile(sys.executable) else sys.executable


def isolated() -> bool:
    """A PEP 517 overlay vanishes after the build, and cached paths into it would poison the next one."""
    return "pip-build-env" in os.environ.get("PYTHONPATH", "") or any("pip-build-env" in p for p in sys.path)


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
        subprocess.check_call(configure + os.environ.get("WIDEDEEP_CMAKE_ARGS", "").split())
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
