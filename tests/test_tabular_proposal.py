"""What a proposal makes of how values are spread: logarithms, lengths of lists, and how far it looks."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.tabular import infer_spec
from widedeep.errors import InputError

ROWS = 1000


def proposed(tmp_path, columns):
    """The features of a table of these columns and a label."""
    pq.write_table(pa.table(columns | {"click": np.arange(ROWS) % 2}), tmp_path / "a.parquet")
    return infer_spec([tmp_path / "a.parquet"])[0]["feature_spec"]


@pytest.mark.parametrize("offset", [-3000, 0, 9000])
@pytest.mark.parametrize("missing", [0.0, 0.95])
def test_numbers_with_a_long_tail_get_a_logarithm(tmp_path, offset, missing):
    """Wherever they begin, and however many rows hold a word for no value."""
    rng = np.random.default_rng()
    numbers = {"even": rng.uniform(0, 100, ROWS), "tail": np.append(rng.uniform(0, 1, ROWS - 1), 100)}
    told = np.append(rng.random(ROWS - 2) < missing, [False, False])  # the end of the tail is there
    texts = {name: np.where(told, "n/a", (values + offset).astype(str)) for name, values in numbers.items()}
    features = proposed(tmp_path, texts)
    assert [features[name]["transform"].get("log", False) for name in numbers] == [False, True]


def test_few_long_lists_do_not_make_all_rows_long(tmp_path):
    rng = np.random.default_rng()
    lengths = rng.permutation(np.append(np.full(ROWS - 9, 3), np.full(9, 40)))
    words = [rng.choice(list("abcdefg"), n).tolist() for n in lengths]
    features = proposed(tmp_path, {"lists": words, "texts": ["|".join(word) for word in words]})
    assert [features[name]["max_hotness"] for name in ("lists", "texts")] == [3, 3]


def test_a_column_that_is_called_as_the_buckets_of_another_stays_what_it_is(tmp_path):
    rng = np.random.default_rng()
    columns = {"age": rng.uniform(0, 9, ROWS), "age_bucket": rng.choice(["young", "old"], ROWS)}
    for order in (["age", "age_bucket"], ["age_bucket", "age"]):
        features = proposed(tmp_path, {name: columns[name] for name in order})
        assert {*features} == {"age", "age_bucket", "click"}
        assert "vocabulary" in features["age_bucket"]["transform"]


def test_no_file_is_looked_at_beyond_the_rows_that_are_asked_for(tmp_path):
    for name, clicks in (("a", ["yes", "no"]), ("b", ["perhaps"])):
        table = pa.table({"x": [*"ab"] * ROWS, "click": clicks * (2 * ROWS // len(clicks))})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for rows in (1, 2 * ROWS):
        assert infer_spec(paths, max_rows=rows) == infer_spec(paths[:1])
    with pytest.raises(InputError, match="expected two values, found 3"):
        infer_spec(paths, max_rows=2 * ROWS + 1)
