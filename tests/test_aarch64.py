"""The CPU code compiled for Arm and run by an emulator, beside the same code on this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "tests" / "native" / "cpu_probe.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math"]  # as in CMakeLists.txt
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-static", f"-I{ROOT / 'csrc'}"]
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def printed(compile, program, run=()):
    """What the probe prints, with a compiler and its own flags, and what runs the program."""
    subprocess.run([*compile, *FLAGS, *SOURCES, "-o", program], check=True)
    return subprocess.run([*run, program], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return printed(["g++"], tmp_path_factory.mktemp("here") / "probe")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which(CROSS) and EMULATOR), reason=f"needs g++, {CROSS} and qemu-aarch64"
)
@pytest.mark.parametrize("arch", ["armv8-a", "armv9-a"])  # the second has SVE
def test_arm_computes_the_same_bits(arch, here, tmp_path):
    assert "mean square 0\nflushed elsewhere 0\n" in here
    assert printed([CROSS, f"-march={arch}"], tmp_path / "probe", [EMULATOR]) == here
