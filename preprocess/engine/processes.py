"""Worker processes of this machine: spawned, for threads and GPU contexts do not survive a fork."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from preprocess.engine import gpus
from preprocess.engine.base import Engine, WorkerLost
from preprocess.engine.results import Filing, loaded


class ProcessEngine(Engine):
    """A pool of processes that end with this one, however it ends: each waits for the end of a pipe held here."""

    worker_bytes = 128 << 20
    results: Path  # never None

    def __init__(self, workers: int, scratch: Path, devices: Sequence[str]):
        """devices: the GPUs to deal out, one a worker; see `gpus`."""
        super().__init__(workers, scratch)
        context = multiprocessing.get_context("spawn")
        self._followed, self._lifeline = context.Pipe(duplex=False)
        numbers = context.SimpleQueue()
        for number in range(workers):
            numbers.put(number)
        start = (self._followed, numbers, tuple(devices))
        self._pool = ProcessPoolExecutor(workers, context, _start, start)

    def _submit(self, function: Callable[[Any], Any], task: Any) -> Any:
        try:
            with _uninterrupted():  # a submit may start a worker
                return self._pool.submit(Filing(function, self.results), task)
        except BrokenProcessPool as error:
            raise _lost() from error

    def _result(self, pending: Any) -> Any:
        try:
            return loaded(pending.result())
        except BrokenProcessPool as error:
            raise _lost() from error

    def _end(self, failed: bool) -> None:
        if failed:
            self._lifeline.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lifeline.close()
        self._followed.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back. A process started meanwhile inherits that, so that none is interrupted before `_start`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _lost() -> WorkerLost:
    return WorkerLost(
        "a worker process ended in the middle of its task: it was killed, perhaps for want of memory (fewer workers or"
        " a memory_limit need less), or it could not start (a script must keep its work under `if __name__ =="
        " '__main__'`)"
    )


def _start(lifeline: Connection, numbers: Any, devices: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
    threading.Thread(target=_follow, args=(lifeline,), daemon=True).start()
    gpus.choose(devices, numbers.get())


def _follow(lifeline: Connection) -> None:
    """Ends this process when the other end of the pipe is closed, by its owner or by its owner's end."""
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
