"""Threads of this process: numpy and pyarrow release the interpreter lock in their loops, and nothing travels."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from preprocess.engine.base import Engine


class ThreadEngine(Engine):
    """With one worker everything runs in the calling thread, a task at the time its result is taken."""

    def __init__(self, workers: int, scratch: Path | None = None):
        super().__init__(workers, scratch)
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def _submit(self, function: Callable[[Any], Any], task: Any) -> Any:
        return (function, task) if self._pool is None else self._pool.submit(function, task)

    def _result(self, pending: Any) -> Any:
        if self._pool is None:
            function, task = pending
            return function(task)
        return pending.result()

    def _end(self, failed: bool) -> None:
        # A thread cannot be stopped: its task is waited for, a fraction of a second.
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
