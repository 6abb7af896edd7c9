"""Parts of the Outbrain preprocessing on inputs that real data seldom shows: sparse ids, constants, no train rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from outbrain_checks import check_rows
from outbrain_oracle import features, similarity

from preprocess.outbrain import OutbrainConfig, clicks, run, store, tables, transform
from preprocess.outbrain import similarity as similarity_module
from preprocess.outbrain.columns import AdCounts, count_ads
from preprocess.outbrain.lists import Lists
from preprocess.outbrain.lookup import Lookup, first_duplicate, with_null
from preprocess.outbrain.nvtabular import NvtabularStatistics, _median, _scale
from preprocess.outbrain.similarity import Attributes
from preprocess.outbrain.statistics import KeyCounts
from preprocess.outbrain.tables import ranks
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet

SMALL = Path(__file__).parent / "data" / "outbrain"


@pytest.mark.parametrize(("n", "largest"), [(0, 0), (1, 0), (1, 2**31 - 2), (1000, 3000), (1000, 2**31 - 2)])
def test_lookup_finds_what_a_dictionary_finds(n, largest):
    rng = np.random.default_rng(n + largest % 97)
    keys = np.unique(rng.integers(0, largest + 1, n, dtype=np.int32))
    if n:
        keys[-1] = largest
    rng.shuffle(keys)
    lookup = Lookup.build(keys)
    asked = np.concatenate([[-1, 0, 1, largest, 2**31 - 1], keys, keys + 1, rng.integers(0, 2**31 - 1, 500)])
    asked = np.clip(asked, -1, 2**31 - 1).astype(np.int32)
    rows = {int(key): i for i, key in enumerate(keys)}
    assert lookup.find(asked).tolist() == [rows.get(int(key), -1) for key in asked]
    column = with_null(keys, -7)
    assert column[lookup.find(np.array([-1], np.int32))].tolist() == [-7]


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        ([], None),
        ([3], None),
        ([1, 2, 3], None),
        ([3, 1, 2], None),
        ([1, 1], 1),
        ([5, 2, 7, 2, 5], 3),
        ([5, 2, 7, 5, 2], 3),
    ],
)
def test_first_duplicate_is_the_first_row_seen_before(keys, row):
    assert first_duplicate(np.array(keys, np.int32)) == row


@pytest.mark.parametrize("merge_entries", [1, 50, 1 << 19])
@pytest.mark.parametrize("vocabulary", [3, 70, 5000])
def test_similarity_matches_dictionaries(merge_entries, vocabulary, tmp_path, monkeypatch):
    """Documents of 1 to 60 attributes, some pairs twice, documents without attributes, unknown ones and nulls."""
    monkeypatch.setattr(similarity_module, "_MERGE_ENTRIES", merge_entries)
    rng = np.random.default_rng(vocabulary)
    documents = np.repeat(np.arange(0, 400, 2), rng.integers(1, 60, 200)).astype(np.int32)
    attributes = rng.integers(0, vocabulary, len(documents)).astype(np.int32)
    confidences = rng.uniform(0, 1, len(documents)) * (rng.random(len(documents)) < 0.8)  # some say nothing
    table = pd.DataFrame({"document_id": documents, "topic_id": attributes, "confidence_level": confidences})
    table.sample(frac=1, random_state=1).to_csv(tmp_path / "documents_topics.csv", index=False, float_format="%.17g")
    left, right = rng.integers(-1, 420, (2, 3000)).astype(np.int32)
    left[:200] = right[:200]
    got = Attributes.build(documents, attributes, confidences).similarity(left, right)
    want = similarity(tmp_path, "topics", list(zip(left.tolist(), right.tolist())))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    assert (got > 0).sum() > 100


@pytest.mark.parametrize("more", [0, 1, 5])
def test_an_attribute_of_the_next_document_is_not_a_documents_own(more):
    """64 and 0 share a bit of the signature, so that 64 is searched for in a row that ends before it."""
    documents = np.r_[1, 2, 3, np.full(more, 1)].astype(np.int32)
    attributes = np.r_[0, 64, 64, np.arange(1, more + 1)].astype(np.int32)
    rows = Attributes.build(documents, attributes, np.ones(len(documents)))
    left, right = np.array([3, 1, 3, 2], np.int32), np.array([1, 3, 2, 1], np.int32)
    np.testing.assert_allclose(rows.similarity(left, right), [0, 0, 1, 0], atol=1e-15)


@pytest.mark.parametrize("workers", [2, 3, 16])
@pytest.mark.parametrize("frequent", [7, 40, 306])
def test_rows_do_not_depend_on_the_threads_that_build_them(workers, frequent, monkeypatch):
    """Most entries belong to one document, the first, the last or another, so there is nothing for some threads."""
    monkeypatch.setattr(similarity_module, "_ENTRIES_A_THREAD", 100)
    rng = np.random.default_rng(3)
    documents = np.r_[np.full(3000, frequent), rng.integers(7, 307, 2000)].astype(np.int32)
    entries = documents, rng.integers(0, 900, 5000).astype(np.int32), rng.uniform(0, 1, 5000)
    want, got = (Attributes.build(*entries, workers=n) for n in (1, workers))
    for name in ("start", "length", "signature", "attribute", "value"):
        assert getattr(got, name).dtype == getattr(want, name).dtype
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_array_equal(got.lookup.slots, want.lookup.slots)
    assert want.length.max() > 800


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 95])
def test_slices_come_together_in_order(n, monkeypatch):
    monkeypatch.setattr(tables, "_SLICE", 10)
    a, b = np.arange(n), np.arange(n)[::-1]
    got = tables.sliced(lambda x, y: (100 * x + y).astype(np.int16), 3, a, b)
    assert got.tolist() == (100 * a + b).tolist()
    assert got.dtype == np.int16


@pytest.mark.parametrize(("n", "largest"), [(0, 0), (1, 5), (1000, 50), (1000, 2**31 - 2)])
def test_ranks_are_places_among_the_distinct(n, largest):
    values = np.random.default_rng(n).integers(0, largest + 1, n, dtype=np.int32)
    distinct = sorted(set(values.tolist()))
    assert ranks(values).tolist() == [distinct.index(v) for v in values.tolist()]
    assert ranks(values).dtype == np.int32


def test_an_attribute_of_every_document_weighs_nothing():
    """df = N, so idf = 0 and the norm of every document is 0: similarity 0, not a division by zero."""
    got = Attributes.build(np.arange(4, dtype=np.int32), np.zeros(4, np.int32), np.ones(4))
    assert got.similarity(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("values", [[], [4], [4, 9], [0, 0, 7], [1, 2, 2, 8], list(range(100))])
def test_median_of_a_histogram(values):
    want = float(np.median(values)) if values else 0.0
    assert _median(np.bincount(values, minlength=200).astype(np.int64)) == want


@pytest.mark.parametrize("rows", [[], [1], [1, 1, 1], [6, 4, 1, 1], [10**6, 3, 3]])
@pytest.mark.parametrize("without_key", [0, 1, 50])
def test_scale_is_that_of_the_rows_written_out(rows, without_key):
    rows = np.array(rows, np.int64)
    if not (n := int(rows.sum()) + without_key):
        assert _scale(rows, 0) == (0.0, 0.0)
        return
    logs = np.log1p(np.concatenate([np.repeat(rows, rows), np.zeros(without_key)]))
    mean, std = _scale(rows, n)
    assert mean == pytest.approx(logs.mean(), rel=1e-6)
    assert std == pytest.approx(logs.std(ddof=1) if logs.min() != logs.max() else 0.0, rel=1e-6)


def test_a_constant_count_is_only_centred():
    counts = KeyCounts.group(*(np.array(v) for v in ([1, 2, 3], [2, 2, 2], [0, 1, 2])))
    statistics = NvtabularStatistics(6, {"ad_id": counts}, {}, {"ad_id": np.log(3.0)}, {"ad_id": 0.0})
    got = statistics.count("ad_id", np.array([1, 9], np.int32))
    np.testing.assert_allclose(got, [0, -np.log(3)], atol=1e-6)


@pytest.mark.parametrize("largest", [50, 2**31 - 2])
def test_ad_counts_merge_to_the_counts_of_all_rows(largest):
    """Dense ids are counted by address, others by sorting."""
    rng = np.random.default_rng(1)
    ids = np.unique(rng.integers(0, largest + 1, 40)).astype(np.int32)
    ad, train = rng.choice(ids, 1000), rng.random(1000) < 0.7
    clicked = rng.integers(0, 2, 1000).astype(np.uint8)
    whole = count_ads(ad, train, clicked)
    cuts = [slice(0, 1), slice(1, 1), slice(1, 700), slice(700, 1000)]
    merged = AdCounts.merge(count_ads(ad[c], train[c], clicked[c]) for c in cuts)
    for name in ("ad", "rows", "train_rows", "train_clicks"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
    chosen = ad == whole.ad[7]
    assert whole.rows[7] == chosen.sum()
    assert whole.train_rows[7] == (chosen & train).sum()
    assert whole.train_clicks[7] == (chosen & train & (clicked == 1)).sum()
    assert whole.ad.tolist() == sorted(set(ad.tolist()))


def test_scans_merge_whatever_waits(monkeypatch):
    """Counts that wait are merged in time and at the end, in any grouping to the same sums."""
    rng = np.random.default_rng(2)
    scans = []
    for _ in range(9):
        ad, train = rng.integers(0, 300, 200).astype(np.int32), rng.random(200) < 0.7
        counts = count_ads(ad, train, rng.integers(0, 2, 200))
        parts = {split: [] for split in clicks.SPLITS}
        scans.append(clicks.Scan(counts, rng.integers(0, 9, (2, 3652)), {"train": 3, "test": 4}, parts))
    want = AdCounts.merge(scan.ads for scan in scans)
    for threshold in (0, 250, 10**6):
        monkeypatch.setattr(clicks, "_MERGE_ADS", threshold)
        got = clicks.Scan.merge(scans)
        for name in ("ad", "rows", "train_rows", "train_clicks"):
            np.testing.assert_array_equal(getattr(got.ads, name), getattr(want, name))
        assert got.clicks == {"train": 27, "test": 36}
        np.testing.assert_array_equal(got.ages, sum(scan.ages for scan in scans))


def test_scans_add_up_beyond_32_bits():
    """Rows by age, and rows by ad, of more rows than an int32 counts."""
    many = 2**31 - 1
    for ad in (3, 2**31 - 2):  # counted by address, and by sorting
        counts = AdCounts(np.array([ad], np.int32), *np.full((3, 1), many, np.int64))
        parts = {split: [] for split in clicks.SPLITS}
        ages = np.full((2, 3652), many, np.int64)
        got = clicks.Scan.merge(clicks.Scan(counts, ages, dict.fromkeys(clicks.SPLITS, many), parts) for _ in range(3))
        assert (got.ages == 3 * many).all()
        assert [int(n[0]) for n in (got.ads.rows, got.ads.train_rows, got.ads.train_clicks)] == [3 * many] * 3
        assert got.clicks == {"train": 3 * many, "test": 3 * many}


@pytest.mark.parametrize("order", ["ascending", "ascending in each part", "none"])
@pytest.mark.parametrize("cuts", [[], [1], [500], [250, 251, 700]])
def test_rows_of_a_split_ascend_by_display_in_input_order(order, cuts, tmp_path):
    """Parts that ascend may begin before the last one ended; a display may be cut by the border of two."""
    rng = np.random.default_rng(len(cuts))
    rows = np.zeros(1000, clicks.ROW)
    rows["display_id"] = rng.integers(0, 150, 1000)
    rows["ad_id"] = rng.permutation(1000)
    if order != "none":
        pieces = np.split(rows, cuts if order != "ascending" else [])
        rows = np.concatenate([piece[np.argsort(piece["display_id"], kind="stable")] for piece in pieces])
    pieces = np.split(rows, cuts)
    parts = [part for i, piece in enumerate(pieces) for part in clicks._write(piece, tmp_path / f"test-{i:06d}.npy")]
    scan = clicks.Scan(AdCounts.merge([]), np.zeros((2, 3652), np.int64), {}, {"test": parts})
    assert clicks.count_displays(scan, "test") == len(set(rows["display_id"].tolist()))
    clicks.sort_by_display(scan, "test", tmp_path)
    got = np.concatenate([np.load(part.path) for part in scan.parts["test"]])
    want = sorted(rows.tolist(), key=lambda row: row[0])  # Python's sort is stable
    assert got.tolist() == want
    assert sorted(tmp_path.iterdir()) == sorted(part.path for part in scan.parts["test"])
    assert clicks.count_displays(scan, "test") == len(set(rows["display_id"].tolist()))


@pytest.mark.parametrize("largest", [2**15 - 1, 2**15, 2**31 - 1])
def test_lists_keep_the_first_three_in_the_order_of_the_file(largest):
    documents = np.array([8, 3, 8, 8, 5, 8, 3], np.int32)
    buckets = np.array([largest, 4, 0, 9, 7, 1, largest], np.int32)
    got = Lists.build(documents, buckets).ids  # of documents 3, 5 and 8, and of unknown ones
    assert got.tolist() == [[4, largest, -1], [7, -1, -1], [largest, 0, 9], [-1, -1, -1]]
    assert got.dtype == (np.int16 if largest < 2**15 else np.int32)


def test_only_nulls_have_the_id_of_nulls():
    """0 is an id as others are."""
    got, nulls = transform._filled(np.array([0, -1, 3, -1, 0], np.int32), 7, np.uint8, np)
    assert (got.tolist(), nulls, got.dtype) == ([0, 7, 3, 7, 0], 2, np.uint8)
    got, nulls = transform._filled(np.array([0, 3], np.int32), 7, np.uint16, np)
    assert (got.tolist(), nulls, got.dtype) == ([0, 3], 0, np.uint16)


@pytest.mark.parametrize("flavour", ["nvtabular", "spark"])
def test_what_is_said_of_the_clicks_adds_up(flavour, tmp_path):
    """More clicks in a block than a byte counts; the same numbers from blocks of any size."""
    data = shutil.copytree(SMALL, tmp_path / "data")
    header, *rows = (data / "clicks_train.csv").read_text().splitlines()
    np.random.default_rng(0).shuffle(rows := rows * 300)
    (data / "clicks_train.csv").write_text("\n".join([header, *rows, ""]))
    report = run(OutbrainConfig(data, tmp_path / "out", flavour=flavour, workers=1))
    for split in clicks.SPLITS:
        shards = ShardSet.open(tmp_path / "out" / split)
        held = shards.read(0, shards.rows)
        label, clicked = held[FeatureSpec.load(tmp_path / "out").label], report[split]["clicks"]
        assert clicked == int(label.astype(int).sum()) > 255
        assert shards.manifest["statistics"] == {"rows": shards.rows, "clicks": clicked}
        assert report[split]["click_rate"] == clicked / shards.rows
        assert report[split]["rows"] == shards.rows
    assert report["rows"] == len(rows)


def scaled_copy(target: Path, factors: dict[str, int]) -> Path:
    """The small tables with ids multiplied, so that they are sparse."""
    target.mkdir()
    for path in SMALL.glob("*.csv"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        for column in set(table) & set(factors):
            table[column] = [v if v in ("", "\\N") else str(int(v) * factors[column]) for v in table[column]]
        table.to_csv(target / path.name, index=False)
    return target


def test_sparse_ids_give_what_pandas_gives(tmp_path):
    data = scaled_copy(tmp_path / "data", {"ad_id": 140_000_000, "document_id": 8_000_000, "display_id": 170_000_000})
    run(OutbrainConfig(data, tmp_path / "out", workers=1))
    spec = FeatureSpec.load(tmp_path / "out")
    want = features(data, dict(zip(spec.names, spec.cardinalities)))
    check_rows(tmp_path / "out", want)


@pytest.mark.parametrize(("flavour", "room"), [("nvtabular", 2**31 - 6), ("spark", 2**31 - 4)])
def test_documents_without_a_publisher_need_ids_above_the_largest(flavour, room, tmp_path):
    data = shutil.copytree(SMALL, tmp_path / "data")
    rows = ["100,50,{}", "101,51,", "200,51,", "201,52,\\N"]
    for largest in (room, room + 1):
        text = "\n".join(["document_id,source_id,publisher_id,publish_time", *(f"{row}," for row in rows)])
        (data / "documents_meta.csv").write_text(text.format(largest) + "\n")
        if largest == room:
            run(OutbrainConfig(data, tmp_path / "out", flavour=flavour))
            continue
        with pytest.raises(InputError, match=rf"publisher_id: expected at most {room}, .* found {largest}$"):
            run(OutbrainConfig(data, tmp_path / "out", flavour=flavour))


def timed(tmp_path, time):
    """The small data with this timestamp in all rows, or with `time[i]` in row i."""
    data = shutil.copytree(SMALL, tmp_path / "data")
    events = pd.read_csv(data / "events.csv", dtype=str, keep_default_na=False)
    events["timestamp"] = time if isinstance(time, str) else [*time, *[time[-1]] * len(events)][: len(events)]
    events.to_csv(data / "events.csv", index=False)
    return data


def test_all_rows_may_fall_on_one_side_of_given_statistics(tmp_path, caplog):
    run(OutbrainConfig(SMALL, tmp_path / "first"))
    data = timed(tmp_path, "1036800000")
    report = run(OutbrainConfig(data, tmp_path / "out", stats=tmp_path / "first"))
    assert (report["rows"], report["train"]["rows"], report["train"]["click_rate"]) == (18, 0, None)
    assert ShardSet.open(tmp_path / "out" / "test").rows == 18
    assert not caplog.records


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (["1465876800000", "1466000000000"], "timestamps from 1465876800000 to 1466000000000"),
        ("1036800000", "timestamps from 1036800000 to 1036800000"),
        ("", "timestamps of no row"),
    ],
)
def test_no_train_rows_are_refused_with_the_times_that_are_there(time, words, tmp_path):
    data = timed(tmp_path, time)
    expected = r"clicks_train.csv: expected train rows to learn from, found none: .* from 0 to 950399999 are for"
    with pytest.raises(InputError, match=rf"{expected} training, and events.csv has {words} \(milliseconds since 146"):
        run(OutbrainConfig(data, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_no_test_rows_are_warned_about(tmp_path, caplog):
    data = timed(tmp_path, "1465876800000")  # which the spark flavour trains on
    report = run(OutbrainConfig(data, tmp_path / "out", flavour="spark"))
    assert report["test"]["rows"] == 0
    assert "clicks_train.csv: no rows are test rows, so a training would not be evaluated" in caplog.text
    assert "events.csv has timestamps from 1465876800000 to 1465876800000 (milliseconds" in caplog.text


def test_statistics_of_tables_are_refused(tmp_path):
    tables_ = tmp_path / "statistics"
    tables_.mkdir()
    (tables_ / "statistics.json").write_text('{"features": {}}')
    words = (
        r"expected statistics.json and .*, got a statistics.json without a version, as preprocess tabular writes it$"
    )
    with pytest.raises(InputError, match=words):
        run(OutbrainConfig(SMALL, tmp_path / "out", stats=tmp_path))


@pytest.mark.parametrize("field", [{"version": 2}, {"flavour": "spark"}])
def test_statistics_of_another_version_or_flavour_are_refused(field, tmp_path):
    run(OutbrainConfig(SMALL, tmp_path / "first"))
    path = tmp_path / "first" / "statistics" / "statistics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    told = f"version {field.get('version', 1)}, flavour {field.get('flavour', 'nvtabular')}"
    with pytest.raises(InputError, match=rf"\(version 1, flavour nvtabular\), got {told}$"):
        run(OutbrainConfig(SMALL, tmp_path / "out", stats=tmp_path / "first"))


def test_the_size_of_the_tables_is_without_the_rows_of_the_clicks(tmp_path):
    """These are read a chunk at a time, and count for no memory."""
    rows = np.random.default_rng().integers(1, 500, 5)
    for name, n in zip(("ads.numeric", "testing", "train-000000", "train-000001", "test-sorted"), rows):
        store.save_array(tmp_path / f"{name}.npy", np.zeros(n))
    (tmp_path / "scan.npz").write_bytes(b"counts")
    kept = [(tmp_path / f"{name}.npy").stat().st_size for name in ("ads.numeric", "testing")]
    assert store.size(tmp_path, besides=("train", "test")) == sum(kept)
    assert store.size(tmp_path, besides=()) > sum(kept)
