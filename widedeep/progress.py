"""Where a run stands, as state.json of a checkpoint says it, and what is wrong with one that cannot be read."""

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from widedeep.errors import InputError

STATE = "state.json"
SEAL = "xxh3_64"  # of state.json, in it
ADDED = ("data", "processes", "device", "threads", "begun", "score")  # which older checkpoints lack
OLD_BEST = "best"  # the index that named the best one beside those that lack `best_step`
# Of an OSError after which a file may be whole: nobody should be told to remove it.
WHOLE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


@dataclass
class Progress:
    """Where a run stands; all that a resumed run needs besides weights and optimizer state.

    `step` updates are done in all, `position` of them in epoch number `epoch` (from 0). `rows` and
    `global_batch_size` say what one position means, `data` identifies the train rows, `processes` is how many trained
    last, `device` cpu or cuda (None: a checkpoint from before they were kept), `threads` those of each process, None
    also where bits do not depend on them, `begun` when the run began, by which its records are known. `metrics` are
    those of the last evaluation, `best` the best score so far, of the metric called `score`, `best_step` the step of
    the checkpoint that has it, `waited` the epochs since.
    """

    seed: int
    rows: int
    global_batch_size: int
    data: str | None = None
    processes: int | None = None
    device: str | None = None
    threads: int | None = None
    begun: str | None = None
    step: int = 0
    epoch: int = 0
    position: int = 0
    score: str | None = None
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)


def steps_in(directory: Path) -> list[Path]:
    """All whole checkpoints of a directory, by step."""
    found = [path for path in directory.glob("step-*") if (path / STATE).is_file()]
    return sorted((path for path in found if path.name[5:].isdigit()), key=lambda path: int(path.name[5:]))


def state_of(directory: Path) -> dict[str, Any]:
    """What state.json holds, with what older checkpoints lack. Raises as `checkpoint.read_progress`."""
    with readable(directory):
        state = json.loads((directory / STATE).read_text())
        if (said := state.get(SEAL, seal(state))) != seal(state):  # older checkpoints lack it
            raise InputError(damage(directory, STATE, f"the file's xxh3-64 is {seal(state)}, it says {said}"))
        if "best_step" not in state:
            best = int(named(directory.parent / OLD_BEST)[5:] or -1)
            state["best_step"] = best if 0 <= best <= state["step"] else None  # a kill may have left one ahead
        return dict.fromkeys(ADDED) | state


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Says what is wrong with a checkpoint where it cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, OSError) and error.errno in WHOLE:
            raise InputError(f"{error.filename or directory / STATE}: cannot be read: {error.strerror}") from error
        raise InputError(damage(directory, STATE, f"the file cannot be read: {error}")) from error


def named(index: Path) -> str:
    """The checkpoint that an index names; empty where it is damaged or absent. Raises InputError where it cannot be
    read.
    """
    if not index.is_file():
        return ""
    try:
        name = index.read_bytes().decode(errors="replace").strip()
    except OSError as error:
        raise InputError(f"{index}: cannot be read: {error.strerror}") from error
    return name if re.fullmatch(r"step-[0-9]{1,19}", name) else ""


def seal(state: dict[str, Any]) -> str:
    plain = {key: value for key, value in state.items() if key != SEAL}
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def damage(directory: Path, name: str, how: str) -> str:
    older = [path for path in steps_in(directory.parent) if path != directory]
    advice = f"; remove {directory} to use {older[-1].name} instead" if older else "; there is no other checkpoint"
    return f"{directory / name}: damaged checkpoint: {how}{advice}"
