"""The pools, one contract: order, few tasks at a time, exceptions, lost workers, an end whatever happens."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chunk_functions
import numpy as np
import pytest

from preprocess import engine
from preprocess.engine import ENGINES, ThreadEngine, WorkerLost, gpus, make
from preprocess.engine.results import Filed, Filing, loaded
from preprocess.stages import Stages, Watched
from widedeep.errors import InputError, RunError

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", params=ENGINES)
def pool(request, tmp_path_factory):
    """Every engine with two workers."""
    if request.param == "dask":
        pytest.importorskip("distributed", reason="dask is not installed")
    with make(request.param, 2, tmp_path_factory.mktemp("scratch")) as pool:
        yield pool


def test_results_come_in_the_order_of_the_tasks(pool):
    assert pool.workers == 2
    assert list(pool.map(chunk_functions.slow_if_early, range(12))) == list(range(12))
    assert list(pool.map(chunk_functions.square, [])) == []


def test_tasks_are_drawn_as_results_are_taken(pool):
    drawn = []

    def tasks():
        for i in range(100):
            drawn.append(i)
            yield i

    results = pool.map(chunk_functions.square, tasks())
    for taken in range(1, 4):
        next(results)
        assert len(drawn) <= taken + pool.workers


def test_an_exception_passes_through_and_the_pool_goes_on(pool):
    results = pool.map(chunk_functions.refuse_three, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"^clicks.csv, line 3: expected an integer$"):
        next(results)
    assert list(pool.map(chunk_functions.square, [7])) == [49]


def test_large_results_arrive_whole_and_leave_no_file(pool):
    for rows, got in zip((1, 100_000, 30_000), pool.map(chunk_functions.table, (1, 100_000, 30_000))):
        want = chunk_functions.table(rows)
        np.testing.assert_array_equal(got["nested"][0], want["nested"][0])
        assert got["nested"][1] == "text"
        for name in ("ids", "halves", "none"):
            np.testing.assert_array_equal(got[name], want[name])
            assert got[name].dtype == want[name].dtype
        got["ids"] += 1  # the taker's own
    assert not [path for path in pool.results.glob("*") if path.is_file()]


def test_a_stage_counts_rows_and_work_of_every_result(pool):
    stages = Stages()
    with stages.stage("squares", total=15) as stage:
        watched = Watched(pool, stage, rows=lambda result: result, work=lambda task: task)
        assert list(watched.map(chunk_functions.square, range(6))) == [0, 1, 4, 9, 16, 25]
        assert stage._bar.tasks[0].completed == 15
        assert stage._bar.tasks[0].fields["rows"] == 55
    assert stages.done["squares"].rows == 55
    assert stages.to_dict()["squares"]["rows_per_second"] > 0


def test_a_file_of_results_is_gone_once_they_are_taken(tmp_path):
    small, large = (Filing(chunk_functions.table, tmp_path / "results")(rows) for rows in (10, 50_000))
    assert isinstance(large, Filed)
    assert len(large.pickled) < large.path.stat().st_size
    assert isinstance(small, dict)
    assert large.path.is_file()
    np.testing.assert_array_equal(loaded(large)["halves"], chunk_functions.table(50_000)["halves"])
    assert list((tmp_path / "results").iterdir()) == []


def test_threads_run_side_by_side():
    meeting = threading.Barrier(3, timeout=30)
    with ThreadEngine(3) as pool:
        assert len(list(pool.map(lambda _: meeting.wait(), range(3)))) == 3


def test_a_lost_process_is_one_clear_error(tmp_path):
    message = "a worker process ended in the middle of its task"
    with pytest.raises(WorkerLost, match=message), make("processes", 2, tmp_path) as pool:
        list(pool.map(chunk_functions.die, range(5)))
    assert list(tmp_path.iterdir()) == []


def test_dask_replaces_a_lost_worker_but_not_for_ever(tmp_path):
    dask = pytest.importorskip("dask", reason="dask is not installed")
    pytest.importorskip("distributed", reason="dask is not installed")
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), make("dask", 1, tmp_path) as pool:
        assert list(pool.map(chunk_functions.die_once, [tmp_path / "died"])) == ["done"]
        with pytest.raises(WorkerLost, match="ended each worker"):
            list(pool.map(chunk_functions.die, [0]))
        pending = pool._submit(chunk_functions.square, 1)
        pool._client.cancel([pending])  # as a client does with all tasks when its scheduler is lost
        with pytest.raises(WorkerLost, match="the dask scheduler is gone"):
            pool._result(pending)
    assert [path.name for path in tmp_path.iterdir()] == ["died"]


INTERRUPTED = """
import signal, sys
from pathlib import Path
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell has it ignored
    sys.path.insert(0, sys.argv[1])
    import chunk_functions
    from preprocess.engine import make
    with make("processes", 2, Path(sys.argv[2])) as pool:
        list(pool.map(chunk_functions.say_and_sleep, [Path(sys.argv[3])] * 9))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_program_however_it_ends(end, tmp_path):
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(INTERRUPTED)
    pids.mkdir()
    command = [sys.executable, script, TESTS, tmp_path, pids]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=TESTS.parent, env=_environment()) as program:
        try:
            _wait(lambda: len(list(pids.iterdir())) == 2)
            program.send_signal(end)
            assert program.wait(timeout=30)
        finally:
            program.kill()
    _wait(lambda: not any(_is_running(int(path.name)) for path in pids.iterdir()))


STARTING = """
import os, signal, sys
from pathlib import Path
if __name__ == "__main__":
    from preprocess.engine import make
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with make("processes", 2, Path(sys.argv[1])) as pool:
        pending = pool._submit(len, "abc")
        try:
            os.killpg(0, signal.SIGINT)  # as a terminal does: the worker has just begun to import
        except KeyboardInterrupt:
            print(pool._result(pending))
"""


def test_workers_are_not_interrupted_while_they_start(tmp_path):
    (tmp_path / "script.py").write_text(STARTING)
    command = [sys.executable, tmp_path / "script.py", tmp_path]
    environment = _environment()
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, start_new_session=True, timeout=60, cwd=TESTS.parent
    )
    assert (done.stdout, done.stderr) == ("3\n", "")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}


def _wait(done) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_each_worker_gets_one_gpu(kind, tmp_path, monkeypatch):
    if kind == "dask":
        pytest.importorskip("distributed", reason="dask is not installed")
    monkeypatch.setattr(gpus, "visible", lambda device: ("3", "GPU-5"))
    with make(kind, None, tmp_path, device="cuda") as pool:
        assert pool.workers == 2
        seen = dict(pool.map(chunk_functions.process_and_gpu, range(6)))
    assert sorted(seen.values()) == ["3", "GPU-5"]
    assert os.getpid() not in seen


def test_gpus_that_a_process_may_use(monkeypatch):
    class Cuda:
        class cuda:
            class runtime:
                getDeviceCount = staticmethod(lambda: 2)

    monkeypatch.setattr(gpus, "array_module", lambda device: Cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.visible("cuda") == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert gpus.visible("cuda") == ("4", "7")
    assert gpus.visible("cpu") == ()
    gpus.choose(("4", "7"), 3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(
    ("kind", "workers", "more", "message"),
    [
        ("ray", 1, {}, "engine is 'ray', expected one of threads, processes, dask"),
        ("threads", 0, {}, "workers is 0, expected at least 1"),
        ("processes", 0, {}, "workers is 0, expected at least 1"),
        ("dask", 0, {}, "workers is 0, expected at least 1"),
        ("threads", None, {"scheduler": "tcp://a:1"}, "expected none with engine 'threads'"),
        ("dask", 2, {"scheduler": "tcp://a:1"}, "workers is 2, expected none with a scheduler"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(kind, workers, more, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make(kind, workers, tmp_path, **more)


def test_dask_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "preprocess.engine.cluster", raising=False)
    monkeypatch.delattr(engine, "cluster", raising=False)
    with pytest.raises(InputError, match=r"engine 'dask' needs dask: pip install 'widedeep\[dask\]'"):
        make("dask", 2, tmp_path)


def test_dask_that_cannot_start_its_workers_says_why(tmp_path, monkeypatch):
    cluster = pytest.importorskip("preprocess.engine.cluster", reason="dask is not installed")

    def fail(**_):
        try:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        except OSError as error:
            raise RuntimeError("Nanny failed to start.") from error

    monkeypatch.setattr(cluster, "LocalCluster", fail)
    with pytest.raises(RunError, match=r"the workers of dask could not be started: .*Too many open files"):
        make("dask", 2, tmp_path)


def test_a_scheduler_that_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="dask is not installed")
    from preprocess.engine import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=r"scheduler tcp://127.0.0.1:9: expected a dask scheduler"):
        make("dask", None, tmp_path, scheduler="tcp://127.0.0.1:9")
