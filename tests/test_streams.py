"""Standard streams that are closed, full, or lead to nobody: the exit code and the sentence stay as promised."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command_line

from widedeep import __main__

cli = command_line()
ROOT = Path(__file__).resolve().parents[1]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}


def shell(line: str, **environment: str) -> tuple[int, str]:
    """Runs a line of a shell in which $W is the command; its exit code, and what came on stderr."""
    environment = ENVIRONMENT | {"W": f"{sys.executable} -m widedeep"} | environment
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stderr


@needs_full
def test_a_full_stdout_is_a_failed_run():
    assert shell("$W --version >/dev/full") == (1, "widedeep: standard output: No space left on device\n")


@needs_full
def test_a_full_stderr_changes_no_exit_code():
    assert shell("$W nonsense 2>/dev/full") == (2, "")


def test_a_reader_that_leaves_is_told_nothing(monkeypatch, capsys):
    class Left(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Left())
    assert cli.main(["--version"]) == 1
    assert capsys.readouterr().err == ""


def test_closed_streams_are_opened_before_an_output_takes_their_numbers(tmp_path):
    script = (
        "import os, sys; from widedeep import __main__\n"
        "sys.argv = ['widedeep', '--version']; assert __main__.main() == 0\n"
        f"os._exit(os.open({str(tmp_path / 'output')!r}, os.O_CREAT | os.O_WRONLY))"
    )
    code, _ = shell('exec "$P" -c "$S" <&- >&- 2>&-', P=sys.executable, S=script)
    assert code == 3


def test_a_bar_does_without_stderr(tmp_path):
    assert shell(f"$W synth --displays 5 --out {tmp_path / 'raw'} 2>&-")[0] == 0


def test_a_complaint_without_stderr_is_not_on_stdout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["nonsense"]) == 2
    assert capsys.readouterr().out == ""


def test_a_working_directory_that_was_removed_is_named(tmp_path):
    code, said = shell(f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; $W doctor")
    assert (code, said) == (2, "widedeep: the working directory was removed: expected one that is there\n")


def test_an_interrupt_during_the_import_is_one(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "widedeep.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "widedeep.cli", raising=False)
    monkeypatch.delattr("widedeep.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert __main__.main() == 130
    assert capsys.readouterr().err == "widedeep: interrupted\n"
