"""The check of a GPU: its stages, what they select, and what it tells whatever ends it."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import gpu_check, harness, stages

ROOT = Path(__file__).resolve().parents[1]


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
    (told,) = stages.Runner(tmp_path / "out", 60).run([stage])
    assert told["result"] == result
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == [told]
    assert (tmp_path / "out" / "a-stage.log").exists()


@pytest.mark.parametrize("numbers", [lambda log: f"{None:.1f}", lambda log: log[log.index("nowhere") :]])
def test_a_log_that_is_not_as_expected_costs_its_numbers_alone(tmp_path, numbers):
    says = "import sys; sys.stdout.buffer.write(b'1 passed \\xff')"
    (told,) = stages.Runner(tmp_path, 60).run([stages.Stage("s", [sys.executable, "-c", says, "pytest"], 30, numbers)])
    assert (told["result"], told["numbers"]) == ("ok", "1 passed \ufffd")


def test_what_a_stage_started_ends_with_it(tmp_path):
    stage = stages.Stage("s", ["sh", "-c", f"sleep 600 & echo $! > {tmp_path / 'pid'}"], 30, str)
    (told,) = stages.Runner(tmp_path / "out", 60).run([stage])
    assert told["result"] == "ok"
    until(lambda: not is_running(int((tmp_path / "pid").read_text())))  # the signal is on its way


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_check_that_is_interrupted_tells_what_it_knows_and_leaves_nothing_running(tmp_path, number):
    program = f"""
import signal
import sys
from bench import gpu_check
from bench.stages import Stage
signal.signal(signal.SIGINT, signal.default_int_handler)  # even where whoever runs the tests ignores it
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
    until(lambda: all(path.exists() and path.read_text().strip() for path in pids))
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
    (told,) = stages.Runner(tmp_path / "out", 60).run([stages.Stage("stage", command, 30, stages.last_line)])
    assert told["result"] == stages.NOT_HERE


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


@pytest.mark.parametrize(("said", "kept"), [("tests/a.py::b PASSED", "1"), ("tests/a.py::b FAILED [1%]", "0")])
def test_gpu_check_keeps_hopper_products_whose_tests_were_only_slow(tmp_path, monkeypatch, said, kept):
    monkeypatch.setenv("WIDEDEEP_SM90", "1")
    slow = stages.Stage(gpu_check.HOPPER_STAGE, ["sh", "-c", f"echo '{said}'; sleep 60"], 0.5, stages.last_line)
    then = stages.Stage("step", ["sh", "-c", "echo $WIDEDEEP_SM90"], 30, stages.last_line)
    monkeypatch.setattr(gpu_check, "stages", lambda: [slow, then])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["result"] for row in rows][:2] == [stages.TIME_IS_UP, "ok"]
    assert rows[1]["numbers"] == kept


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


def test_gpu_check_gives_what_all_else_needs_the_time_it_takes(tmp_path):
    """Cut short at a limit of their own, they would cost the whole check."""
    needed = [stage for stage in gpu_check.stages() if stage.name in (gpu_check.BUILD_STAGE, gpu_check.LOADS_STAGE)]
    runner = stages.Runner(tmp_path, 500)
    limits = []
    runner._result = lambda stage, limit, log, threads: limits.append(limit) or log.touch() or "ok"
    for stage in needed:
        runner.run([stage])
    assert all(limit > 490 for limit in limits)
    assert len(limits) == 2


def test_gpu_check_begins_where_nothing_is_built():
    """As on a machine that has just been given the sources: the first stage builds."""
    program = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("widedeep", "torch"):
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
from bench import gpu_check
print(gpu_check.stages()[0].name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("build\n", "")


def test_gpu_check_says_why_tests_were_skipped():
    log = """..s
SKIPPED [2] tests/test_a.py:18: one GPU only
SKIPPED [1] tests/test_b.py:9: one GPU only
SKIPPED [1] tests/test_b.py:9: jsonargparse is not installed
1 passed, 4 skipped in 1.00s"""
    assert gpu_check.tests(log) == (
        "1 passed, 4 skipped in 1.00s; skipped: one GPU only; skipped: jsonargparse is not installed"
    )


@pytest.mark.parametrize("ends", ["time is up", "failed (-6)"])
def test_gpu_check_names_the_tests_of_a_log_that_is_cut_short(tmp_path, ends):
    """One that hangs, or takes the process with it, costs neither its own name nor those that failed before."""
    last = "import time\n    time.sleep(60)" if ends == "time is up" else "import os\n    os.abort()"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\npytestmark = pytest.mark.cuda\n"
        "def test_right():\n    pass\n@pytest.mark.parametrize('x', ['a b'])\ndef test_wrong(x):\n    assert not x\n"
        f"def test_last():\n    {last}\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers = cuda\n")
    command = [*gpu_check.TESTS, f"--rootdir={tmp_path}", f"--config-file={tmp_path}/pytest.ini", f"{tmp_path}/tests"]
    (told,) = stages.Runner(tmp_path / "out", 60).run([stages.Stage("s", command, 8, gpu_check.tests)])
    assert told["result"] == ends
    assert re.match(r"1 passed, the last begun: \S+test_it.py::test_last\b", told["numbers"])
    assert told["numbers"].endswith("test_it.py::test_wrong[a b]")


def test_gpu_check_asks_for_files_and_options_that_exist():
    for stage in gpu_check.stages():
        paths = [word.removeprefix("--ignore=") for word in stage.command if "tests/" in word]
        assert all((ROOT / path).exists() for path in paths), stage.name
        if {"bench.train", "bench.infer"} & set(stage.command):
            harness.options("").parse_args(stage.command[3:])


@pytest.mark.parametrize("cases", list(gpu_check.SANITIZED))
def test_gpu_check_sanitizes_cases_of_every_file_it_names(cases):
    command = gpu_check.sanitizer("memcheck", cases)
    command = [*command[command.index(gpu_check.PY) :], "--collect-only", "-qq"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for name in gpu_check.SANITIZED[cases][1].split():
        assert f"tests/{name}::" in done.stdout


def test_gpu_check_sanitizes_cases_of_every_family():
    named = {f"tests/{name}" for _, files in gpu_check.SANITIZED.values() for name in files.split()}
    assert {*gpu_check.OPS} - named == set()


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
