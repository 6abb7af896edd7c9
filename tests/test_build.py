"""What the build says of itself, and the tools around it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def test_build_info_names_what_was_built():
    from widedeep._load import build_info

    info = build_info()
    assert info["version"]
    assert info["compiler"].split()[0] in {"GNU", "Clang", "AppleClang"}
    assert bool(info["cuda_archs"]) != bool(info["cuda_note"]), "either architectures, or the reason why there are none"


ONLY_ON_GPUS = {"allow_tf32_", "linear_sm90_out", "linear_sm90_dgrad_out"}


def test_every_op_has_its_kernels_and_a_fake():
    """The CUDA ones by their source, for what is not loaded beside a CPU build of torch."""
    import widedeep.ops  # noqa: F401  registers the fakes
    from widedeep._load import has_cuda_kernels

    bindings = "".join(path.read_text() for path in (ROOT / "csrc" / "bindings").glob("*_cuda.cpp"))
    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("widedeep::")}
    assert {f"widedeep::{name}" for name in ONLY_ON_GPUS} < ops
    keys = {"Meta": ops, "CPU": ops - {f"widedeep::{name}" for name in ONLY_ON_GPUS}}
    if has_cuda_kernels:
        keys["CUDA"] = ops
    for key, expected in keys.items():
        there = {name for name in ops if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}
        assert expected - there == set(), key
    assert {f"widedeep::{name}" for name in re.findall(r'm\.impl\("(\w+)"', bindings)} == ops


def test_doctor_prints_one_json_object():
    done = subprocess.run(
        [sys.executable, "-m", "widedeep", "doctor", "--json"], capture_output=True, text=True, cwd=ROOT
    )
    facts = json.loads(done.stdout)
    assert facts["required"]["torch"]
    assert "error" not in facts["build"]
    assert facts["healthy"] is all(facts["required"].values())
    assert done.returncode == (not facts["healthy"]), done.stderr


def test_doctor_answers_where_the_command_line_cannot():
    script = (
        "import sys; sys.modules |= dict.fromkeys(('jsonargparse', 'rich', 'yaml'))\n"
        "from widedeep.__main__ import main; sys.exit(main())"
    )
    for words, said in ((["doctor"], "packages"), (["train", "--help"], "widedeep doctor")):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_doctor_tells_what_to_do_about_a_gpu_without_kernels():
    from widedeep import doctor

    facts = {
        "required": {"torch": "2.13.0", "rich": None},
        "optional": dict.fromkeys(doctor.OPTIONAL, "1"),
        "devices": [{"name": "some GPU", "capability": "7.0", "memory_gib": 16.0}],
        "cuda_kernels": False,
        "build": {"cuda_archs": "", "cuda_note": "nvcc not found", "cublaslt": False},
    }
    advice = " ".join(doctor._advice(facts))
    assert "pip install rich" in advice
    assert "nvcc not found" in advice
    facts |= {"cuda_kernels": True, "build": {"cuda_archs": "80-real,90a-real", "cuda_note": "", "cublaslt": False}}
    advice = " ".join(doctor._advice(facts))
    assert "below every architecture" in advice
    assert "cuBLASLt" in advice
    assert "cupy" not in advice
    for archs in ("native", "all-major", "120f-real,50"):
        assert "below every" not in " ".join(doctor._advice(facts | {"build": facts["build"] | {"cuda_archs": archs}}))
    without = facts | {"optional": facts["optional"] | dict.fromkeys(doctor.FOR_GPUS)}
    assert "nvidia-ml-py is not installed, which CPU cores near each GPU" in " ".join(doctor._advice(without))
    assert "nvidia-ml-py" not in " ".join(doctor._advice(without | {"devices": []}))
    assert "cannot use it (no libnvrtc.so.13)" in " ".join(doctor._advice(facts | {"cupy_fault": "no libnvrtc.so.13"}))


def test_doctor_tries_cupy(monkeypatch):
    from types import SimpleNamespace

    from widedeep import doctor

    def missing():
        raise RuntimeError("libnvrtc.so.13 is not there\nand more")

    runtime = SimpleNamespace(getDeviceCount=lambda: 1)
    for nvrtc, fault in ((lambda: (13, 0), None), (missing, "libnvrtc.so.13 is not there")):
        cuda = SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=nvrtc))
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
        assert doctor._cupy() == fault


REPORT = """ptxas info    : Compiling entry function '_Z3foov' for 'sm_90a'
ptxas info    : Function properties for _Z3foov
    0 bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def built(folder: Path, spill: int, library: str = "libwidedeep_cuda.so", ago: float = 0) -> None:
    """What a build leaves: the report of a kernel beside its object, and the libraries."""
    (folder / "install").mkdir(parents=True)
    (folder / "install" / library).touch()
    (folder / "foo.cu.o").touch()
    (folder / "foo.cu.ptxas.txt").write_text(REPORT.format(spill=spill))
    os.utime(folder / "install", (time.time() - ago,) * 2)


def ptxas_report(builds: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "cmake/ptxas_report.py", builds], capture_output=True, text=True)


TAG = sys.implementation.cache_tag


@pytest.mark.parametrize("spill", [0, 8])
def test_ptxas_report_fails_on_spills(tmp_path, spill):
    built(tmp_path / f"{TAG}-linux", spill)
    done = ptxas_report(tmp_path)
    assert done.returncode == (spill > 0)
    assert "foo" in done.stdout


def test_ptxas_report_is_of_the_last_build_of_this_interpreter(tmp_path):
    last = tmp_path / f"{TAG}-linux-isolated"
    built(tmp_path / f"{TAG}-linux", 8, ago=60)
    built(tmp_path / "another-linux", 8)
    assert "1 with spills" in ptxas_report(tmp_path).stdout
    built(last, 0)
    (last / "gone.cu.ptxas.txt").write_text(REPORT.format(spill=8))  # its object is not built any more
    done = ptxas_report(tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 kernels, 0 with spills")
    (last / "install" / "libwidedeep_cuda.so").unlink()
    done = ptxas_report(tmp_path)
    assert done.returncode == 1
    assert f"no ptxas reports of {last}" in done.stderr


def test_nvcc_log_fails_when_wgmma_is_serialised(tmp_path):
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho 'ptxas info : (C7510) Potential Performance Loss' >&2\n")
    fake.chmod(0o755)
    command = [sys.executable, ROOT / "cmake/nvcc_log.py", str(fake), "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "C7510" in done.stderr


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_a_compiler_that_links_runtimes_of_its_own_gets_the_shared_ones(tmp_path):
    own = tmp_path / "g++"
    own.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -static-libstdc++ -static-libgcc "$@"\n')
    own.chmod(0o755)
    lists = ["cmake_minimum_required(VERSION 3.20)", "project(probe LANGUAGES CXX)"]
    lists += [
        f"include({ROOT}/cmake/exceptions.cmake)",
        'file(WRITE ${CMAKE_BINARY_DIR}/runtimes "${WIDEDEEP_RUNTIMES}")',
    ]
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lists))
    both = ["libstdc++.so", "libgcc_s.so"]
    for name, compiler in (("plain", "g++"), ("own", str(own))):
        command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / name), f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run([*command, f"-DCMAKE_CXX_COMPILER={compiler}"], check=True, capture_output=True)
        linked = (tmp_path / name / "exceptions.so").read_bytes()  # by this compiler alone: the names stand in it
        missing = both if name == "own" else [runtime for runtime in both if runtime.encode() not in linked]
        named = [Path(path).name for path in (tmp_path / name / "runtimes").read_text().split(";") if path]
        assert [path.split(".so")[0] + ".so" for path in named] == missing


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(("arch", "threads"), [("90a", "384"), ("90", "1")])
def test_no_launch_fits_hopper_products_that_do_nothing(arch, threads, tmp_path):
    """Code for sm_90 runs where that for sm_90a does, but is empty: a launch would leave its outputs as they were."""
    options = ["-std=c++20", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", f"-arch=compute_{arch}", "-ptx"]
    subprocess.run(["nvcc", *options, ROOT / "csrc/kernels/gemm_sm90.cu", "-o", tmp_path / "gemm_sm90.ptx"], check=True)
    bounds = re.findall(r"\.maxntid (\d+)", (tmp_path / "gemm_sm90.ptx").read_text())
    assert bounds == [threads] * 6


def test_hopper_products_can_be_left_out(monkeypatch):
    from widedeep.ops import linear_sm90

    monkeypatch.setattr("widedeep._load.has_cuda_kernels", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for value, there in (("1", True), ("0", False)):
        monkeypatch.setenv("WIDEDEEP_SM90", value)
        assert linear_sm90.available(torch.device("cuda")) is there
