"""`make demo` in small: it can be run again, and a command that fails speaks for itself."""

import subprocess
import sys
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).resolve().parents[1]


def demo(out: Path, displays: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.demo", "--out", str(out), "--displays", str(displays)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_second_demo_takes_the_raw_data_of_the_first(tmp_path):
    pytest.importorskip("matplotlib", reason="the report needs matplotlib, which is not installed")
    commands.command_line()
    runs = [demo(tmp_path, 600), demo(tmp_path, 600)]
    for run in runs:
        assert "best reachable" in run.stdout, run.stderr
        assert run.returncode in (0, 1)  # 1: of so few rows the model learns little
    assert ["widedeep synth" in run.stdout for run in runs] == [True, False]
    scores = [[line for line in run.stdout.splitlines() if line.startswith("│ model")] for run in runs]
    assert len(scores[0]) == 1
    assert scores[0] == scores[1]

    other = demo(tmp_path, 700)
    assert other.returncode == 2
    assert "raw exists and is not an empty directory" in other.stderr
    assert "Traceback" not in other.stderr
