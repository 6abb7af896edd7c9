"""The whole Outbrain job with device "cuda" against device "cpu": the same bytes. Real cupy where there is a GPU."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import strict_cupy
from outbrain_checks import files, shuffled_raw

from preprocess.outbrain import OutbrainConfig, run
from widedeep.shards import ShardSet

SMALL = Path(__file__).parent / "data" / "outbrain"
SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """8,000 click rows with nulls and a heavy tail; clicks in no order, so test rows need sorting."""
    return shuffled_raw(tmp_path_factory.mktemp("synthetic") / "raw", displays=1600, seed=13)


@pytest.fixture(scope="module")
def wanted(raw, tmp_path_factory):
    """The output of device "cpu" by flavour."""
    outputs = {}
    for flavour, multihot in (("nvtabular", True), ("spark", False)):
        out = tmp_path_factory.mktemp("cpu") / flavour
        config = OutbrainConfig(raw, out, flavour=flavour, multihot=multihot, rows_per_shard=3000)
        outputs[flavour] = config, run(config)
    return outputs


def check(got: Path, want: Path) -> None:
    """Rows, ids, labels and groups bit for bit; numbers to a rounding of float32. The stand-in gives the very bytes."""
    for split in SPLITS:
        ours, theirs = (ShardSet.open(path / split, verify=True) for path in (got, want))
        assert ours.rows == theirs.rows > 0
        ours, theirs = ours.read(0, ours.rows), theirs.read(0, theirs.rows)
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(ours[name], values, rtol=2**-23, atol=0, err_msg=f"{split} {name}")
            else:
                np.testing.assert_array_equal(ours[name], values, err_msg=f"{split} {name}")


@pytest.mark.parametrize("flavour", ["nvtabular", "spark"])
@pytest.mark.parametrize("change", [{"workers": 1}, {"workers": 3, "chunk_rows": 997}])
def test_a_gpu_writes_what_a_cpu_writes(flavour, change, wanted, tmp_path, monkeypatch, cupy):
    monkeypatch.setattr("preprocess.csv_io.BLOCK_BYTES", 30_011)
    config, report = wanted[flavour]
    made = run(dataclasses.replace(config, out=tmp_path / "cuda", device="cuda", **change))
    check(tmp_path / "cuda", Path(config.out))
    for split in SPLITS:
        assert made[split] == report[split]
    if cupy is strict_cupy:
        assert files(tmp_path / "cuda") == files(Path(config.out))


def test_the_small_files_with_all_their_nulls_give_the_same(tmp_path, cupy):
    for device in ("cpu", "cuda"):
        run(OutbrainConfig(SMALL, tmp_path / device, multihot=True, device=device, workers=1))
    check(tmp_path / "cuda", tmp_path / "cpu")


def test_files_that_are_missing_are_null_on_a_gpu_too(raw, tmp_path, cupy):
    (tmp_path / "raw").mkdir()
    for name in ("clicks_train", "events", "promoted_content"):
        (tmp_path / "raw" / f"{name}.csv").symlink_to(raw / f"{name}.csv")
    for device in ("cpu", "cuda"):
        run(OutbrainConfig(tmp_path / "raw", tmp_path / device, multihot=True, device=device, workers=2))
    check(tmp_path / "cuda", tmp_path / "cpu")


def test_tables_go_to_the_device_once_and_results_wait_once_a_chunk(wanted, tmp_path, monkeypatch):
    """Counted on the stand-in: neither uploads nor device memory grow with the number of chunks or threads."""
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy)
    config, report = wanted["nvtabular"]
    counted = []
    for chunk_rows in (4000, 500):
        strict_cupy.counts.clear()
        run(dataclasses.replace(config, out=tmp_path / "out", device="cuda", workers=4, chunk_rows=chunk_rows))
        chunks = sum(-(-report[split]["rows"] // chunk_rows) for split in SPLITS)
        counted.append((chunks, strict_cupy.counts.copy()))
    (few, one), (many, other) = counted
    assert many > 3 * few
    assert one["uploads"] == other["uploads"]
    assert other["waits"] - one["waits"] == many - few
    assert other["freed"] >= 2
    # Each kernel of its own that cupy had to compile would cost a fresh machine a tenth of a second or more.
    assert other["launches"] > 0
    assert other["compiled"] == 0
