"""The synthetic Outbrain: layout, dirt, determinism, and that the planted scores are what they claim."""

import errno
import json
import re
import socket
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from preprocess.synthetic import generate, output, run
from preprocess.synthetic.clicks import Weights
from preprocess.synthetic.draws import Draws, heavy_rank
from preprocess.synthetic.geo import places
from preprocess.synthetic.sizes import FULL_DISPLAYS, Sizes
from widedeep.errors import InputError, RunError

DISPLAYS = 20_000
I, S, F = pa.int64(), pa.string(), pa.float64()
LAYOUT = {
    "clicks_train.csv": {"display_id": I, "ad_id": I, "clicked": I},
    "clicks_test.csv": {"display_id": I, "ad_id": I},
    "events.csv": {
        "display_id": I,
        "uuid": S,
        "document_id": I,
        "timestamp": I,
        "platform": I,
        "geo_location": S,
    },
    "promoted_content.csv": {"ad_id": I, "document_id": I, "campaign_id": I, "advertiser_id": I},
    "documents_meta.csv": {"document_id": I, "source_id": I, "publisher_id": I, "publish_time": pa.timestamp("s")},
    "documents_categories.csv": {"document_id": I, "category_id": I, "confidence_level": F},
    "documents_topics.csv": {"document_id": I, "topic_id": I, "confidence_level": F},
    "documents_entities.csv": {"document_id": I, "entity_id": S, "confidence_level": F},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "set"
    run(DISPLAYS, 5, out, truth=True, clicks_test=True)
    return out


@pytest.fixture(scope="module")
def tables(made):
    """Every file, read with the types of the published layout, as pandas."""
    read = {}
    for name, types in LAYOUT.items():
        options = pacsv.ConvertOptions(column_types=types, null_values=["", "\\N"], strings_can_be_null=True)
        read[name.removesuffix(".csv")] = pacsv.read_csv(made / name, convert_options=options).to_pandas()
    return read


@pytest.fixture(scope="module")
def planted(made):
    return pd.read_parquet(made / "planted.parquet")


def test_files_have_the_published_columns_and_the_recorded_rows(made, tables):
    manifest = json.loads((made / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(LAYOUT)
    for name, types in LAYOUT.items():
        with open(made / name, encoding="ascii") as file:
            assert file.readline() == ",".join(types) + "\n"
        assert len(tables[name.removesuffix(".csv")]) == manifest["files"][name]["rows"]
        assert (made / name).stat().st_size == manifest["files"][name]["bytes"]


def test_recorded_checksums_are_those_of_the_files(made):
    import xxhash

    for name, entry in json.loads((made / "manifest.json").read_text())["files"].items():
        assert xxhash.xxh3_64_hexdigest((made / name).read_bytes()) == entry["xxh3_64"]


def test_every_display_shows_two_to_twelve_distinct_ads_and_has_one_click(tables):
    clicks, promoted = tables["clicks_train"], tables["promoted_content"]
    group = clicks.groupby("display_id")
    assert (group.clicked.sum() == 1).all()
    assert group.size().between(2, 12).all()
    assert group.size().mean() == pytest.approx(5.164, abs=0.05)
    assert not clicks.duplicated(["display_id", "ad_id"]).any()
    assert np.array_equal(clicks.display_id.unique(), np.arange(1, DISPLAYS + 1))
    assert clicks.ad_id.isin(promoted.ad_id).all()
    assert promoted.ad_id.is_unique
    assert set(clicks.clicked) == {0, 1}


def test_events_cover_all_displays_in_the_order_of_time(tables):
    events, test = tables["events"], tables["clicks_test"]
    total = DISPLAYS + round(DISPLAYS * 6_245_533 / FULL_DISPLAYS)
    assert np.array_equal(events.display_id, np.arange(1, total + 1))
    day = events.timestamp // 86_400_000
    assert set(day[:DISPLAYS]) == set(range(13))
    assert set(day[DISPLAYS:]) == set(range(15))
    assert (day[DISPLAYS:] >= 13).mean() == pytest.approx(0.5, abs=0.01)
    assert (day[:DISPLAYS] >= 11).mean() == pytest.approx(0.143, abs=0.01)
    assert events.timestamp[:DISPLAYS].is_monotonic_increasing
    assert events.timestamp[DISPLAYS:].is_monotonic_increasing
    assert np.array_equal(test.display_id.unique(), np.arange(DISPLAYS + 1, total + 1))
    assert events.uuid.str.fullmatch("[0-9a-f]{14}").all()
    assert events.uuid.nunique() / total == pytest.approx(0.856, abs=0.01)
    shares = events.platform.value_counts(normalize=True)
    assert [shares[1], shares[2], shares[3]] == pytest.approx([0.390, 0.475, 0.135], abs=0.01)


def test_geo_strings_have_the_three_published_forms(tables):
    geo = tables["events"].geo_location.dropna()
    assert geo.str.fullmatch(r"[A-Z][A-Z0-9](>[A-Z0-9]{2}(>\d{3})?)?").all()
    assert (geo.str[:2] == "US").mean() == pytest.approx(0.80, abs=0.02)
    assert set(geo.str.count(">")) == {0, 1, 2}
    names = places().names
    assert len(names) == len(set(names)) == 2_988


def test_nulls_are_written_in_both_ways_and_rarely(made, tables):
    events = (made / "events.csv").read_text().splitlines()[1:]
    assert {line.rsplit(",", 1)[1] for line in events} >= {"", "\\N"}
    assert 0 < tables["events"].platform.isna().mean() < 0.002
    assert 0 < tables["events"].geo_location.isna().mean() < 0.004
    meta = tables["documents_meta"]
    assert 0 < meta.source_id.isna().mean() < 0.003
    assert meta.publisher_id.isna().mean() == pytest.approx(0.021, abs=0.006)
    assert meta.publish_time.isna().mean() == pytest.approx(0.337, abs=0.02)
    text = (made / "documents_meta.csv").read_text()
    assert re.search(r"^\d+,\d+,\d+,\\N$", text, re.M)
    assert re.search(r"^\d+,\d+,\d+,$", text, re.M)
    year = meta.publish_time.dropna().dt.year
    assert year.min() < 1980
    assert year.max() > 2017
    assert year.between(2006, 2016).mean() > 0.98
    used = set(tables["events"].document_id) | set(tables["promoted_content"].document_id)
    assert used - set(meta.document_id), "some used documents are in no attribute file"


def test_document_attributes_have_the_published_shape(tables):
    documents = tables["documents_meta"].document_id.max()
    categories, topics, entities = (tables["documents_" + kind] for kind in ("categories", "topics", "entities"))
    for table, column, most, share, mean in (
        (categories, "category_id", 2, 0.943, 1.938),
        (topics, "topic_id", 39, 0.832, 4.54),
        (entities, "entity_id", 10, 0.597, 3.09),
    ):
        count = table.groupby("document_id").size()
        assert len(count) / documents == pytest.approx(share, abs=0.015)
        assert count.mean() == pytest.approx(mean, rel=0.03)
        assert count.max() <= most
        assert not table.duplicated(["document_id", column]).any()
        assert table.confidence_level.between(0, 1, inclusive="neither").all()
        assert table.document_id.is_monotonic_increasing
    falls = topics.confidence_level.diff()[topics.document_id.diff() == 0]
    assert (falls < 0).all()
    assert set(topics.topic_id) <= set(range(300))
    assert categories.category_id.between(1000, 2999).all()
    assert categories.category_id.nunique() == 97
    assert entities.entity_id.str.fullmatch("[0-9a-f]{32}").all()


def slow_map(table, column):
    """Mean of 1 / rank of the clicked ad, ads of a display best score first, ties in file order: one by one."""
    displays = {}
    for display, score, clicked in zip(table.display_id.tolist(), table[column].tolist(), table.clicked.tolist()):
        displays.setdefault(display, []).append((score, clicked))
    total = 0.0
    for ads in displays.values():
        ordered = sorted(ads, key=lambda ad: -ad[0])  # stable
        total += 1.0 / (1 + [clicked for _, clicked in ordered].index(1))
    return total / len(displays)


def test_recorded_best_scores_follow_from_the_planted_probabilities(made, planted, tables):
    from sklearn.metrics import roc_auc_score

    best = json.loads((made / "manifest.json").read_text())["best"]
    assert np.array_equal(planted.clicked, tables["clicks_train"].clicked)
    assert np.array_equal(planted.ad_id, tables["clicks_train"].ad_id)
    assert best["map12"] == pytest.approx(slow_map(planted, "probability"), abs=1e-12)
    assert best["auc"] == pytest.approx(roc_auc_score(planted.clicked, planted.probability), abs=3e-5)
    ads = planted.groupby("display_id").size()
    assert best["random_map12"] == pytest.approx(np.mean([sum(1 / k for k in range(1, n + 1)) / n for n in ads]))
    assert best["random_map12"] == pytest.approx(0.48, abs=0.005)
    day = tables["events"].timestamp[:DISPLAYS] // 86_400_000
    for entry in best["by_day"][::6]:
        part = planted[day.to_numpy()[planted.display_id - 1] == entry["day"]]
        assert (entry["displays"], entry["rows"]) == (part.display_id.nunique(), len(part))
        assert entry["map12"] == pytest.approx(slow_map(part, "probability"), abs=1e-12)
        assert entry["auc"] == pytest.approx(roc_auc_score(part.clicked, part.probability), abs=1e-4)


def test_clicks_are_draws_from_the_planted_probabilities(planted):
    sums = planted.groupby("display_id").probability.sum()
    np.testing.assert_allclose(sums, 1.0, atol=1e-12)
    bins = pd.qcut(planted.probability, 20)
    group = planted.groupby(bins, observed=True)
    expected = group.probability.sum()
    variance = (planted.probability * (1 - planted.probability)).groupby(bins, observed=True).sum()
    z = (group.clicked.sum() - expected) / np.sqrt(variance)
    assert np.abs(z).max() < 4.0


def test_signals_show_in_the_files_themselves(planted, tables):
    """Popularity learned on early days, and a first topic in common, both order later displays better than chance."""
    events, promoted, topics = tables["events"], tables["promoted_content"], tables["documents_topics"]
    rows = planted.merge(events, on="display_id").merge(promoted, on="ad_id", suffixes=("", "_promo"))
    early = rows[rows.display_id <= DISPLAYS * 2 // 3].groupby("ad_id").clicked.agg(["sum", "count"])
    rows["popularity"] = rows.ad_id.map((early["sum"] + 2) / (early["count"] + 10)).fillna(0.2)
    first = topics.drop_duplicates("document_id").set_index("document_id").topic_id
    rows["match"] = (rows.document_id.map(first) == rows.document_id_promo.map(first)).astype(float)
    late = rows[rows.display_id > DISPLAYS * 2 // 3]
    best = slow_map(late, "probability")
    assert 0.53 < slow_map(late, "popularity") < 0.63
    assert slow_map(late, "match") > 0.50
    assert 0.66 < best < 0.75
    rate = rows.groupby("match").clicked.mean()
    assert rate[1.0] > 1.5 * rate[0.0]


@pytest.mark.parametrize(("workers", "chunk"), [(3, 32_768), (1, 1_000), (2, 7_777)])
def test_bytes_depend_on_the_seed_only(made, tmp_path, monkeypatch, workers, chunk):
    monkeypatch.setattr(generate, "CHUNK", chunk)
    run(DISPLAYS, 5, tmp_path / "again", workers=workers, truth=True, clicks_test=True)
    first = json.loads((made / "manifest.json").read_text())
    assert json.loads((tmp_path / "again" / "manifest.json").read_text()) == first


def test_another_seed_gives_other_files(made, tmp_path):
    other = run(DISPLAYS, 6, tmp_path / "other")
    first = json.loads((made / "manifest.json").read_text())["files"]
    assert all(entry["xxh3_64"] != first[name]["xxh3_64"] for name, entry in other["files"].items())
    assert "clicks_test.csv" not in other["files"]
    assert not (tmp_path / "other" / "planted.parquet").exists()


def test_popularity_is_heavy_tailed(tables):
    shown = tables["clicks_train"].ad_id.value_counts()
    assert shown.max() > 30 * shown.median()
    assert shown.iloc[: len(shown) // 10].sum() > 0.4 * shown.sum()
    pages = tables["events"].document_id.value_counts()
    assert pages.max() > 100 * pages.median()
    publisher = tables["documents_meta"].publisher_id.value_counts(normalize=True)
    assert publisher.iloc[:5].sum() > 0.4


def test_heavy_rank_has_the_published_spread_at_full_size():
    """Rows of the most shown, third-quartile and median ad, from the law itself: 211,824, 19 and 5 were published."""
    ads, rows, share = 478_950, 87_141_731, 2_000_000
    rank = heavy_rank((np.arange(share) + 0.5) / share, ads, ads / 2400)
    assert rank.min() == 0
    assert rank.max() < ads
    for low, high, expected, tolerance in ((0, 1, 211_824, 0.15), (0.245, 0.255, 19, 0.35), (0.49, 0.51, 5, 0.25)):
        low, high = (round(x * ads) if x not in (0, 1) else x for x in (low, high))
        held = ((rank >= low) & (rank < high)).sum() / share * rows / (high - low)
        assert held == pytest.approx(expected, rel=tolerance)


def test_draws_are_uniform_and_streams_independent():
    draws, index = Draws(3), np.arange(200_000)
    a, b = draws.uniform("a", index), draws.uniform("b", index)
    for u in (a, b, Draws(4).uniform("a", index)):
        counts = np.bincount((u * 100).astype(int), minlength=100)
        assert np.square((counts - 2_000) / np.sqrt(2_000)).sum() < 150  # chi square, 99 degrees: 150 is 1 in 1400
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.01
    assert np.array_equal(draws.uniform("a", index[7:9]), a[7:9])
    normal = draws.normal("n", index)
    assert [normal.mean(), normal.std()] == pytest.approx([0, 1], abs=0.01)


def test_full_size_has_the_published_counts():
    full = Sizes.scaled(FULL_DISPLAYS)
    assert (full.ads, full.campaigns, full.advertisers) == (559_583, 34_675, 4_385)
    assert (full.documents, full.entities, full.test_displays) == (2_999_334, 1_326_009, 6_245_533)
    assert (full.sources, full.publishers) == (14_394, 1_259)


@pytest.mark.parametrize("displays", [1, 2, 100, 5_000])
def test_small_sets_are_whole(tmp_path, displays):
    manifest = run(displays, 0, tmp_path / "small")
    clicks = pd.read_csv(tmp_path / "small" / "clicks_train.csv")
    assert clicks.display_id.nunique() == displays == clicks.clicked.sum()
    assert manifest["best"]["displays"] == displays


def test_counts_grow_slower_than_displays():
    small, large = Sizes.scaled(150_000), Sizes.scaled(1_500_000)
    for name in ("ads", "campaigns", "documents", "advertisers", "publishers"):
        assert 2 < getattr(large, name) / getattr(small, name) < 7


def test_memory_of_a_chunk_does_not_grow_with_the_set():
    peaks = []
    for displays in (60_000, 1_500_000):
        world = generate.World.build(displays, 1, Weights())
        tracemalloc.start()
        generate.make_chunk(world, 0, 16_384, truth=True, clicks=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 25e6


def test_rejects_what_it_cannot_write(tmp_path, made):
    with pytest.raises(InputError, match="--displays is 0, expected at least 1"):
        run(0, 1, tmp_path / "none")
    with pytest.raises(InputError, match="--workers is 0, expected at least 1"):
        run(10, 1, tmp_path / "none", workers=0)
    before = sorted(path.name for path in made.iterdir())
    with pytest.raises(InputError, match="not an empty directory"):
        run(10, 1, made)
    assert sorted(path.name for path in made.iterdir()) == before
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file"):
            run(10, 1, out)
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    append = output.CsvFile.append

    def full(self, data, rows):
        if self.size > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, data, rows)

    monkeypatch.setattr(output.CsvFile, "append", full)
    (tmp_path / "set").mkdir()
    with pytest.raises(RunError, match="No space left on device"):
        run(100_000, 1, tmp_path / "set", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert not any((tmp_path / "set").iterdir())


def test_what_a_kill_left_is_removed(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = tmp_path / f".set.partial-{socket.gethostname()}-{killed.pid}"
    left.mkdir()
    (left / "clicks_train.csv").write_text("display_id")
    run(1_000, 1, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_progress_reaches_the_total(tmp_path):
    seen = []
    run(40_000, 1, tmp_path / "set", progress=lambda *state: seen.append(state))
    assert [state[0] for state in seen].count("documents") == 5
    done = [state[1] for state in seen if state[0] == "displays"]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2] == 40_000 + Sizes.scaled(40_000).test_displays
