"""The parts of tabular preprocessing on their own: dictionary-encoded columns, and statistics merged over chunks."""

import decimal
import math
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from pyarrow import feather

from preprocess.engine import ThreadEngine
from preprocess.tabular import source, transforms
from preprocess.tabular.columns import BadCell, Column, Lists

DRAWS = np.random.default_rng(0)
NUMBERS = {
    "skewed": DRAWS.lognormal(0, 2, 10_000) + 1e6,
    "around 0": np.concatenate([DRAWS.normal(size=5000)] * 2) * np.repeat([1, -1], 5000),
    "of all sizes": DRAWS.normal(size=10_000) * 10.0 ** DRAWS.integers(-140, 140, 10_000),
    "nanoseconds of a second": 1_465_876_799e9 + DRAWS.integers(0, 10**9, 10_000),
    "denormal": DRAWS.integers(-9, 10, 10_000) * 5e-324,
    "constant": np.full(10_000, 1465876799998.0),
    "constant fraction": np.full(9, 0.1),
    "one": np.array([-3.5]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_moments_are_exact_and_do_not_depend_on_the_pieces(name, monkeypatch):
    monkeypatch.setattr(transforms, "EXACT_ROWS", 4000)
    values = NUMBERS[name]
    results = set()
    for pieces in (1, 7, 1000):
        moments = transforms.Moments()
        for piece in np.array_split(DRAWS.permutation(values), pieces):
            moments.add(piece)
        results.add((moments.mean(), moments.deviation()))
    mean, deviation = results.pop()
    assert not results
    assert mean == statistics.mean(values.tolist())
    assert deviation == pytest.approx(statistics.pstdev(values.tolist()), rel=1e-15, abs=0)


def test_a_constant_of_all_digits_stays_one_however_many_rows():
    """Sums of pieces of 18 bits are exact only while they fit into 53."""
    value, rows = float(np.nextafter(2, 1)), (1 << 17) + 1
    moments = transforms.Moments()
    moments.add(np.full(rows, value))
    assert (moments.mean(), moments.deviation()) == (value, 0)


def test_moments_of_nothing_and_of_repeated_values():
    moments = transforms.Moments()
    assert (moments.mean(), moments.deviation()) == (0, 0)
    moments.add(np.array([1.0, 4.0]), 3)
    moments.add(np.array([1.0]), 3)
    assert (moments.mean(), moments.deviation()) == (2, math.sqrt(2))


def slow_number(values, train, fill, clip, log, standardise):
    """fill, clip, log and standardise one after the other, learned from train rows as they stand before each."""
    if fill in ("mean", "median"):
        known = sorted(v for v, t in zip(values, train) if t and not math.isnan(v))
        fill = statistics.mean(known) if fill == "mean" else known[(len(known) - 1) // 2]
    x = np.array([fill if math.isnan(v) else v for v in values])
    if clip:
        x = np.minimum(np.maximum(x, clip[0]), clip[1])
    if log:
        x = np.where(x < 0, -1, 1) * np.log(1 + np.abs(x))
    if standardise:
        learned = x[np.array(train)].tolist()
        x = (x - statistics.mean(learned)) / (statistics.pstdev(learned) or 1)
    return x


@pytest.mark.parametrize("seed", [8, 9])  # of an odd and of an even number of values to learn from
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("clip", [None, (-2.0, 3.0), (5.0, 6.0)])
@pytest.mark.parametrize("fill", ["mean", "median", 0.0, 40.0])
def test_numbers_are_filled_clipped_logged_and_standardised_in_that_order(fill, clip, log, standardise, seed):
    """Of train rows alone: those of the test set are larger, and lack values in other places."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(1, 4, 301), rng.normal(30, 4, 99)])
    values[rng.random(400) < 0.2] = np.nan
    order = rng.permutation(400)
    values, train = values[order], order < 301
    number = transforms.Number(fill, clip, log, standardise)
    chunks = np.split(np.arange(400), [0, 7, 250])
    column = [Column.of(pa.array(values[rows], from_pandas=True)) for rows in chunks]
    for rows, part in zip(chunks, column):
        number.learn(part, train[rows], rows)
    number.finish()
    want = slow_number(values.tolist(), train.tolist(), fill, clip, log, standardise)
    got = np.concatenate([number.apply(part, "float32") for part in column])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    again = transforms.Number(fill, clip, log, standardise)
    again.load(number.state())
    np.testing.assert_array_equal(np.concatenate([again.apply(part, "float32") for part in column]), got)


def test_what_is_constant_in_train_rows_is_only_centred():
    number = transforms.Number(None, None, False, True)
    column = Column.of(pa.array([0.3, 0.3, 0.3, 2.3]))
    number.learn(column, np.array([True, True, True, False]), np.arange(4))
    number.finish()
    np.testing.assert_array_equal(number.apply(column, "float32"), np.float32([0, 0, 0, 2]))


def test_numbers_are_rounded_to_float32_and_then_to_what_is_stored():
    """As a trainer rounds that reads float32: what float16 has in the middle of two goes to the even one."""
    column = Column.of(pa.array([1 + 2**-11 + 2**-30, 1 + 2**-11 + 2**-20]))
    got = transforms.Number(None, None, False, False).apply(column, "float16")
    assert got.dtype == np.float16
    assert got.tolist() == [1, 1 + 2**-10]


def test_a_sample_of_many_rows_is_uniform_and_does_not_depend_on_the_pieces(monkeypatch):
    monkeypatch.setattr(transforms, "SAMPLE_ROWS", 1000)
    values = np.arange(20_000.0)
    samples = []
    for pieces in (1, 13):
        sample = transforms.Sample()
        for rows in np.array_split(np.arange(len(values)), pieces):
            sample.add(values[rows], np.ones(len(rows), bool), rows)
        samples.append(np.sort(sample.values()))
    np.testing.assert_array_equal(samples[0], samples[1])
    assert len(samples[0]) == 1000
    np.testing.assert_allclose(np.quantile(samples[0], [0.25, 0.5, 0.75]), [5000, 10_000, 15_000], atol=1200)


@pytest.mark.parametrize("seed", [0, 9])
def test_groups_are_integers_of_64_bits_or_hashes_without_the_sign(seed):
    texts = ["x", "y", "", "x", "é"]
    want = [xxhash.xxh3_64_intdigest(text.encode(), seed) for text in texts]
    got = transforms.Group(True, seed).apply(Column.of(pa.array(texts)))
    assert got.tolist() == [digest // 2 for digest in want]
    ids = [2**63 - 1, -(2**63), 0, 2**31, -(2**31) - 1]
    assert transforms.Group(False, seed).apply(Column.of(pa.array(ids))).tolist() == ids
    assert transforms.Group(False, seed).apply(Column.of(pa.array(map(str, ids)))).tolist() == ids


@pytest.mark.parametrize("rows", [99, 100, 101])
def test_a_sample_of_few_rows_is_all_of_them(rows, monkeypatch):
    monkeypatch.setattr(transforms, "SAMPLE_ROWS", 100)
    sample = transforms.Sample()
    sample.add(np.arange(rows + 2.0), np.arange(rows + 2) < rows, np.arange(rows + 2))
    assert len(sample.values()) == min(rows, 100)
    assert set(sample.values()) <= set(range(rows))


def test_texts_that_are_finite_numbers():
    numbers = [transforms.number_of(text) for text in ("7", " -7.50", "1e3", "inf", "-Infinity", "nan", "1_0", "x", "")]
    assert numbers == [7, -7.5, 1000, *[None] * 6]


def test_a_vocabulary_is_strange_to_a_hundred_values_of_which_none_in_a_hundred_is_known():
    told = [transforms.are_strange(*pair) for pair in ((0, 99), (0, 100), (1, 100), (1, 101), (2, 200), (1, 200))]
    assert told == [False, True, False, True, False, True]


def test_columns_and_lists_hold_what_arrow_holds():
    column = Column.of(pa.chunked_array([["a", None], ["b", "a"]]))
    assert column.codes.tolist() == [0, -1, 1, 0]
    assert column.counts(np.array([True, True, False, True])).tolist() == [2, 0]
    assert Column.of(pa.array([1.5, float("nan"), None])).codes.tolist() == [0, -1, -1]
    unsigned = pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.uint32()), ["a", "b"])
    assert Column.of(unsigned).codes.tolist() == [1, -1, 0]
    lists = Lists.of(pa.array([["a"], None, [], ["b", None, "a"]]))
    ids = np.where(lists.elements.codes < 0, -1, lists.elements.codes + 1)
    padded, cut = lists.padded(ids, 2)
    assert padded.tolist() == [[1, -1], [-1, -1], [-1, -1], [2, -1]]
    assert cut == 1
    sliced = Lists.of(pa.array([["a"], ["b", "c"], ["d"]]).slice(1))
    assert sliced.elements.texts == ["b", "c", "d"]
    assert [lists.row_of(element) for element in range(4)] == [0, 3, 3, 3]
    for kind in (pa.large_list, pa.list_view, pa.large_list_view):
        array = pa.array([["a"], None, [], ["b", None, "a"]], kind(pa.string()))
        for start in (0, 1):
            same = Lists.of(array.slice(start))
            assert same.lengths.tolist() == [1, 0, 0, 3][start:]
            assert [same.elements.texts[code] if code >= 0 else None for code in same.elements.codes] == (
                ["a", "b", None, "a"][start:]
            )


def test_lists_of_text_stand_in_brackets_or_not():
    texts = ["[1, 2,3]", "1,2 , 3", "[]", "", None, "[,]", " 7 ", "[7", "7]", "[1, 2,3]"]
    lists = Lists.split(Column.of(pa.array(texts)), ",")
    elements = [lists.elements.texts[code] for code in lists.elements.codes]
    ends = np.cumsum(lists.lengths)
    got = [elements[ends[code] - lists.lengths[code] : ends[code]] if code >= 0 else None for code in lists.codes]
    want = [["1", "2", "3"], ["1", "2", "3"], [], [], None, [], ["7"], ["[7"], ["7]"], ["1", "2", "3"]]
    assert got == want
    ids, cut = lists.padded(lists.elements.codes, 2)
    one = [elements.index(text) for text in ("1", "2")]
    assert ids[0].tolist() == ids[1].tolist() == ids[9].tolist() == [lists.elements.codes[at] for at in one]
    assert (ids[2:6] == -1).all()
    assert cut == 3
    odd = lists.chosen_elements(np.arange(10) % 2 == 1)
    assert [odd.texts[code] for code in odd.codes] == ["1", "2", "3", "[7", "1", "2", "3"]


def test_one_value_has_one_text_whatever_its_type():
    texts = ["10", "10000000001", "-3", "0", "2.5", "9007199254740992", "1e+300"]
    values = [10.0, 1e10 + 1, -3.0, -0.0, 2.5, 2.0**53, 1e300]
    assert Column.of(pa.array([*values, None])).texts == [*texts[:5], "9.007199254740992e+15", "1e+300"]
    assert Column.of(pa.array(values[:2], pa.float32())).texts == ["10", "10000000000"]
    halves = pa.array(np.array([10.0, 1.5, 0.1, np.nan], np.float16))
    for array in (halves, pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, None]), halves)):
        assert Column.of(array).texts == ["10", "1.5", "0.0999755859375"]
        assert Column.of(array).codes.tolist() == [0, 1, 2, -1]
    assert Lists.of(pa.array([[1e10, None], [0.5]])).elements.texts == ["10000000000", "0.5"]
    assert Column.of(pa.array([True, False, None])).texts == ["true", "false"]
    assert Column.of(pa.array(["10.0", "True", " a"])).texts == ["10.0", "True", " a"]


def test_blanks_around_numbers_are_ignored():
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.string_view()):
        column = Column.of(pa.array([" 1", "2\t", "3", None], kind))
        np.testing.assert_array_equal(column.numbers(), [1, 2, 3, np.nan])
        assert column.integers(0, 9, -1, "0 to 9").tolist() == [1, 2, 3, -1]
    with pytest.raises(BadCell, match="a number, found ' '") as caught:
        Column.of(pa.array([" 1", " ", "3"])).numbers()
    assert caught.value.row == 1


def test_integers_above_two_to_the_53_are_rounded():
    for kind in (pa.int64(), pa.uint64()):
        assert Column.of(pa.array([2**53 + 1, 2**62, 7], kind)).numbers().tolist() == [2**53, 2**62, 7]
    assert Column.of(pa.array([2**53 + 1])).integers(0, 2**62, None, "") == 2**53 + 1


def test_nulls_of_every_kind():
    assert Column.of(pa.nulls(2)).codes.tolist() == [-1, -1]
    for codes, values in (
        ([0, 1, None], [1.5, float("nan")]),
        ([1, 0, None], [None, 1.5]),
    ):
        column = Column.of(pa.DictionaryArray.from_arrays(codes, pa.array(values)))
        np.testing.assert_array_equal(column.numbers(), [1.5, np.nan, np.nan])
    texts = Column.of(pa.DictionaryArray.from_arrays([1, 0, None, 1], pa.array([None, "a"])))
    assert (texts.codes.tolist(), texts.texts) == ([0, -1, -1, 0], ["a"])
    for text, found in ((None, "no value"), ("no value", "'no value'")):
        with pytest.raises(BadCell, match=f"expected 0 to 9, found {found}$"):
            Column.of(pa.array(["1", text])).integers(0, 9, None, "0 to 9")
    assert Column.of(pa.DictionaryArray.from_arrays([0, None], pa.nulls(1))).codes.tolist() == [-1, -1]
    times = (pa.timestamp("s"), pa.date32(), pa.time64("us"), pa.duration("us"))
    for kind in (*times, pa.binary(), pa.uuid(), pa.bool_()):
        column = Column.of(pa.nulls(2, kind))
        assert np.isnan(column.numbers()).all()
        assert column.integers(0, 9, -1, "0 to 9").tolist() == [-1, -1]
    lists = Lists.of(pa.array([[None], [], None], pa.list_(pa.null())))
    assert (lists.lengths.tolist(), lists.elements.codes.tolist()) == ([1, 0, 0], [-1])


def test_bytes_that_are_no_text_are_named_with_their_row():
    for kind in (pa.binary(), pa.binary(1), pa.large_binary(), pa.binary_view()):
        assert Column.of(pa.array([b"a", None], kind)).texts == ["a"]
        with pytest.raises(BadCell, match=r"UTF-8 text, found .*xff") as caught:
            _ = Column.of(pa.array([b"a", None, b"\xff"], kind)).texts
        assert caught.value.row == 2


def test_values_that_no_row_holds_may_be_anything():
    column = Column.of(pa.array(["1", "?", "nan", "2", None])).without(frozenset({"?", "nan"}))
    np.testing.assert_array_equal(column.numbers(), [1, np.nan, np.nan, 2, np.nan])
    assert column.integers(0, 2, -1, "0 to 2").tolist() == [1, -1, -1, 2, -1]
    with pytest.raises(BadCell, match=r"0 to 1, found '2'") as caught:
        column.integers(0, 1, -1, "0 to 1")
    assert caught.value.row == 3
    for text in ("inf", "nan", "77"):  # which are numbers all the same
        column = Column.of(pa.array(["1", text, "2"])).without(frozenset({text}))
        np.testing.assert_array_equal(column.numbers(), [1, np.nan, 2])
    assert column.integers(0, 2, -1, "0 to 2").tolist() == [1, -1, 2]
    unnamed = Column.of(pa.array(["1", "?", "x", "inf"])).without(frozenset({"?"}))
    with pytest.raises(BadCell, match="a number, found 'x'"):
        unnamed.numbers()
    with pytest.raises(BadCell, match="a finite number, found 'inf'"):
        unnamed.without(frozenset({"x"})).numbers()


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata"])
def test_a_time_has_one_text_whatever_its_unit(zone):
    rng = np.random.default_rng()
    seconds = np.append(rng.integers(-(2**31), 2**32, 30), [0, 10, 600, 36000])
    texts = {
        unit: Column.of(pa.array(seconds.astype("M8[s]").astype(f"M8[{unit}]")).cast(pa.timestamp(unit, zone))).texts
        for unit in ("s", "ms", "us", "ns")
    }
    assert texts["ms"] == texts["us"] == texts["ns"] == texts["s"]
    assert not any("." in text for text in texts["s"])
    fine = pa.array([1_500_000, 1_020_300, 1_000_001, 100_000_000], pa.timestamp("us", zone))
    for unit in ("us", "ns"):
        found = [
            text.partition(".")[2].rstrip("Z").partition("+")[0]
            for text in Column.of(fine.cast(pa.timestamp(unit, zone))).texts
        ]
        assert found == ["5", "0203", "000001", ""]
    assert Column.of(pa.array([3_600_000_000], pa.time64("us"))).texts == ["01:00:00"]


def test_a_decimal_has_one_text_whatever_its_scale():
    values = [decimal.Decimal(text) for text in ("4", "-0.5", "0", "120", "-1200000", "0.0000001", "12.3400")]
    want = ["4", "-0.5", "0", "120", "-1200000", "0.0000001", "12.34"]
    for kind in (pa.decimal128(20, 7), pa.decimal128(38, 20), pa.decimal256(76, 40)):
        assert Column.of(pa.array([*values, None], kind)).texts == want
    assert [Column.of(pa.array([value])).texts for value in values] == [[text] for text in want]
    assert Column.of(pa.array([decimal.Decimal(10**38 - 1)])).texts == ["9" * 38]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_each_row_of_a_large_batch_is_read_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(source, "CHUNK_ROWS", 10)
    values = np.random.default_rng().integers(0, 99, 25).tolist()
    table = pa.table({"x": values})
    write = pq.write_table if name.endswith("parquet") else feather.write_feather
    write(table, tmp_path / name)
    with ThreadEngine(1) as engine:
        chunks = [*source.chunks([tmp_path / name], ["x"], engine, 1, csv=lambda _: None)]
    found = [chunk.columns["x"].integers(0, 99, None, "") for chunk in chunks]
    assert np.concatenate(found).tolist() == values
    assert [len(chunk.rows) for chunk in chunks] == [10, 10, 5]
    assert [chunk.in_file for chunk in chunks] == [0, 10, 20]
    assert np.concatenate([chunk.rows for chunk in chunks]).tolist() == list(range(25))
