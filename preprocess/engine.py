"""Runs chunk functions, in this thread or in a pool of local threads; results come in the order of the tasks.

Threads, because numpy and pyarrow release the interpreter lock in their loops, and tables and results need not travel.
On two million Outbrain rows with two workers, processes took 6.3 s of CPU time and 690 MB, threads 3.7 s and 520 MB
(one worker: 3.7 s). Functions take nothing but their task and find their tables on disk, so other pools can run them.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from widedeep.errors import InputError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


class LocalEngine:
    """`map` over `workers` threads; with one worker, in the calling thread. A with-block ends the pool."""

    def __init__(self, workers: int | None = None):
        """workers: None for one a core that this process may use."""
        self.workers = cores() if workers is None else workers
        if self.workers < 1:
            raise InputError(f"workers is {workers}, expected at least 1")
        self._pool = ThreadPoolExecutor(self.workers) if self.workers > 1 else None

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """`function(task)` of every task, in order; its exceptions pass through. At most workers + 1 results are under
        way or waiting, which bounds memory."""
        if self._pool is None:
            yield from map(function, tasks)
            return
        pending: deque = deque()
        for task in tasks:
            pending.append(self._pool.submit(function, task))
            if len(pending) > self.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
