"""Stages of a check: processes with a log, a time limit and a row of a table each.

Needs the standard library alone: a check begins where nothing is built yet.

However the check ends, by Ctrl-C, a signal or an error, its processes end with it, and the rows that there are stand in
summary.json, which is written anew after every stage.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NOT_HERE, NEEDS_HOPPER = "not here", "need compute capability 9.0"
LEFT_OUT, TIME_IS_UP = "left out", "time is up"
FINE = ("ok", NOT_HERE, LEFT_OUT)
KILLED = 10.0  # seconds for a killed process to be gone: one that hangs in a driver may not


class Stage(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds
    numbers: Callable[[str], str]  # of its log
    beside: bool = False  # others like it: nothing is timed


def last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def row(stage: str, result: str, numbers: str = "", seconds: float = 0.0) -> dict:
    return {"stage": stage, "result": result, "seconds": round(seconds, 1), "numbers": numbers}


class Runner:
    """Runs stages within `seconds`.

    Args:
        out: where <stage>.log and summary.json go.  unlimited: a stage may take all the time that is left.
    Attributes:
        rows: stage, result, seconds, numbers of each so far.
    """

    def __init__(self, out: Path, seconds: float, unlimited: bool = False):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.end, self.unlimited = out, time.monotonic() + seconds, unlimited
        self.rows: list[dict] = []
        self._live: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, together: list[Stage]) -> list[dict]:
        """Runs stages beside each other, each with its share of the host's threads; returns their rows."""
        threads = max(1, (os.cpu_count() or 1) // len(together)) if len(together) > 1 else None
        with ThreadPoolExecutor(len(together)) as pool:
            told = [pool.submit(self._row, stage, threads) for stage in together]
            try:
                wait(told)
            except BaseException:
                self.stop()
                raise
            finally:
                self.add([each.result() for each in told])
        return self.rows[-len(together) :]

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        (self.out / "summary.json").write_text(json.dumps(self.rows, indent=1))

    def log(self, stage: str) -> Path:
        return self.out / f"{stage.replace(' ', '-')}.log"

    def stop(self) -> None:
        """Ends all that runs; what is to come is not started."""
        with self._lock:
            self._stopped = True
            for process in self._live:
                _kill(process)

    def _row(self, stage: Stage, threads: int | None) -> dict:
        left = self.end - time.monotonic()
        if left < 5 or self._stopped:
            return row(stage.name, "interrupted" if self._stopped else "no time left")
        log = self.log(stage.name)
        start = time.monotonic()
        result = self._result(stage, left if self.unlimited else min(stage.limit, left), log, threads)
        seconds, text = time.monotonic() - start, log.read_text(errors="replace")
        print(f"{stage.name}: {result}, {seconds:.0f} s", file=sys.stderr, flush=True)
        try:
            numbers = stage.numbers(text) or last_line(text)
        except Exception:  # a log that is not as expected costs its numbers alone
            numbers = last_line(text)
        return row(stage.name, result, numbers, seconds)

    def _result(self, stage: Stage, limit: float, log: Path, threads: int | None) -> str:
        """What became of it, in words; all that it started ends with it."""
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        with log.open("w") as out:
            try:
                process = self._start(stage.command, environment, out)
            except OSError as error:
                out.write(str(error))
                return "not there"
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                return TIME_IS_UP
            finally:
                with self._lock:
                    self._live.discard(process)
                _kill(process)
        if self._stopped:
            return "interrupted"
        return f"failed ({code})" if code else _passed(stage, log.read_text(errors="replace"))

    def _start(self, command: list[str], environment: dict[str, str], out) -> subprocess.Popen:
        with self._lock:  # so that nothing starts behind the back of `stop`
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._live.add(process)
            if self._stopped:
                _kill(process)
        return process


def _passed(stage: Stage, log: str) -> str:
    """Tests of which none passed are not ok, but where all of them are for another GPU."""
    if "pytest" not in stage.command or re.search(r"\b\d+ passed\b", log):
        return "ok"
    return NOT_HERE if NEEDS_HOPPER in log else "none ran"


def _kill(process: subprocess.Popen) -> None:
    """The process, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED)
