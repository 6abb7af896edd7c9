"""The working directory of a run, from which the same run continues after it was killed.

`.<name>.part` beside the target holds `out/` (what becomes the target), `work/` (tables and rows between the stages)
and `journal.json`: what the run depends on, and of every finished stage what later ones need. The journal is replaced
as a whole after each stage. One that was made of other inputs, with other settings, or before the machine was
restarted (what it lists may not have reached the disk) is ignored, and its directory emptied. So is one whose `out/` is
another directory: the earlier output, with which a run that was killed had just exchanged its own.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from preprocess import inputs
from preprocess.engine import WorkerLost
from widedeep import atomic

_JOURNAL, _BOOT = "journal.json", Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The finished stages of a run.

    Args:
        directory: the working directory.
        key: what the results depend on, as JSON has it.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]):
        self.out, self.work = directory / "out", directory / "work"
        self._path, self._key = directory / _JOURNAL, json.loads(json.dumps(key))
        self.stages: dict[str, dict[str, Any]] = self._read()
        if not self.stages:
            self._path.unlink(missing_ok=True)  # before another directory gets the number of the `out/` that it names
            for path in (self.out, self.work):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()

    def add(self, stage: str, note: dict[str, Any]) -> None:
        """Records that `stage` is done; note: plain values."""
        self.stages[stage] = note
        told = {"key": self._key, "out": self._inode(), "stages": self.stages}
        with atomic.file(self._path) as partial:
            partial.write_text(json.dumps(told), encoding="utf-8")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            plain = json.loads(self._path.read_text(encoding="utf-8"))
            same = plain["key"] == self._key and plain["out"] == self._inode() and self.work.is_dir()
            return plain["stages"] if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _inode(self) -> int:
        return self.out.stat().st_ino


@contextlib.contextmanager
def directory(
    target: Path, output: atomic.Output, key: Mapping[str, Any], reads: Iterable[Path] = ()
) -> Iterator[Journal]:
    """Gives the journal of the run that writes `target`; renames `out/` to `target` when the block ends well.

    reads: what the run reads. An error removes the working directory. A kill, an interrupt or a lost worker leaves it
    for the next run.

    Raises:
        InputError: `target` cannot be written, is not an earlier output or holds what the run reads, or another run is
            writing it.
    """
    atomic.check(target, output, reads)
    asked, target = target, Path(os.path.realpath(target))
    part = target.with_name(f".{target.name}.part")
    with atomic.write_errors(asked):
        part.mkdir(parents=True, exist_ok=True)
        with open(part / "lock", "w") as lock:
            atomic.lock(lock, asked)
            _restore(part, target)
            try:
                journal = Journal(part, {"boot": _boot(), **key})
                yield journal
                atomic.commit(journal.out, target, asked)
            except WorkerLost as error:
                raise WorkerLost(f"{error}; the same command continues at the stage that was not finished") from error
            except Exception:
                if not _previous(part).exists():  # what could not be put back: the next run tries again
                    shutil.rmtree(part, ignore_errors=True)
                raise
            shutil.rmtree(part, ignore_errors=True)


def state(paths: Iterable[Path]) -> dict[str, list[int] | None]:
    """Size and time of change of each file, by absolute path."""
    return {os.path.abspath(path): inputs.state(path) for path in paths}


def _restore(part: Path, target: Path) -> None:
    """Puts an earlier output back that a kill left moved aside."""
    previous = _previous(part)
    if previous.is_dir() and not target.exists():
        previous.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(part: Path) -> Path:
    return part / f"out{atomic.PREVIOUS}"


def _boot() -> str:
    return _BOOT.read_text().strip() if _BOOT.exists() else ""
