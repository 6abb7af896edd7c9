"""What every engine does: functions of a task over many tasks, a bounded number at a time, results in their order."""

import os
import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from widedeep.errors import RunError


class WorkerLost(RunError):
    """A worker ended in the middle of its task. What was finished before is whole."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Pool(Protocol):
    """What maps functions over tasks: an `Engine`, or one whose progress is shown."""

    @property
    def workers(self) -> int:
        """How many tasks run at the same time."""

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """`function(task)` of every task, in order."""


class Engine(ABC):
    """A pool of workers. A with-block ends it: at an error at once, else when its tasks are done.

    Functions and tasks must be picklable and find all else on disk: workers may be other processes, or other machines.

    Attributes:
        workers: how many tasks run at the same time.
        worker_bytes: memory of a worker besides that of its task; 0 if workers are threads of this process.
    """

    worker_bytes = 0

    def __init__(self, workers: int, scratch: Path | None = None):
        """scratch: an existing directory for results on their way; a folder `results` in it is the engine's own."""
        self.workers = workers
        self.results = None if scratch is None else scratch / "results"
        self._sweep()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._end(failed=kind is not None)
        self._sweep()

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """`function(task)` of every task, in order; its exceptions pass through. At most `workers` + 1 tasks are under
        way or wait with their result, which bounds memory.

        Raises:
            WorkerLost: a worker ended before its task did.
        """
        pending: deque = deque()
        for task in tasks:
            pending.append(self._submit(function, task))
            if len(pending) > self.workers:
                yield self._result(pending.popleft())
        while pending:
            yield self._result(pending.popleft())

    def everywhere(self, function: Callable[[], Any]) -> None:
        """Calls `function` here and in every worker that outlives this engine."""
        function()

    def check_sees(self, paths: Sequence[Path]) -> None:  # noqa: B027 (workers of this machine see everything)
        """InputError if a worker on another machine does not see one of `paths`."""

    def _sweep(self) -> None:
        if self.results is not None:
            shutil.rmtree(self.results, ignore_errors=True)

    @abstractmethod
    def _submit(self, function: Callable[[Any], Any], task: Any) -> Any:
        """Starts a task; returns what `_result` takes."""

    @abstractmethod
    def _result(self, pending: Any) -> Any:
        """Waits for a task of `_submit`."""

    @abstractmethod
    def _end(self, failed: bool) -> None:
        """Ends the workers; after a failure without waiting for their tasks."""
