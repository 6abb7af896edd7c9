"""A dask cluster: one that runs already, on any machines that see the same files, or one made here."""

import logging
import pickle
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
from distributed import CancelledError, Client, KilledWorker, LocalCluster, WorkerPlugin
from distributed.comm import CommClosedError

from preprocess.engine import gpus
from preprocess.engine.base import Engine, WorkerLost
from preprocess.engine.results import Filing, loaded
from widedeep.errors import InputError, RunError

CONNECT_SECONDS = 20


class DaskEngine(Engine):
    """Workers that dask knows, a task a thread. A worker that ends is replaced and its task done again, three times."""

    worker_bytes = 192 << 20
    results: Path  # never None

    def __init__(self, workers: int | None, scratch: Path, scheduler: str | None, devices: Sequence[str]):
        """workers: of a cluster made here; None with `scheduler`, the address of a running one, which has its own.
        devices: the GPUs to deal out to workers made here."""
        super().__init__(workers or 0, scratch)
        with ExitStack() as stack:
            if scheduler is None:
                client = stack.enter_context(_local(workers, self.results, stack))
                if devices:
                    client.register_plugin(_OneDevice(devices))
            else:
                client = stack.enter_context(_connect(scheduler))
            self._client, self.workers = client, sum(client.nthreads().values())
            self._stack = stack.pop_all()

    def everywhere(self, function: Callable[[], Any]) -> None:
        super().everywhere(function)
        self._client.run(function)

    def check_sees(self, paths: Sequence[Path]) -> None:
        for worker, missing in self._client.run(_missing, list(paths)).items():
            if missing:
                raise InputError(f"{missing[0]}: worker {worker} does not see it; workers must share the file system")

    def _submit(self, function: Callable[[Any], Any], task: Any) -> Any:
        # Pickled here, or dask would look into the task for its own futures.
        call = pickle.dumps((Filing(function, self.results), task), protocol=5)
        return self._client.submit(_call, call, key=f"widedeep-{uuid.uuid4().hex}", pure=False)

    def _result(self, pending: Any) -> Any:
        try:
            return loaded(pending.result())
        except KilledWorker as error:
            raise WorkerLost("a task ended each worker that dask gave it to, perhaps for want of memory") from error
        except (CommClosedError, CancelledError) as error:
            raise WorkerLost("the dask scheduler is gone, or has cancelled the run's tasks") from error

    def _end(self, failed: bool) -> None:
        self._stack.close()


class _OneDevice(WorkerPlugin):
    """Workers of a cluster made here are named 0, 1, ..."""

    name = "widedeep-device"

    def __init__(self, devices: Sequence[str]):
        self.devices = tuple(devices)

    def setup(self, worker: Any) -> None:
        gpus.choose(self.devices, int(worker.name))


def _local(workers: int | None, directory: Path, stack: ExitStack) -> Client:
    # dask lets malloc give every freed array back to the system: 10 s of CPU time in the workers for two million
    # Outbrain rows, without 7.
    environment = {"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1}}
    stack.enter_context(dask.config.set(environment))
    # What a task may hold is bounded by memory_limit already; dask's own limit counts mapped tables in every worker.
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # None takes a fixed port
            memory_limit=0,
            local_directory=str(directory),
            silence_logs=logging.CRITICAL,
        )
    except RuntimeError as error:  # which tells in a chain of causes
        raise RunError(f"the workers of dask could not be started: {_first_cause(error)}") from error
    stack.enter_context(cluster)
    return Client(cluster, set_as_default=False)


def _first_cause(error: BaseException) -> BaseException:
    while before := error.__cause__ or error.__context__:
        error = before
    return error


def _connect(scheduler: str) -> Client:
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"scheduler {scheduler}: expected a dask scheduler, such as tcp://host:8786: {error}"
        ) from error
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        client.close()
        raise InputError(f"scheduler {scheduler}: expected at least one worker, found none") from error
    return client


def _call(pickled: bytes) -> Any:
    function, task = pickle.loads(pickled)
    return function(task)


def _missing(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if not path.exists()]
