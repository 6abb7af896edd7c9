"""The preprocessing benchmark on a small input: the contenders do the same work, and one that does not is refused."""

import copy
import json
from importlib.util import find_spec

import pytest

from bench import preprocess
from widedeep.errors import InputError, RunError


@pytest.fixture(scope="module")
def report():
    peers = ",".join(name for name in preprocess.PEERS if find_spec(name))
    arguments = ["--displays", "1500", "--rounds", "1", "--workers", "2", "--peers", peers or "none"]
    return preprocess.run(preprocess.options().parse_args(arguments))


def test_contenders_agree_and_are_described(report):
    names = [row["name"] for row in report["contenders"]]
    assert names[:2] == list(preprocess.OURS)
    for row in report["contenders"]:
        assert row["peak_mib"] > 10
        assert 0 < sum(row["stages"].values()) <= row["seconds"]
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
        preprocess.measure("pandas", tmp_path, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
