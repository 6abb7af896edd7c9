"""Runs chunk functions in this process or in a pool of local processes; results come in the order of the tasks."""

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from widedeep.errors import InputError, RunError


class LocalEngine:
    """`map` over `workers` processes; with one worker, in this process.

    Functions and tasks travel by pickle, so functions are top-level and tasks small: a worker finds its tables on disk.
    Processes are spawned, not forked: pyarrow and CUDA hold threads that a fork would break.
    """

    def __init__(self, workers: int = 1):
        if workers < 1:
            raise InputError(f"workers is {workers}, expected at least 1")
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """`function(task)` of every task, in order. At most workers + 1 results are under way or waiting, which bounds
        memory.

        Raises:
            RunError: a worker process died. What `function` raises passes through.
        """
        if self.workers == 1:
            yield from map(function, tasks)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
        pending: deque = deque()
        try:
            for task in tasks:
                pending.append(self._pool.submit(function, task))
                if len(pending) > self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process died (out of memory?); fewer workers or smaller chunks need less"
            ) from error
        finally:
            for future in pending:
                with contextlib.suppress(Exception):
                    future.cancel()
