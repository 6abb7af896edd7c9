"""What the build says of itself, and the tools around it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, harness, stages

ROOT = Path(__file__).resolve().parents[1]


def test_build_info_names_what_was_built():
    from widedeep._load import build_info

    info = build_info()
    assert info["version"]
    assert info["compiler"].split()[0] in {"GNU", "Clang", "AppleClang"}
    assert bool(info["cuda_archs"]) != bool(info["cuda_note"]), "either architectures, or the reason why there are none"


ONLY_ON_GPUS = {"allow_tf32_", "linear_sm90_out", "linear_sm90_dgrad_out"}


def test_every_op_has_its_kernels_and_a_fake():
    """The CUDA ones too where torch is a CUDA build, with or without a GPU."""
    import widedeep.ops.linear_sm90  # noqa: F401  registers its fakes
    from widedeep._load import has_cuda_kernels

    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("widedeep::")}
    assert {f"widedeep::{name}" for name in ONLY_ON_GPUS} < ops
    keys = {"Meta": ops, "CPU": ops - {f"widedeep::{name}" for name in ONLY_ON_GPUS}}
    if has_cuda_kernels:
        keys["CUDA"] = ops
    for key, expected in keys.items():
        there = {name for name in ops if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}
        assert expected - there == set(), key


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


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ([sys.executable, "-c", "pass"], "ok"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "failed (3)"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "time is up"),
        ([sys.executable, "-m", "pytest", "--version"], "none ran"),  # as when every test is skipped
        (["no-such-program"], "not there"),
    ],
)
def test_gpu_check_tells_what_became_of_a_stage(tmp_path, command, result):
    stage = stages.Stage("a stage", command, 1 if "sleep" in command[-1] else 30, stages.last_line)
    (told,) = stages.Stages(tmp_path / "out", 60).run([stage])
    assert told["result"] == result
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == [told]
    assert (tmp_path / "out" / "a-stage.log").exists()


@pytest.mark.parametrize("numbers", [lambda log: f"{None:.1f}", lambda log: log[log.index("nowhere") :]])
def test_a_log_that_is_not_as_expected_costs_its_numbers_alone(tmp_path, numbers):
    says = "import sys; sys.stdout.buffer.write(b'1 passed \\xff')"
    (told,) = stages.Stages(tmp_path, 60).run([stages.Stage("s", [sys.executable, "-c", says, "pytest"], 30, numbers)])
    assert (told["result"], told["numbers"]) == ("ok", "1 passed \ufffd")


def test_what_a_stage_started_ends_with_it(tmp_path):
    stage = stages.Stage("s", ["sh", "-c", f"sleep 600 & echo $! > {tmp_path / 'pid'}"], 30, str)
    (told,) = stages.Stages(tmp_path / "out", 60).run([stage])
    assert told["result"] == "ok"
    while is_running(int((tmp_path / "pid").read_text())):  # the signal is on its way
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_check_that_is_interrupted_tells_what_it_knows_and_leaves_nothing_running(tmp_path, number):
    program = f"""
import sys
import time
from bench import gpu_check
from bench.stages import Stage
gpu_check.stages = lambda: [
    Stage("first", [sys.executable, "-c", "print('so far')"], 30, str),
    *(Stage(f"beside {{i}}", ["sh", "-c", "echo $$ > {tmp_path}/$0; exec sleep 600", str(i)], 600, str, True)
      for i in range(2)),
    Stage("last", ["true"], 30, str),
]
sys.argv = ["gpu_check", "--out", {str(tmp_path / "out")!r}]
sys.exit(gpu_check.main())
"""
    check = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [tmp_path / "0", tmp_path / "1"]
    while not all(path.exists() and path.read_text().strip() for path in pids):
        assert check.poll() is None
        time.sleep(0.05)
    check.send_signal(number)
    table, _ = check.communicate(timeout=30)
    assert check.returncode == 130
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["result"] for row in rows] == ["ok", "interrupted", "interrupted"]
    assert "so far" in table
    assert "beside 1" in table
    for path in pids:
        assert not is_running(int(path.read_text()))


def test_gpu_check_runs_only_stages_that_there_are():
    assert [stage.name for stage in gpu_check.chosen(["memcheck", "doctor"])][-1] == "doctor"
    with pytest.raises(SystemExit, match=r"expected first words of build, loads, .*, got memchek"):
        gpu_check.chosen(["memchek"])


def test_make_sanitize_builds_and_loads_what_it_looks_at():
    """Else the library of an earlier build would be looked at."""
    words = re.search(r"bench\.gpu_check .*--only (.*)", (ROOT / "Makefile").read_text())[1].split()
    names = [stage.name for stage in gpu_check.chosen(words)]
    assert names[:2] == [gpu_check.BUILD_STAGE, gpu_check.LOADS_STAGE]
    assert {name.split()[0] for name in names[2:]} == set(gpu_check.TOOLS)


def test_gpu_check_knows_tests_for_another_gpu(tmp_path):
    """By the words with which the tests of Hopper products are skipped."""
    reason = re.search(r'pytest.skip\("(.*)"\)', (ROOT / "tests/test_cuda_linear.py").read_text())[1]
    (tmp_path / "test_other.py").write_text(f"import pytest\ndef test_it():\n    pytest.skip({reason!r})\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", str(tmp_path / "test_other.py")]
    (told,) = stages.Stages(tmp_path / "out", 60).run([stages.Stage("stage", command, 30, stages.last_line)])
    assert told["result"] == stages.NOT_HERE


def test_hopper_products_can_be_left_out(monkeypatch):
    from widedeep.ops import linear_sm90

    monkeypatch.setattr("widedeep._load.has_cuda_kernels", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for value, there in (("1", True), ("0", False)):
        monkeypatch.setenv("WIDEDEEP_SM90", value)
        assert linear_sm90.available(torch.device("cuda")) is there


def test_gpu_check_goes_on_without_hopper_products_that_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDEDEEP_SM90", "1")
    say = "import os; print(os.environ['WIDEDEEP_SM90']); exit(len(os.environ['FAILS']))"
    first = stages.Stage(gpu_check.HOPPER_STAGE, [sys.executable, "-c", say], 30, stages.last_line)
    monkeypatch.setattr(gpu_check, "stages", lambda: [first, first._replace(name="step")])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    for fails, said in (("", ["1", "1"]), ("yes", ["1", "0"])):
        monkeypatch.setenv("FAILS", fails)
        assert gpu_check.main() == bool(fails)
        rows = json.loads((tmp_path / "summary.json").read_text())
        assert [row["numbers"] for row in rows if row["result"] != stages.LEFT_OUT] == said
        assert rows[-1]["stage"] == "racecheck layers"


@pytest.mark.parametrize("fails", [gpu_check.BUILD_STAGE, gpu_check.LOADS_STAGE])
def test_gpu_check_stops_where_the_kernels_are_not_those_of_this_tree(tmp_path, monkeypatch, fails):
    """A library of an earlier build would run as well."""
    monkeypatch.setattr(
        gpu_check,
        "stages",
        lambda: [stages.Stage(name, ["false"], 30, str) for name in (fails, "layers", "training fp16")],
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["result"] for row in rows][:3] == ["failed (1)", "not run", "not run"]


def test_gpu_check_asks_for_files_and_options_that_exist():
    for stage in gpu_check.stages():
        paths = [word.removeprefix("--ignore=") for word in stage.command if "tests/" in word]
        assert all((ROOT / path).exists() for path in paths), stage.name
        if {"bench.train", "bench.infer"} & set(stage.command):
            harness.options("").parse_args(stage.command[3:])


@pytest.mark.parametrize("cases", list(gpu_check.SANITIZED))
def test_gpu_check_sanitizes_cases_of_every_file_it_names(cases):
    command = gpu_check.sanitizer("memcheck", cases)
    command = [*command[command.index(gpu_check.PY) :], "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for name in gpu_check.SANITIZED[cases][1].split():
        assert f"tests/{name}::" in done.stdout


def test_gpu_check_runs_beside_each_other_what_it_does_not_time(tmp_path, monkeypatch):
    """Each of three waits for a file of the next; the one that is timed finds all of them done."""

    def waits(own, other):
        code = f"from pathlib import Path; import time; Path({own!r}).touch()\n"
        return [sys.executable, "-c", code + f"while not Path({other!r}).exists(): time.sleep(0.01)"]

    files = [str(tmp_path / str(i)) for i in range(3)]
    three = [stages.Stage(f"beside {i}", waits(files[i], files[(i + 1) % 3]), 30, str, beside=True) for i in range(3)]
    alone = f"from pathlib import Path; exit(not all(Path(f).exists() for f in {files}))"
    timed = stages.Stage("timed", [sys.executable, "-c", alone], 30, str)
    monkeypatch.setattr(gpu_check, "stages", lambda: [*three, timed])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == 0


def test_gpu_check_says_where_the_sanitizer_found_something():
    log = """..========= Error: Race reported between Read access at f(int)+0x10 in rows.cuh:193
=========     and Write access at g(int)+0x20 in rows.cuh:91 [512 hazards]
=========     and Write access at g(int)+0x30 in rows.cuh:91 [8 hazards]
1 failed, 3 passed in 4.2s
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""
    told = gpu_check.sanitized(log)
    assert told == (
        "1 failed, 3 passed in 4.2s; 1 hazard displayed (1 error, 0 warnings); rows.cuh:91 (2); rows.cuh:193 (1)"
    )
