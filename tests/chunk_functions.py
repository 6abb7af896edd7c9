"""Functions that workers of other processes find by name, and take nothing but a task."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from preprocess.outbrain import transform
from widedeep.errors import InputError


def square(i: int) -> int:
    return i * i


def slow_if_early(i: int) -> int:
    time.sleep(0.02 if i % 5 == 0 else 0)
    return i


def refuse_three(i: int) -> int:
    if i == 3:
        raise InputError("clicks.csv, line 3: expected an integer")
    return i


def table(rows: int) -> dict:
    values = np.random.default_rng(rows).integers(0, 2**40, rows)
    return {"ids": values, "halves": values[::2], "nested": [values.astype(np.float32), "text"], "none": values[:0]}


def process_and_gpu(_) -> tuple[int, str | None]:
    time.sleep(0.2)  # so that every worker gets a task
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def say_and_sleep(directory: Path) -> None:
    (directory / str(os.getpid())).touch()
    time.sleep(600)


def die(_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        die(None)
    return "done"


def transform_until_row_8(task: transform.Task) -> tuple:
    """A worker of the Outbrain preprocessing that is lost in the middle of a split."""
    if task.start >= 8:
        die(None)
    return transform.run(task)
