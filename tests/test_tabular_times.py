"""Splits by time: numbers, dates and instants, one kind in all rows, and what a time of another kind is told."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_tabular_inputs import csv_bytes, read, rows, write_spec

from preprocess.tabular import TabularConfig, run
from widedeep.errors import InputError


@pytest.mark.parametrize(
    ("split", "first"), [("time:day:2016-06-20", 20), ("time:day:2016-06-20 00:00:00", 20), ("time:day:0.25", None)]
)
@pytest.mark.parametrize("kind", ["csv", "parquet", "views", "number"])
def test_a_split_by_time_tests_on_the_latest_rows(tmp_path, split, first, kind):
    table = rows(500)
    days = np.array([int(day[-2:]) for day in table["day"].to_pylist()])
    if kind == "number":
        table = table.set_column(6, "day", pa.array(days * 86400))
        split = f"time:day:{20 * 86400}" if first else split
    if kind == "parquet":
        table = table.set_column(6, "day", table["day"].cast(pa.timestamp("s")))
    if kind == "views":  # texts as polars writes them
        table = table.set_column(6, "day", table["day"].cast(pa.string_view()))
    path = tmp_path / {"parquet": "a.parquet", "views": "a.arrow"}.get(kind, "a.csv")
    if kind == "views":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path) if kind == "parquet" else path.write_bytes(csv_bytes(table))
    spec = write_spec(tmp_path / "spec.yaml")
    for chunk_bytes in (300, 1 << 20):
        out = tmp_path / f"out{chunk_bytes}"
        run(TabularConfig(spec, out, [path], split=split, chunk_bytes=chunk_bytes))
        first = first or next(d for d in sorted(set(days), reverse=True) if (days >= d).mean() >= 0.25)
        clicks = np.array(table["click"].to_pylist())
        assert read(out / "train")["click"].tolist() == clicks[days < first].tolist()
        assert read(out / "test")["click"].tolist() == clicks[days >= first].tolist()


@pytest.mark.parametrize(
    ("split", "cell", "words"),
    [
        ("time:day:0.5", "later", "line 5: column day: expected a time without a zone such .* as in the rows before"),
        ("time:day:0.5", "", "line 5: column day: expected a time, found no value"),
        ("time:day:2016-06-15", "17", "line 5: column day: expected a time without a zone such as"),
        (
            "time:day:2016-06-15",
            "2016-06-14T12Z",
            "line 5: column day: expected a time without a zone .* before, found",
        ),
        ("time:day:17", None, r"time:day: expected a time without .*, as in the rows \('2016-06-..'\), got '17'$"),
        ("time:day:2016-06-15T00Z", None, r"split: time:day: expected a time without a zone .*, got '2016-06-15T00Z'$"),
        ("time:size:2016-06-15", None, r"split: time:size: expected a number, as in .* \('.*'\), got '2016-06-15'$"),
        ("time:city:17", None, r"line 2: column city: expected a time such as ((?!rows before).)*, or a number, found"),
        (
            "time:day:soon",
            None,
            "split: time:day: expected a time such ((?!rows before).)*, or a number, found 'soon'$",
        ),
        ("time:day", None, "split: expected random:SHARE"),
        ("time:date:0.5", None, "column date is missing"),
        ("time:click:0.9", None, "split: column click: expected rows before the test rows"),
    ],
)
def test_times_that_do_not_fit(tmp_path, split, cell, words):
    table = rows(10)
    if cell is not None:
        days = table["day"].to_pylist()
        table = table.set_column(6, "day", pa.array([*days[:3], cell, *days[4:]]))
    (tmp_path / "a.csv").write_bytes(csv_bytes(table))
    with pytest.raises(InputError, match=words):
        run(TabularConfig(write_spec(tmp_path / "spec.yaml"), tmp_path / "out", [tmp_path / "a.csv"], split=split))
    assert not (tmp_path / "out").exists()


INSTANTS = [
    "2024-01-21T18:04:38Z",
    "2024-01-21T18:04:38.000+00:00",
    "2024-01-21T18:04:38.1234567Z",
    "2024-01-21T19:04:39+01:00",
    "2024-01-21 12:34:40-0530",
]


def timed(tmp_path, times, split):
    """How many of rows with these times (in CSV if they are texts) are test rows."""
    table = rows(len(times)).set_column(6, "day", pa.array(times))
    path = tmp_path / ("a.csv" if isinstance(times, list) else "a.parquet")
    path.write_bytes(csv_bytes(table)) if path.suffix == ".csv" else pq.write_table(table, path)
    return run(TabularConfig(write_spec(tmp_path / "spec.yaml"), tmp_path / "out", [path], split=split))["test"]["rows"]


@pytest.mark.parametrize(
    ("first", "test"),
    [
        ("0.4", 2),
        ("2024-01-21T18:04:38.1Z", 3),
        ("2024-01-21T23:34:39+05:30", 2),
        ("2024-01-21T18:04:40.000Z", 1),
    ],
)
def test_times_with_a_zone_are_compared_as_instants(tmp_path, first, test):
    assert timed(tmp_path, INSTANTS, f"time:day:{first}") == test
    stored = [np.datetime64("2024-01-21T18:04:38", "ms").item()] * 2
    stored += [np.datetime64(f"2024-01-21T18:04:{second}", "ms").item() for second in ("38.123", 39, 40)]
    assert timed(tmp_path, pa.array(stored, pa.timestamp("ms", "Asia/Tokyo")), f"time:day:{first}") == test


def test_times_without_a_zone_may_have_fractions(tmp_path):
    times = ["2024-01-21T18:04:38", "2024-01-21 18:04:38.5", "2024-01-21T18:04:38.123456789", "2024-01-22"]
    times.append("2024-01-20")
    assert timed(tmp_path, times, "time:day:2024-01-21T18:04:38.4") == 2


@pytest.mark.parametrize("stored", [False, True])
def test_times_with_and_without_a_zone_are_not_mixed(tmp_path, stored):
    times = pa.array([np.datetime64(text[:19]).item() for text in INSTANTS], pa.timestamp("us", "UTC"))
    with pytest.raises(InputError, match=r"split: time:day: expected a time with a zone .* rows .*, got '2024-01-21'$"):
        timed(tmp_path, times if stored else INSTANTS, "time:day:2024-01-21")
    later = pa.array(times.to_pylist(), pa.timestamp("us")) if stored else ["2024-01-21T18:04:38"] * 5
    for name, days in (("a", times if stored else pa.array(INSTANTS)), ("b", pa.array(later))):
        pq.write_table(rows(5).set_column(6, "day", days), tmp_path / f"{name}.parquet")
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(InputError, match=r"b.parquet, row 1: column day: expected a time with a zone .* before, found"):
        run(TabularConfig(write_spec(tmp_path / "spec.yaml"), tmp_path / "out", files, split="time:day:0.4"))


def test_a_split_by_times_in_nanoseconds(tmp_path):
    times = 1_700_000_000_000_000_001 + np.arange(200) * 10**9
    pq.write_table(rows().set_column(6, "day", pa.array(times)), tmp_path / "a.parquet")
    spec = write_spec(tmp_path / "spec.yaml")
    report = run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.parquet"], split="time:day:0.2"))
    assert report["test"]["rows"] == 40


@pytest.mark.parametrize(
    ("share", "times", "test"),
    [
        ("0.8", range(10), 8),
        ("0.9", range(10), 9),
        ("0.34", range(100), 34),
        ("0.01", range(10), 1),
        ("0.4", [0, 0, 0, 0, 0, 1, 1, 1, 2, 2], 5),  # all rows of the first time
    ],
)
def test_a_share_by_time_is_rounded(tmp_path, share, times, test):
    pq.write_table(rows(len(times)).set_column(6, "day", pa.array([*times])), tmp_path / "a.parquet")
    spec = write_spec(tmp_path / "spec.yaml")
    report = run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.parquet"], split=f"time:day:{share}"))
    assert report["test"]["rows"] == test
