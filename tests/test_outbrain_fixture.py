"""Every Outbrain feature of eighteen rows against values worked out by hand from tests/data/outbrain.

The arithmetic (clicks_train.csv in file order; a star marks test rows):
    display 1: ads 10 11 13+   2: 10+ 11   12*: 10+ 15   3: 10+ 11 12   4*: 12 .. 10+   5: 10 11+   6: 10+   11*: 11 14+
    9: 10   (+ is the clicked ad)
Display 4 is among the fifth of displays that the hash selects, display 11 falls on day 11, display 12 has no event. So
12 train rows: ad 10 six times with 3 clicks, 11 four times with 1, 12 once, 13 once with 1.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import xxhash
from commands import main

from preprocess import synthetic
from preprocess.outbrain import OutbrainConfig, run
from widedeep.data import Reader
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.shards import ShardSet
from widedeep.step import StepConfig, make_step

DATA = Path(__file__).parent / "data" / "outbrain"

TRAIN_ROWS = [
    (1, 10),
    (1, 11),
    (1, 13),
    (2, 10),
    (2, 11),
    (3, 10),
    (3, 11),
    (3, 12),
    (5, 10),
    (5, 11),
    (6, 10),
    (9, 10),
]
TRAIN_CLICKS = [0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0]
TEST_ROWS = [(4, 12), (4, 10), (11, 11), (11, 14), (12, 10), (12, 15)]
TEST_CLICKS = [0, 1, 0, 1, 1, 0]

# Raw values by display and by ad, as the joins give them; None is null.
PAGE = {1: 200, 2: 200, 3: 201, 4: 200, 5: 200, 6: 203, 9: None, 11: 202, 12: None}
PLATFORM = {1: 0, 2: 1, 3: 2, 4: 0, 5: 0, 6: 1, 9: 0, 11: 2, 12: 0}
PLACE = {1: "US>CA>803", 2: "GB", 3: "SG>00", 4: None, 5: None, 6: "US>CA>803", 9: "US>NY", 11: "US>CA>807", 12: None}
COUNTRY = {1: "US", 2: "GB", 3: "SG", 4: None, 5: None, 6: "US", 9: "US", 11: "US", 12: None}
STATE = {1: "US>CA", 2: "GB", 3: "SG>00", 4: None, 5: None, 6: "US>CA", 9: "US>NY", 11: "US>CA", 12: None}
LANDING = {10: 100, 11: 100, 12: 101, 13: None, 14: 202, 15: None}
CAMPAIGN = {10: 7, 11: 7, 12: 8, 13: None, 14: None, 15: None}
ADVERTISER = {10: 3, 11: 3, 12: 3, 13: None, 14: None, 15: None}
SOURCE = {200: 52, 201: None, 202: None, 203: 50, 100: 50, 101: 51, None: None}
# The largest publisher is 70; the nulls of pages 101 and 201 become 70 + 1 + 1 and 70 + 1 + 2.
PUBLISHER = {200: 70, 201: 73, 202: None, 203: 60, 100: 60, 101: 72, None: None}

# Time 0 is 2016-06-14 03:59:59.998. Page 200 dates from 2016-06-10 03:59:59: 4 days and 998 ms earlier. Display 1 comes
# 20 h after time 0: still 4 days. Displays 2 and 5 come after 24 h: 5. Page 203 dates from 2000: over 3650 days, so 0.
# Pages 201 (no time), 202 (not in the file) and null are unknown: median of train 4 4 4, 5 5, 5 5, 0 = (4 + 5) / 2.
PAGE_DAYS = {1: 4, 2: 5, 3: 4.5, 4: 4, 5: 5, 6: 0, 9: 4.5, 11: 4.5, 12: 4.5}
# Page 100 dates from 2016-06-04 00:00:00: 10 d 3:59:59.998 before time 0. Display 1 adds 20 h and misses day 11 by
# 2 ms; displays 2, 3, 5, 6 add a day; display 9 adds 10 d 23:59:59.999 and makes 21; display 11 adds 11 d.
# Page 101 lies in the future: 0. Page 202, ads without a page, display 12: unknown: median of train 10 10,
# 11 11, 11 11 0, 11 11, 11, 21 = 11.
LANDING_DAYS = {
    (1, 10): 10, (1, 11): 10, (1, 13): 11, (2, 10): 11, (2, 11): 11, (3, 10): 11, (3, 11): 11, (3, 12): 0, (5, 10): 11,
    (5, 11): 11, (6, 10): 11, (9, 10): 21, (4, 12): 0, (4, 10): 10, (11, 11): 21, (11, 14): 11, (12, 10): 11,
    (12, 15): 11,
}  # fmt: skip

# Categories: N = 203 + 1, df(1000) = 3, df(1001) = df(1002) = 1. Page 200 has w = (0.9 ln(204/3), 0.1 ln 204) =
# (3.797557, 0.531812), of length 3.834614; pages 100 and 203 point along 1000 alone, page 101 along 1002.
CATEGORIES = {(200, 100): 0.990336, (203, 100): 1.0}
# Topics: N = 250 + 1, df(1) = 3, df(2) = 2, df(3) = 1: idf 4.426842, 4.832306, 5.525453. Page 200: w1 = 2.213420,
# w2 = 2.416153, length 3.276740. Page 100: w1 = 0.885368, w2 = 2.899383, w3 = 1.105091, length 3.226690.
# (2.213420 x 0.885368 + 2.416153 x 2.899383) / (3.276740 x 3.226690) = 8.965045 / 10.573023.
TOPICS = {(200, 100): 0.847917}
# Entities: N = 200 + 1, df = 1 and 2: idf 5.303305, 4.610158. Page 200: 3.712313 and 0.922032, length 3.825103; page
# 101 points along the second: 0.922032 / 3.825103.
ENTITIES = {(200, 101): 0.241048}

# Multi-hot features: the first three attributes of the event page as the file has them, repeated ones too. A page
# without any, no page, and an unknown page have none.
LISTS = {
    "topic_id_list": (350, {200: [1, 2], 201: [7, 7, 8]}),
    "entity_id_list": (
        10000,
        {200: ["f9eec25663db4cd83183f5c805186f16", "55ebcfbdaff1d6f60b3907151f38527a"]},
    ),
    "category_id_list": (100, {200: [1000, 1001], 201: [1006, 1003, 1004], 203: [1000]}),
}

# Rates: ad 10: 3/6; ad 11 has 4 < 5 rows. Page 100, source 50, publisher 60, campaign 7: 10 rows, 4 clicks. Advertiser
# 3: 11 rows, 4 clicks. Everything else has too few rows.
AD_CTR = {10: 0.5}
CTR_100 = {10: 0.4, 11: 0.4}
ADVERTISER_CTR = {10: 4 / 11, 11: 4 / 11, 12: 4 / 11}
# ln(1 + count) over the 12 train rows: ln 7 six times, ln 5 four times, ln 2 twice: mean (11.675461 + 6.437752
# + 1.386294) / 12 = 1.624959; squares 22.719398 + 10.361162 + 0.960906 - 12 x 1.624959^2 = 2.355568; std
# sqrt(2.355568 / 11).
AD_COUNT = {10: (1.945910 - 1.624959) / 0.462755, 11: (1.609438 - 1.624959) / 0.462755,
            12: (0.693147 - 1.624959) / 0.462755, 13: (0.693147 - 1.624959) / 0.462755,
            14: -1.624959 / 0.462755, 15: -1.624959 / 0.462755}  # fmt: skip
# Pages: ln 11 ten times, ln 2 once (page 101), 0 once (ad 13): mean (23.978953 + 0.693147) / 12 = 2.056008; squares
# 57.499017 + 0.480453 - 12 x 2.056008^2 = 7.253428; std sqrt(7.253428 / 11) = 0.812036.
PAGE_COUNT = {10: (2.397895 - 2.056008) / 0.812036, 11: (2.397895 - 2.056008) / 0.812036,
              12: (0.693147 - 2.056008) / 0.812036, 13: -2.056008 / 0.812036,
              14: -2.056008 / 0.812036, 15: -2.056008 / 0.812036}  # fmt: skip


def id_bucket(value: int | None, buckets: int) -> int:
    """The published hash in plain integers; 0xE220A8397B1DCDAF is the constant of seed 0. A null is -1."""
    z = ((-1 if value is None else value) ^ 0xE220A8397B1DCDAF) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % buckets


def text_bucket(value: str | None, buckets: int) -> int:
    return id_bucket(None, buckets) if value is None else xxhash.xxh3_64_intdigest(value.encode()) % buckets


def expected(display: int, ad: int) -> dict[str, float]:
    page, landing = PAGE[display], LANDING[ad]
    pair = (page, landing)
    similarity = "document_id_document_id_promo_sim_"
    return {
        "document_id": id_bucket(page, 300000),
        "platform": PLATFORM[display],
        "document_id_promo": id_bucket(landing, 100000),
        "source_id": id_bucket(SOURCE[page], 4000),
        "publisher_id": id_bucket(PUBLISHER[page], 1000),
        "geo_location": text_bucket(PLACE[display], 2500),
        "geo_location_country": text_bucket(COUNTRY[display], 300),
        "geo_location_state": text_bucket(STATE[display], 2000),
        "ad_id": id_bucket(ad, 250000),
        "advertiser_id": id_bucket(ADVERTISER[ad], 2500),
        "source_id_promo": id_bucket(SOURCE[landing], 4000),
        "publisher_id_promo": id_bucket(PUBLISHER[landing], 1000),
        "campaign_id": id_bucket(CAMPAIGN[ad], 5000),
        "publish_time_days_since_published": math.log(1 + PAGE_DAYS[display]),
        "publish_time_promo_days_since_published": math.log(1 + LANDING_DAYS[display, ad]),
        similarity + "categories": CATEGORIES.get(pair, 0),
        similarity + "topics": TOPICS.get(pair, 0),
        similarity + "entities": ENTITIES.get(pair, 0),
        "document_id_promo_ctr": CTR_100.get(ad, 0),
        "publisher_id_promo_ctr": CTR_100.get(ad, 0),
        "source_id_promo_ctr": CTR_100.get(ad, 0),
        "ad_id_ctr": AD_CTR.get(ad, 0),
        "advertiser_id_ctr": ADVERTISER_CTR.get(ad, 0),
        "campaign_id_ctr": CTR_100.get(ad, 0),
        "document_id_promo_count": PAGE_COUNT[ad],
        "ad_id_count": AD_COUNT[ad],
    }


def expected_lists(display: int) -> dict[str, list[int]]:
    lists = {}
    for name, (buckets, by_page) in LISTS.items():
        values = by_page.get(PAGE[display], [])
        ids = [text_bucket(v, buckets) if isinstance(v, str) else id_bucket(v, buckets) for v in values]
        lists[name] = ids + [-1] * (3 - len(ids))
    return lists


@pytest.fixture(scope="module")
def multihot(tmp_path_factory):
    out = tmp_path_factory.mktemp("multihot") / "out"
    return out, run(OutbrainConfig(DATA, out, rows_per_shard=5, chunk_rows=4, multihot=True))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    out = tmp_path_factory.mktemp("outbrain") / "out"
    return out, run(OutbrainConfig(DATA, out, rows_per_shard=5, chunk_rows=4))


@pytest.mark.parametrize(
    ("split", "rows", "clicks"), [("train", TRAIN_ROWS, TRAIN_CLICKS), ("test", TEST_ROWS, TEST_CLICKS)]
)
def test_every_feature_has_the_hand_computed_value(output, split, rows, clicks):
    spec = FeatureSpec.load(output[0])
    shards = ShardSet.open(output[0] / split, verify=True)
    shards.check(spec)
    got = shards.read(0, shards.rows)
    assert got["clicked"].tolist() == clicks
    want = [expected(display, ad) for display, ad in rows]
    assert sorted(want[0]) == sorted((*spec.names, *spec.numeric_names))
    for name in spec.names:
        assert got[name].tolist() == [row[name] for row in want], name
    for name in spec.numeric_names:
        np.testing.assert_allclose(got[name], [row[name] for row in want], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("split", "rows"), [("train", TRAIN_ROWS), ("test", TEST_ROWS)])
def test_multi_hot_features_hold_the_first_three_of_the_event_page(output, multihot, split, rows):
    spec = FeatureSpec.load(multihot[0])
    assert (sum(spec.dims), spec.hotness) == (1235, (1,) * 13 + (3,) * 3)
    shards = ShardSet.open(multihot[0] / split, verify=True)
    shards.check(spec)
    got = shards.read(0, shards.rows)
    want = [expected_lists(display) for display, _ in rows]
    for name in LISTS:
        assert got[name].tolist() == [row[name] for row in want], name
    plain = ShardSet.open(output[0] / split).read(0, shards.rows)
    for name, values in plain.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    nulls = multihot[1][split]["nulls"]
    assert {name: nulls[name] for name in LISTS} == {name: sum(row[name] == [-1] * 3 for row in want) for name in LISTS}


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_multi_hot_data_trains(multihot, kind):
    """The loss on twelve rows falls, and in the multi-hot tables the rows that the lists name move, and no other."""
    spec = FeatureSpec.load(multihot[0])
    model = WideDeep(spec, hidden=(16,), dropout=0.0, seed=1)
    before = {name: array.clone() for name, array in model.named_arrays().items()}
    step = make_step(kind, model, StepConfig(), "cpu")
    reader = Reader(ShardSet.open(multihot[0] / "train"), 12, device="cpu", seed=3, spec=spec)
    losses = []
    for epoch in range(8):
        for batch in reader.epoch(epoch):
            losses.append(float(step.train(batch, epoch, 0.01)))
    assert losses[-1] < 0.7 * losses[0]
    for name in LISTS:
        moved = (model.named_arrays()[f"deep.table.{name}"] != before[f"deep.table.{name}"]).any(1)
        named = {i for display, _ in TRAIN_ROWS for i in expected_lists(display)[name] if i >= 0}
        assert set(moved.nonzero().ravel().tolist()) == named


def test_test_rows_ascend_by_display_and_keep_their_order_inside(output):
    shards = ShardSet.open(output[0] / "test")
    assert shards.read(0, shards.rows)["display_id"].tolist() == [display for display, _ in TEST_ROWS]
    assert "display_id" not in ShardSet.open(output[0] / "train").columns


def test_the_spec_names_the_shards(output):
    spec = FeatureSpec.load(output[0])
    for split in ("train", "test"):
        assert spec.source_files(split) == [output[0] / split]
        assert [chunk.type for chunk in spec.sources[split]] == ["shards"]


def test_the_report_counts_rows_displays_clicks_and_nulls(output):
    report = output[1]
    assert report["rows"] == 18
    assert (report["train"]["rows"], report["train"]["displays"], report["train"]["clicks"]) == (12, 6, 5)
    assert (report["test"]["rows"], report["test"]["displays"], report["test"]["clicks"]) == (6, 3, 3)
    assert report["test"]["click_rate"] == pytest.approx(0.5)
    assert report["ads_not_promoted"] == {"ads": 2, "rows": 2}
    nulls = report["train"]["nulls"]
    assert (nulls["document_id"], nulls["geo_location"], nulls["document_id_promo"], nulls["ad_id"]) == (1, 2, 1, 0)
    assert nulls["source_id"] == 4  # displays 3 (page 201) and 9
    assert nulls["publish_time_days_since_published"] == 4
    assert report["missing_files"] == []
    assert json.loads((output[0] / "report.json").read_text()) == json.loads(json.dumps(report))


def test_statistics_are_those_of_train(output):
    plain = json.loads((output[0] / "statistics" / "statistics.json").read_text())
    assert plain["train_rows"] == 12
    assert plain["median_age"] == {
        "publish_time_days_since_published": 4.5,
        "publish_time_promo_days_since_published": 11.0,
    }
    assert plain["count_mean"] == pytest.approx({"ad_id": 1.624959, "document_id_promo": 2.056008}, abs=2e-6)
    assert plain["count_std"] == pytest.approx({"ad_id": 0.462755, "document_id_promo": 0.812036}, abs=2e-6)
    with np.load(output[0] / "statistics" / "keys.npz") as keys:
        assert keys["ad_id.value"].tolist() == [10, 11, 12, 13]
        assert keys["ad_id.rows"].tolist() == [6, 4, 1, 1]
        assert keys["ad_id.clicks"].tolist() == [3, 1, 0, 1]
        assert keys["publisher_id_promo.value"].tolist() == [60, 72]


def test_the_command_reports_a_split_without_rows(tmp_path, capsys):
    synthetic.run(displays=1, seed=0, out=tmp_path / "raw")
    assert main(["preprocess", "outbrain", "--data_path", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 0
    assert "test: 0 rows, 0 displays, no rows" in capsys.readouterr().out
