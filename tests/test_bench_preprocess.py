"""The preprocessing benchmark on a small input: the contenders do the same work, and one that does not is refused."""

import copy
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from bench import preprocess, preprocess_child
from widedeep.errors import InputError, RunError


@pytest.fixture(scope="module")
def report():
    peers = ",".join(name for name in preprocess.PEERS if find_spec(name))
    arguments = ["--displays", "1500", "--rounds", "1", "--workers", "2", "--peers", peers or "none", "--engine", "all"]
    return preprocess.run(preprocess.options().parse_args(arguments))


def test_contenders_agree_and_are_described(report):
    names = [row["name"] for row in report["contenders"]]
    ours = ["widedeep (threads)", "widedeep, tables only (threads)", "widedeep (processes)"]
    assert names[:3] == ours
    assert ("widedeep (dask)" in names) == (find_spec("distributed") is not None)
    for row in report["contenders"]:
        assert row["peak_mib"] > 10
        assert 0 < sum(row["stages"].values()) <= row["seconds"]
        assert "device_mib" not in row
        assert ("times widedeep" in row) == (row["name"] not in ours[:2])
    text = preprocess.text(report)
    for word in (*names, report["commit"], report["versions"]["pyarrow"], f"{report['rows']:,}"):
        assert word in text
    assert json.loads(json.dumps(report)) == report


def test_other_work_is_refused():
    want = {"rows": {"train": 10, "test": 3}, "means": {"ad_id_ctr": 0.2, "ad_id_count": 0.0}}
    preprocess.check("polars", want, want)
    for change in (("rows", "train", 11), ("means", "ad_id_ctr", 0.21), ("means", "ad_id_count", 0.001)):
        got = copy.deepcopy(want)
        got[change[0]][change[1]] = change[2]
        with pytest.raises(RunError, match="polars did other work"):
            preprocess.check("polars", got, want)


def test_an_absent_peer_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(preprocess, "find_spec", lambda name: None if name == "polars" else object())
    assert preprocess.chosen("all") == (["pandas"], {"polars": "polars is not installed"})
    assert preprocess.chosen("none") == ([], {})
    with pytest.raises(InputError, match="--peers"):
        preprocess.chosen("dask")


def test_a_contender_that_fails_is_named(tmp_path):
    with pytest.raises(RunError, match="pandas failed"):
        preprocess.measure(("pandas", ""), tmp_path, tmp_path / "out", 1, "cpu")
    assert not (tmp_path / "out").exists()


def test_an_absent_dask_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(preprocess, "find_spec", lambda name: None)
    assert preprocess.engines_of("all", {}) == (["threads", "processes"], {"engine dask": "dask is not installed"})
    with pytest.raises(InputError, match="--engine dask"):
        preprocess.engines_of("dask", {})


def test_memory_of_a_device_is_a_column_of_its_own(report):
    assert "GPU MiB" not in preprocess.text(report)
    rows = [row | {"device_mib": 7654.3} for row in report["contenders"][:1]] + report["contenders"][1:]
    text = preprocess.text(report | {"contenders": rows})
    assert "GPU MiB" in text
    assert "7654" in text


def test_memory_is_that_of_the_process_and_all_below_it():
    before = preprocess_child.tree_bytes()
    code = "import sys; data = bytearray(b'x' * (300 << 20)); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()
        grown = preprocess_child.tree_bytes() - before  # this process may have given some memory back meanwhile
        assert 200 << 20 < grown < 400 << 20
        child.stdin.close()
