"""The parts of tabular preprocessing on their own: dictionary-encoded columns, and statistics merged over chunks."""

import numpy as np
import pyarrow as pa
import pytest

from preprocess.tabular import transforms
from preprocess.tabular.columns import BadCell, Column, Lists


def test_moments_do_not_depend_on_the_pieces():
    values = np.random.default_rng(0).lognormal(0, 2, 10_000) + 1e6
    results = set()
    for pieces in (1, 7, 1000):
        moments = transforms.Moments()
        for piece in np.array_split(values, pieces):
            moments.add(piece)
        results.add((moments.mean(), moments.deviation()))
    assert len(results) == 1
    assert results.pop() == pytest.approx((values.mean(), values.std()), rel=1e-10)


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


def test_columns_and_lists_hold_what_arrow_holds():
    column = Column.of(pa.chunked_array([["a", None], ["b", "a"]]))
    assert column.codes.tolist() == [0, -1, 1, 0]
    assert column.counts(np.array([True, True, False, True])).tolist() == [2, 0]
    assert Column.of(pa.array([1.5, float("nan"), None])).codes.tolist() == [0, -1, -1]
    lists = Lists.of(pa.array([["a"], None, [], ["b", None, "a"]]))
    ids = np.where(lists.elements.codes < 0, -1, lists.elements.codes + 1)
    padded, cut = lists.padded(ids, 2)
    assert padded.tolist() == [[1, -1], [-1, -1], [-1, -1], [2, -1]]
    assert cut == 1
    sliced = Lists.of(pa.array([["a"], ["b", "c"], ["d"]]).slice(1))
    assert sliced.elements.texts == ["b", "c", "d"]
    assert [lists.row_of(element) for element in range(4)] == [0, 3, 3, 3]


def test_values_that_no_row_holds_may_be_anything():
    column = Column.of(pa.array(["1", "?", "nan", "2", None])).without(frozenset({"?", "nan"}))
    np.testing.assert_array_equal(column.numbers(), [1, np.nan, np.nan, 2, np.nan])
    assert column.integers(0, 2, -1, "0 to 2").tolist() == [1, -1, -1, 2, -1]
    with pytest.raises(BadCell, match=r"0 to 1, found '2'") as caught:
        column.integers(0, 1, -1, "0 to 1")
    assert caught.value.row == 3
    unnamed = Column.of(pa.array(["1", "?", "x", "inf"])).without(frozenset({"?"}))
    with pytest.raises(BadCell, match="a number, found 'x'"):
        unnamed.numbers()
    with pytest.raises(BadCell, match="a finite number, found 'inf'"):
        unnamed.without(frozenset({"x"})).numbers()
