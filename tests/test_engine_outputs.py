"""Whatever cuts and carries the work, a run writes the same bytes; a lost worker leaves nothing half done."""

import dataclasses
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chunk_functions
import pytest
import test_tfrecord
from commands import main
from test_outbrain_pandas import SMALL, files
from test_outbrain_resume import STAGES

from preprocess import csv_io, synthetic
from preprocess.engine import ThreadEngine, make
from preprocess.outbrain import OutbrainConfig, memory, run, transform
from preprocess.tabular import TabularConfig
from preprocess.tabular import run as run_tabular
from preprocess.tfrecord import TFRecordConfig
from preprocess.tfrecord import run as run_tfrecord
from widedeep.errors import InputError, RunError

ELSEWHERE = ("processes", "dask")


@pytest.fixture(scope="module")
def cluster():
    """Settings of a dask cluster that runs already, with two workers."""
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1", memory_limit=0
    ) as cluster:
        yield {"engine": "dask", "workers": None, "scheduler": cluster.scheduler_address}


@pytest.fixture(params=ELSEWHERE)
def elsewhere(request):
    """Settings of an engine whose two workers are other processes."""
    if request.param == "dask":
        return request.getfixturevalue("cluster")
    return {"engine": "processes", "workers": 2}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic") / "raw"
    synthetic.run(displays=4000, seed=3, out=directory)
    return directory


@pytest.fixture(scope="module")
def outbrain(raw, tmp_path_factory):
    """The settings of a run, and its bytes by one thread."""
    config = OutbrainConfig(raw, tmp_path_factory.mktemp("one") / "out", rows_per_shard=6000, multihot=True, workers=1)
    run(config)
    return config, files(config.out)


@pytest.mark.parametrize(("block", "rows"), [(1 << 22, None), (50_000, 997)])
def test_outbrain_bytes_do_not_depend_on_engine_or_chunks(outbrain, elsewhere, block, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_io, "BLOCK_BYTES", block)
    config = dataclasses.replace(outbrain[0], out=tmp_path / "out", chunk_rows=rows, **elsewhere)
    report = run(config)
    assert files(config.out) == outbrain[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(report["stages"]) == STAGES
    assert report["stages"]["clicks"]["rows"] == report["rows"] > 10_000


def test_workers_that_outlive_a_run_forget_its_tables(outbrain, raw, cluster, tmp_path):
    """Two runs with the same directories and other contents."""
    data = shutil.copytree(SMALL, tmp_path / "data")
    config = OutbrainConfig(data, tmp_path / "out", **cluster)
    run(config)
    for path in raw.iterdir():
        shutil.copy(path, data)
    run(dataclasses.replace(outbrain[0], data_path=data, out=tmp_path / "out", **cluster))
    assert files(tmp_path / "out") == outbrain[1]


def test_a_compressed_file_in_other_processes(outbrain, raw, elsewhere, tmp_path):
    data = shutil.copytree(raw, tmp_path / "data")
    (data / "events.csv.gz").write_bytes(gzip.compress((data / "events.csv").read_bytes(), 1))
    (data / "events.csv").unlink()
    run(dataclasses.replace(outbrain[0], data_path=data, out=tmp_path / "out", **elsewhere))
    got, want = (
        {name: data for name, data in bytes_of.items() if not name.endswith("manifest.json")}
        for bytes_of in (files(tmp_path / "out"), outbrain[1])
    )
    assert got == want  # the manifests name the input


def test_a_bad_line_is_named_by_every_engine(elsewhere, tmp_path):
    data = shutil.copytree(SMALL, tmp_path / "data")
    lines = (data / "clicks_train.csv").read_text().splitlines(keepends=True)
    (data / "clicks_train.csv").write_text("".join([*lines[:3], "1,1,2\n", *lines[4:]]))
    with pytest.raises(InputError, match="line 4: column clicked: expected an integer from 0 to 1, found '2'"):
        run(OutbrainConfig(data, tmp_path / "out", **elsewhere))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.fixture
def small(tmp_path):
    """Of a run that will find an earlier output in its place, and the bytes of a whole run."""
    config = OutbrainConfig(SMALL, tmp_path / "out", rows_per_shard=5, chunk_rows=4, workers=1)
    run(dataclasses.replace(config, out=tmp_path / "whole"))
    run(dataclasses.replace(config, seed=5))
    return config, files(tmp_path / "whole")


def test_a_lost_worker_leaves_the_earlier_output_and_the_finished_stages(small, tmp_path, monkeypatch):
    config, whole = small
    before = files(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(transform, "run", chunk_functions.transform_until_row_8)
        with pytest.raises(RunError, match=r"a worker process ended .* the same command continues"):
            run(dataclasses.replace(config, engine="processes", workers=2))
    assert files(config.out) == before
    assert (tmp_path / ".out.part" / "journal.json").is_file()
    assert run(config)["resumed_stages"] == STAGES[:7]
    assert files(config.out) == whole
    assert not (tmp_path / ".out.part").exists()


KILLED = """
import os, signal, sys
from preprocess.outbrain import OutbrainConfig, pipeline, run
class Writer(pipeline.ShardWriter):
    def append(self, arrays):
        if self.rows >= 8:
            os.kill(os.getpid(), signal.SIGKILL)
        super().append(arrays)
if __name__ == "__main__":
    pipeline.ShardWriter = Writer
    run(OutbrainConfig(sys.argv[1], sys.argv[2], rows_per_shard=5, chunk_rows=4, engine="processes", workers=2))
"""


def test_a_killed_run_continues_with_another_engine(small, elsewhere, tmp_path):
    config, whole = small
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "script.py", config.data_path, config.out]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    report = run(dataclasses.replace(config, **elsewhere))
    assert report["resumed_stages"] == STAGES[:7]
    assert files(config.out) == whole


def test_a_worker_that_does_not_see_the_files_is_named(cluster, tmp_path):
    with make("dask", None, tmp_path, scheduler=cluster["scheduler"]) as pool:
        pool.check_sees([tmp_path])
        with pytest.raises(InputError, match=r"nowhere: worker tcp://.* does not see it; workers must share"):
            pool.check_sees([tmp_path, tmp_path / "nowhere"])


def test_a_memory_limit_counts_each_worker_process(tmp_path):
    table_bytes = 50 << 20

    def rows(megabytes, pool):
        config = OutbrainConfig(SMALL, tmp_path / "out", memory_limit=megabytes << 20, rows_per_shard=1 << 20)
        return memory.chunk_rows(config, table_bytes, pool)

    with ThreadEngine(4) as threads, make("processes", 4, tmp_path) as processes:
        assert rows(300, threads) == pytest.approx((300 - 128 - 50 - 100) * 2**20 / (9 * 300), abs=1)
        with pytest.raises(InputError, match=r"expected at least 8[0-9][0-9] MiB .* fewer workers"):
            rows(300, processes)
        more = 4 * processes.worker_bytes >> 20
        assert rows(300 + more, processes) == rows(300, threads)
        config = OutbrainConfig(SMALL, tmp_path / "out", memory_limit=300 << 20)
        with pytest.raises(InputError, match="memory_limit is 300 MiB"):
            memory.block_bytes(config, {}, processes)


@pytest.mark.parametrize("rows_per_shard", [1, 1 << 16, 3 << 16, 1 << 18, 1 << 22])
@pytest.mark.parametrize("events", [0, (200 << 20) + 4321])  # reading takes less than writing shards, or more
@pytest.mark.parametrize("workers", [1, 16])
def test_the_memory_limit_that_is_named_is_the_least_that_is_accepted(tmp_path, workers, events, rows_per_shard):
    path = tmp_path / "events.csv"
    with open(path, "wb") as file:
        file.truncate(events)

    def named(limit):
        """MiB of the refusal; None if there is none."""
        config = OutbrainConfig(SMALL, tmp_path / "out", memory_limit=limit << 20, rows_per_shard=rows_per_shard)
        try:
            with ThreadEngine(workers) as pool:
                memory.block_bytes(config, {"events": path}, pool)
                memory.chunk_rows(config, 0, pool)
        except InputError as error:
            return int(re.search(r"expected at least (\d+) MiB", str(error))[1])

    least = named(1)
    assert named(least) is None
    assert named(least - 1) == least


LIMITED = """
import sys
from pathlib import Path
from preprocess.outbrain import OutbrainConfig, run
limit = int(sys.argv[3])
run(OutbrainConfig(sys.argv[1], sys.argv[2], workers=16, rows_per_shard=100_000, memory_limit=limit))
# Not getrusage, whose peak a process has from the one that started it.
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(memory._glibc() is None, reason="the heaps of another C library are not ours to count")
def test_a_memory_limit_holds_with_many_threads(tmp_path):
    """Half a million rows; with a heap a thread the process grew to 280 MiB."""
    synthetic.run(displays=100_000, seed=0, out=tmp_path / "raw")
    limit = 210 << 20
    command = [sys.executable, "-c", LIMITED, tmp_path / "raw", tmp_path / "out", str(limit)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) << 10 < limit


SPEC = """
feature_spec:
  label: {}
  colour: {embedding_dim: 4, transform: vocabulary}
  size: {transform: standardise}
source_spec: {}
channel_spec: {label: [label], onehot_categorical: [colour], multihot_categorical: [], numerical: [size], map: []}
"""


def test_tables_give_the_same_bytes_by_every_engine(elsewhere, tmp_path):
    rows = [f"{i % 2},{'red' if i % 3 else 'blue'},{i / 7:.3f}\n" for i in range(3000)]
    (tmp_path / "a.csv").write_text("label,colour,size\n" + "".join(rows))
    (tmp_path / "spec.yaml").write_text(SPEC)
    config = TabularConfig(
        tmp_path / "spec.yaml", tmp_path / "one", [str(tmp_path / "a.csv")], split="random:0.2", workers=1
    )
    assert list(run_tabular(config)["stages"]) == ["learn", "write"]
    report = run_tabular(dataclasses.replace(config, out=tmp_path / "out", chunk_bytes=999, **elsewhere))
    assert report["stages"]["write"]["rows"] == 3000
    assert files(tmp_path / "out") == files(tmp_path / "one")
    (tmp_path / "a.csv").write_text("label,colour,size\n" + "".join(rows) + "1,red\n")
    with pytest.raises(InputError, match=r"a\.csv, line 3002: expected 3 fields, found 2"):
        run_tabular(dataclasses.replace(config, out=tmp_path / "bad", chunk_bytes=999, **elsewhere))
    assert not (tmp_path / "bad").exists()


def test_records_give_the_same_bytes_by_every_engine(elsewhere, tmp_path):
    test_tfrecord.write_directory(tmp_path / "records")
    config = TFRecordConfig(tmp_path / "records", tmp_path / "one", workers=1)
    assert run_tfrecord(config)["stages"]["train"]["rows"] == 192
    run_tfrecord(dataclasses.replace(config, out=tmp_path / "out", **elsewhere))
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_the_flags_of_an_engine(tmp_path, capsys):
    words = ["preprocess", "outbrain", "--data_path", str(SMALL), "--out", str(tmp_path / "out")]
    assert main([*words, "--engine", "processes", "--workers", "2"]) == 0
    assert main([*words, "--engine", "threads", "--scheduler", "tcp://a:1"]) == 2
    assert "scheduler is tcp://a:1, expected none with engine 'threads'" in capsys.readouterr().err
