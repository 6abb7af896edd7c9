"""Checkpoints: weights and optimizer state as safetensors, the place in the data as JSON, whole or not at all.

    <model_dir>/checkpoint/step-<n>/    {model,optimizer}.safetensors  state.json  feature_spec.yaml  config.yaml
    <model_dir>/checkpoint/last         the name of a directory beside it
    <model_dir>/checkpoint/lock         empty; held by the run that writes here

state.json lists size and xxh3-64 of the other files and has one of its own, so that damage is found before a damaged
weight or place is used. That of the last one says which is the best: a second index could differ from the first.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from widedeep import __version__, atomic
from widedeep.errors import InputError
from widedeep.progress import OLD_BEST, SEAL, STATE, Progress, damage, named, readable, seal, state_of, steps_in
from widedeep.share import ALL_ROWS, Share, is_table
from widedeep.tensors import opened
from widedeep.tensors import write as write_tensors

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
SPEC, CONFIG = "feature_spec.yaml", "config.yaml"
FILES = (MODEL, OPTIMIZER, STATE, SPEC, CONFIG)  # of a checkpoint
LOCK = "lock"

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. A context manager; leaving it waits for what is being written and lets another run
    write here.

    Args:
        model_dir: the `--model_dir`; checkpoints go to its `checkpoint` directory.
        keep_last: how many to keep besides the best one.
    """

    def __init__(self, model_dir: str | Path, keep_last: int = 2):
        atomic.check_name(model_dir)
        self.directory = Path(model_dir) / "checkpoint"
        self._keep_last = keep_last
        self._mine: list[str] = []
        self._lock: IO | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.finish()
        except Exception as error:
            if kind is None:
                raise
            log.warning("%s", error)  # it must not hide what went wrong before
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
            if self._lock is not None:
                with contextlib.suppress(OSError):  # it must not hide what went wrong before, and it holds nothing
                    self._lock.close()
                self._lock = None

    def steps(self) -> list[Path]:
        """All whole checkpoints, by step."""
        return steps_in(self.directory)

    def find(self, which: str = "last") -> Path | None:
        """The directory of `last`, `best` or `step-<n>`; the newest where the index is stale, the last where the best
        is not known; None if there are none.

        Raises:
            InputError: it is there without its state.json; or, of `best`, the last one's cannot be read.
        """
        name = {"last": self._last, "best": self._best}.get(which, lambda: which)()
        if name and (found := self.directory / name).is_dir():
            if not (found / STATE).is_file():
                raise InputError(damage(found, STATE, _difference(None, {})))
            return found
        return next(reversed(self.steps()), None) if which in ("last", "best") else None

    def _last(self) -> str:
        return named(self.directory / "last")

    def _best(self) -> str:
        """By name, as the last one says. Another run's may be there by that name: of one that was to replace this one,
        and was killed before `last` named a checkpoint of its own.
        """
        if (last := self.find("last")) is None:
            return ""
        state = state_of(last)
        best = self.directory / f"step-{state['best_step']}"
        if not best.is_dir() or ((best / STATE).is_file() and state_of(best)["begun"] != state["begun"]):
            return last.name
        return best.name

    def check_not_tensorflow(self) -> None:
        """Raises InputError where, for want of our own, a checkpoint of the original must be what is meant."""
        if not self.steps() and (theirs := sorted(self.directory.glob("*.index"))):
            found = "found TensorFlow's, which it cannot read"
            raise InputError(f"{theirs[-1]}: expected a checkpoint of widedeep, {found}")

    def prepare(self) -> None:
        """Makes the directory and locks it, so that a place that cannot be written is known before the first step, and
        mends what a kill inside a save left, unless the file system has no locks. A second call does no more.

        Raises:
            InputError: it cannot be written, or another run is writing it.
        """
        with atomic.write_errors(self.directory):
            os.makedirs(os.path.realpath(self.directory), exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.directory))
            if self._lock is None:
                self._lock = open(self.directory / LOCK, "a")  # noqa: SIM115 (held as long as the run writes)
                if atomic.lock(self._lock, self.directory):
                    self._restore()

    def newest(self) -> Path | None:
        """The last one of this run, or of the run that it goes on with."""
        return self.directory / self._mine[-1] if self._mine else None

    def adopt(self, found: Path) -> None:
        """Takes `found` and those before it for this run's own, to be kept and pruned as if it had written them."""
        self._mine = [path.name for path in self.steps() if int(path.name[5:]) <= int(found.name[5:])]

    def save(
        self,
        arrays: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        progress: Progress,
        texts: Mapping[str, str],
        beside: bool = False,
    ) -> Path:
        """Writes a checkpoint, points `last` to it, and removes what need not be kept.

        Args:
            arrays: the model's `named_arrays()`.   optimizer: the step's `state()`. Of both whole tables.
            texts: further files by name (feature spec, config).
            beside: return as soon as tensors of a GPU are copied to the host (one that is there must not change any
                more); the rest is done while the caller goes on, and an error of it raised by the next call of `save`
                or `finish`, or by leaving.
        Raises:
            RunError: the disk is full.   InputError: the directory cannot be written.
        """
        self.finish()
        parts = ((MODEL, arrays), (OPTIMIZER, optimizer))
        copies = {file: {name: t.detach().cpu() for name, t in tensors.items()} for file, tensors in parts}
        target = self.directory / f"step-{progress.step}"
        told = (target, copies, replace(progress), dict(texts))
        if beside:
            self._pool = self._pool or ThreadPoolExecutor(1)
            self._writing = self._pool.submit(self._save, *told)
        else:
            self._save(*told)
        return target

    def finish(self) -> None:
        """Waits for the checkpoint that is being written. Raises as `save` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save(
        self, target: Path, parts: dict[str, dict[str, Tensor]], progress: Progress, texts: dict[str, str]
    ) -> None:
        write(target, parts, progress, texts)
        with atomic.write_errors(self.directory):
            self._point(target.name)
            atomic.sync(self.directory)  # before what it replaces goes
            self._mine = [name for name in self._mine if name != target.name] + [target.name]
            self._prune(f"step-{progress.best_step}")

    def _point(self, name: str) -> None:
        with atomic.file(self.directory / "last") as partial:
            partial.write_text(f"{name}\n")
            atomic.sync(partial)

    def _restore(self) -> None:
        """Puts a checkpoint back that was moved aside for its successor, and removes those that were not finished."""
        for path in self.directory.glob(".step-*.partial-*-previous"):
            target = path.with_name(path.name[1:].partition(".partial-")[0])
            if not target.exists():
                path.rename(target)
        for path in self.directory.glob(".step-*.partial-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, best: str) -> None:
        """Keeps this run's last few and its best; whatever else is here belonged to a run that was replaced."""
        self._mine = [name for name in self._mine if (self.directory / name).is_dir()]
        keep = {*self._mine[-self._keep_last :], best}
        (self.directory / OLD_BEST).unlink(missing_ok=True)
        for path in self.directory.glob("step-*"):
            if path.is_dir() and path.name not in keep:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Under another name first: what a kill in the middle leaves shall not be taken for a checkpoint."""
        aside = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):  # it may stay
            path.rename(aside)
            shutil.rmtree(aside)


def write(
    target: Path, parts: Mapping[str, Mapping[str, Tensor]], progress: Progress, texts: Mapping[str, str]
) -> None:
    """Writes one checkpoint in place of an earlier one, and flushes it to the disk.

    Args:
        parts: arrays on the CPU by their names, by file (MODEL, OPTIMIZER).
        texts: further files by name.
    Raises:
        RunError: the disk is full.   InputError: `target` cannot be written, or is there and no checkpoint.
    """
    atomic.check_name(target)
    with atomic.directory(target, atomic.Output(STATE)) as partial:
        for name, tensors in parts.items():
            write_tensors(partial / name, tensors)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        state = asdict(progress) | {"version": __version__, "torch": torch.__version__, "files": files}
        (partial / STATE).write_text(json.dumps(state | {SEAL: seal(state)}, indent=2))
        for path in (*partial.iterdir(), partial):
            atomic.sync(path)


def locate(path: str | Path, which: str = "best") -> Path:
    """The checkpoint directory meant by a path: itself, or `which` of the model directory that it is.

    Raises:
        InputError: there is none.
    """
    atomic.check_name(path := Path(path))
    if (path / STATE).is_file():
        return path
    checkpoints = Checkpoints(path.parent if path.name == "checkpoint" else path)
    found = checkpoints.find(which)
    if found is None:
        checkpoints.check_not_tensorflow()
        if there := [step.name for step in checkpoints.steps()]:
            raise InputError(f"{path}: expected the checkpoint best, last or one of {', '.join(there)}, got {which!r}")
        raise InputError(
            f"{path}: expected a checkpoint, or a model directory with checkpoint/step-<n>/, and found none"
        )
    return found


def read_progress(directory: Path) -> Progress:
    """Reads state.json after checking every other file against it.

    Raises:
        InputError: the checkpoint is damaged; names the file, and an older whole checkpoint if there is one. Or it may
            not be read.
    """
    state = state_of(directory)
    with readable(directory):
        files = state["files"]
        progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})
        for name, wanted in files.items():
            found = _fingerprint(directory / name) if (directory / name).is_file() else None
            if found != wanted:
                raise InputError(damage(directory, name, _difference(found, wanted)))
    return progress


def identity(directory: Path) -> int:
    """A number below 2^63 that two checkpoints share only if all their files are equal; never 0."""
    return xxhash.xxh3_64_intdigest((directory / STATE).read_bytes()) // 2 or 1


def load_arrays(directory: Path, name: str, into: Mapping[str, Tensor], share: Share = ALL_ROWS) -> None:
    """Copies a file's arrays, of tables the rows of `share`, into tensors of the same names and shapes.

    Raises:
        InputError: an array is missing, superfluous, or of another shape or dtype.
    """
    path = directory / name
    with opened(path) as file:
        if surplus := set(file.keys()) ^ set(into):
            odd = min(surplus)
            where = "the model lacks" if odd in file.keys() else "the file lacks"  # noqa: SIM118 (safe_open is no mapping)
            raise InputError(f"{path}: made for another model: {where} the array {odd!r}")
        with torch.no_grad():
            for key, tensor in into.items():
                stored = _part(file, key, share)
                if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                    raise InputError(
                        f"{path}: made for another model: {key!r} is {_kind(stored)}, the model's is {_kind(tensor)}"
                    )
                tensor.copy_(stored)


def read_arrays(directory: Path, name: str, share: Share = ALL_ROWS) -> dict[str, Tensor]:
    """All arrays of a file, of tables the rows of `share`, on the CPU."""
    with opened(directory / name) as file:
        return {key: _part(file, key, share) for key in file.keys()}  # noqa: SIM118


def _part(file: Any, key: str, share: Share) -> Tensor:
    stored = file.get_tensor(key)
    return share.take(stored) if is_table(key) else stored


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
    return {"bytes": path.stat().st_size, "xxh3_64": digest}


def _difference(found: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    if found is None:
        return "the file is missing"
    if found["bytes"] != wanted["bytes"]:
        plural = "s" * (found["bytes"] != 1)
        return f"the file has {found['bytes']} byte{plural}, expected {wanted['bytes']}"
    return f"the file's xxh3-64 is {found['xxh3_64']}, expected {wanted['xxh3_64']}"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
