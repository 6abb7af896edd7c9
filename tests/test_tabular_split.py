"""The rules that part train rows from test rows, one by one, over chunks of any size."""

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from preprocess.tabular.columns import Column
from preprocess.tabular.split import parse
from widedeep.errors import InputError
from widedeep.splitmix import absorb, mix64_


def of_test(text, n=None, values=None, seed=0, cuts=(), column="x"):
    """Which of n rows, of these values in the column, are test rows, with the rows in the chunks between `cuts`."""
    n = len(values) if n is None else n
    split = parse(text, seed, column)
    chunks = []
    for rows in np.split(np.arange(n), cuts):
        array = None if values is None else pa.array([values[row] for row in rows], pa.array(values).type)
        chunks.append((rows, {} if array is None else {column: Column.of(array)}))
    if split.surveys:
        for chunk in chunks:
            split.survey(*chunk)
    return np.concatenate([split.is_test(*chunk) for chunk in chunks]).tolist()


CUTS = [(), (1,), (300,), (7, 7, 100, 599)]


def selected(ids, share, seed):
    z = mix64_(ids.astype(np.uint64) ^ np.uint64(absorb(0, seed)))
    return ((z >> np.uint64(11)).astype(np.float64) / 2**53 < share).tolist()


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("seed", [0, 5])
def test_by_chance(cuts, seed):
    want = selected(np.arange(1000), 0.3, seed)
    assert of_test("random:0.3", 1000, cuts=cuts, seed=seed) == want
    assert 250 < sum(want) < 350
    assert want != selected(np.arange(1000), 0.3, seed + 1)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("seed", [0, 5])
def test_by_group(cuts, seed):
    """Every row of a group by the hash of its text, whatever its type; a row without one is for training."""
    g = np.random.default_rng(seed)
    values = [None if g.random() < 0.1 else int(v) for v in g.integers(0, 200, 1000)]
    digests = np.array([xxhash.xxh3_64_intdigest(str(v).encode()) for v in values], np.uint64)
    want = [one and v is not None for one, v in zip(selected(digests, 0.3, seed), values)]
    texts = [None if v is None else str(v) for v in values]
    for same in (values, texts):
        assert of_test("group:0.3", values=same, seed=seed, cuts=cuts) == want
    assert 150 < sum(want) < 400


@pytest.mark.parametrize("cuts", CUTS[:3])
@pytest.mark.parametrize(
    ("text", "n", "count"),
    [
        ("last:1", 1000, 1),
        ("last:999", 1000, 999),
        ("last:0.25", 1000, 250),
        ("last:0.25", 1003, 251),
        ("last:0.001", 1000, 1),
        ("last:0.999", 1000, 999),
        ("last:0.0001", 1000, 0),
    ],
)
def test_by_place(text, n, count, cuts):
    """A share is rounded to the nearest number of rows."""
    assert of_test(text, n, cuts=cuts) == [False] * (n - count) + [True] * count


@pytest.mark.parametrize("text", ["last:1000", "last:1001", "last:0.9999"])
def test_by_place_some_rows_are_left_to_learn_from(text):
    with pytest.raises(InputError, match=r"split: expected fewer than the 1000 rows there are, got last:100[01]$"):
        of_test(text, 1000)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("share", "count"), [(0.2, 200), (0.0001, 1), (0.9985, 998), (0.0015, 2)])
def test_by_a_share_of_the_times(share, count, cuts):
    times = np.random.default_rng(1).permutation(1000)
    want = (times >= 1000 - count).tolist()
    assert of_test(f"time:x:{share}", values=times.tolist(), cuts=cuts) == want


@pytest.mark.parametrize("cuts", CUTS)
def test_by_a_share_of_the_times_equal_ones_stay_together(cuts):
    times = np.random.default_rng(2).integers(0, 20, 1000)
    first = np.sort(times)[-300]
    got = of_test("time:x:0.3", values=times.tolist(), cuts=cuts)
    assert got == (times >= first).tolist()
    assert 300 < sum(got) < 370


@pytest.mark.parametrize("times", [[5] * 9, [5] * 8 + [6], [4] + [5] * 8, list(range(9))])
def test_by_a_share_of_the_times_earlier_ones_are_left_to_learn_from(times):
    """The time from which half of the rows lie must not be the first one."""
    if times[0] < times[4]:
        assert of_test("time:x:0.5", values=times) == [time >= times[-4] for time in times]
        return
    with pytest.raises(InputError, match="column x: expected rows before the test rows, found one time only"):
        of_test("time:x:0.5", values=times)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("first", "count"), [("7", 3), ("7.0", 3), ("7.5", 2), ("-1", 10), ("10", 0), ("9", 1)])
def test_from_a_time_on(first, count, cuts):
    """A row of that very time is a test row."""
    assert of_test(f"time:x:{first}", values=list(range(10)), cuts=[c for c in cuts if c < 10]) == (
        [False] * (10 - count) + [True] * count
    )


def test_from_a_date_on_to_the_microsecond():
    days = ["2016-06-14 12:00:00.999999", "2016-06-14 12:00:01", "2016-06-14 12:00:01.000001"]
    assert of_test("time:x:2016-06-14 12:00:01", values=days) == [False, True, True]
    assert of_test("time:x:2016-06-14T12:00:01.000001", values=days) == [False, False, True]
    stored = pa.array(days).cast(pa.timestamp("us")).to_pylist()
    assert of_test("time:x:2016-06-14T12:00:01.000001", values=stored) == [False, False, True]
    zoned = [day + "+02:00" for day in days]
    assert of_test("time:x:2016-06-14T10:00:01Z", values=zoned) == [False, True, True]


@pytest.mark.parametrize(
    "text",
    [
        *("random:0", "random:1", "random:1.0", "random:0.0", "random:1.5", "random:", "random:-0.1", "random:nan"),
        *("group:0", "group:1", "last:0", "last:0.0", "last:1.5", "time:x", "time::0.5", "half", ""),
    ],
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(InputError, match=r"^split: expected .*, got '"):
        parse(text, 0, "x")
