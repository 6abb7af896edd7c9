"""Flavour `spark`: every feature of 35 rows against values worked out by hand from the tables below.

Ads are called by letters: A 250010, B 11, C 12, D 19, E 14, F 16 are promoted, M 13 and G 15 are not. A + marks the
clicked ad, a star a display that is tested on:
    1: A B M+   2: A+ B F   12: C G+   3: A C+ F   7*: A+ B   4: A+ C   5: B+ C F   6: A+ C F   8: B+ D F
    13*: A D+ G   9: B E+   11*: C E+   16: A F+   14: E+ F
The hash selects displays 4, 7, 8 and 14 of those of days 0 to 10 and of no day. 7 is tested on; 4 has no platform, so
no event counts for it, 8 has no time and 14 is of day 13: train. 11 and 13 are of days 11 and 12. 5 has no place, 12 no
event. Train rows (clicks): A 6 (3), B 5 (2), C 5 (1), D 1 (0), E 2 (2), F 7 (1), M 1 (1), G 1 (1), together 28 (11).
"""

import json
import math
import shutil

import numpy as np
import pytest

from preprocess.outbrain import OutbrainConfig, run
from preprocess.outbrain.columns import AdCounts, Promoted
from preprocess.outbrain.lookup import Lookup
from preprocess.outbrain.spark import SparkStatistics, double_log_idf
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet

A, B, C, D, E, F, M, G = 250010, 11, 12, 19, 14, 16, 13, 15
CLICKS = {
    1: [(A, 0), (B, 0), (M, 1)], 2: [(A, 1), (B, 0), (F, 0)], 12: [(C, 0), (G, 1)], 3: [(A, 0), (C, 1), (F, 0)],
    7: [(A, 1), (B, 0)], 4: [(A, 1), (C, 0)], 5: [(B, 1), (C, 0), (F, 0)], 6: [(A, 1), (C, 0), (F, 0)],
    8: [(B, 1), (D, 0), (F, 0)], 13: [(A, 0), (D, 1), (G, 0)], 9: [(B, 0), (E, 1)], 11: [(C, 0), (E, 1)],
    16: [(A, 0), (F, 1)], 14: [(E, 1), (F, 0)],
}  # fmt: skip
TEST_DISPLAYS = (7, 11, 13)

# 317 more events, of displays without clicks, make places frequent or leave them rare.
EVENTS = """display_id,uuid,document_id,timestamp,platform,geo_location
1,a,300200,72000000,1,US>CA>803
2,b,300200,86400000,2,GB
3,c,201,86400000,3,SG>00
4,d,300200,0,\\N,US>CA>803
5,e,300200,86400000,1,
6,f,203,86400000,2,US>CA>803
7,a,205,0,1,US>NY
8,b,300200,\\N,1,US>CA>803
9,c,\\N,950399999,1,US>NY
11,d,300200,950400000,3,US>CA>807
13,e,999,1036800000,2,US
14,f,202,1123200000,1,US
16,a,206,0,2, GB
""" + "".join(
    f"{2000 + i},z,1,0,1,{place}\n"
    for i, place in enumerate(["US>CA>803"] * 300 + ["GB"] * 9 + ["SG>00"] * 8)
)  # fmt: skip
PROMOTED = """ad_id,document_id,campaign_id,advertiser_id
250010,100100,5007,2503
11,100100,5007,9
12,101,8,2503
14,202,9,9
16,104,9,9
19,206,9,9
"""
META = """document_id,source_id,publisher_id,publish_time
100100,4050,1060,2016-06-04 00:00:00
101,51,\\N,2020-01-01 00:00:00
300200,52,70,2016-06-10 03:59:59
201,\\N,5000,2016-01-01 00:00:00
203,50,60,2000-01-01 00:00:00
205,49,,2016-06-14 04:00:00
206,51,\\N,\\N
104,\\N,61,2016-06-01 00:00:00
"""
CATEGORIES = """document_id,category_id,confidence_level
300200,1000,0.9
300200,1001,0.1
100100,1000,0.8
101,1002,0.5
203,1000,0.3
"""
TOPICS = """document_id,topic_id,confidence_level
300200,1,0.5
300200,2,0.5
300200,9,0.5
100100,1,0.2
100100,2,0.6
100100,3,0.2
100100,9,0.9
101,9,1
203,9,1
205,9,1
206,9,1
250,1,1
"""
ENTITIES = """document_id,entity_id,confidence_level
300200,f9eec25663db4cd83183f5c805186f16,0.7
300200,55ebcfbdaff1d6f60b3907151f38527a,0.2
101,55ebcfbdaff1d6f60b3907151f38527a,0.4
"""

# Pages are of documents as the joins give them; 4, 5 and 12 have none, and nothing else of an event.
PAGE = {1: 300200, 2: 300200, 3: 201, 6: 203, 7: 205, 8: 300200, 11: 300200, 13: 999, 14: 202, 16: 206}
LANDING = {A: 100100, B: 100100, C: 101, D: 206, E: 202, F: 104}
# Modulo 300000, 100000 and 250000; null is 0.
DOC_EVENT_ID = {300200: 200, 201: 201, 203: 203, 205: 205, 999: 999, 202: 202, 206: 206}
DOC_ID = {A: 100, B: 100, C: 101, D: 206, E: 202, F: 104, M: 0, G: 0}
AD_ID = {A: 10, B: 11, C: 12, D: 19, E: 14, F: 16, M: 13, G: 15}
PLATFORM = {2: 1, 3: 2, 6: 1, 11: 2, 13: 1, 16: 1}
# 201 and 104 have no source, so they lose their publisher and their time too. Of the others 60, 70 and 1060 are known;
# the sources without one are 49 and 51: 1060 + 1 + 0 and 1060 + 1 + 1. Modulo 4000 and 1000.
SOURCE = {300200: 52, 203: 50, 205: 49, 206: 51}
PUBLISHER = {300200: 70, 203: 60, 205: 61, 206: 62}
AD_SOURCE = {A: 50, B: 50, C: 51, D: 51}  # else -1 modulo 4000
AD_PUBLISHER = {A: 60, B: 60, C: 62, D: 62}
CAMPAIGN = {A: 7, B: 7, C: 8, D: 9, E: 9, F: 9}  # modulo 5000
ADVERTISER = {A: 3, C: 3, B: 9, D: 9, E: 9, F: 9}  # modulo 2500
# Events that count: US>CA>803 has displays 1, 6, 8 and 300 more; GB 2 and 9 more; SG>00 3 and 8 more: 9 are too few, so
# -1. " GB" is another place of the same country, US>NY has 2, US 2, US>CA>807 1.
# Countries: US 303 + 2 + 2 + 1 = 308, modulo 300; GB 10 + 1. States: US>CA 303 + 1, GB 11.
RARE = {"event_geo_location": 2499, "event_country": 299, "event_country_state": 1999}
GEO = {
    "event_geo_location": {1: 303, 6: 303, 8: 303, 2: 10},
    "event_country": {1: 8, 6: 8, 7: 8, 8: 8, 9: 8, 11: 8, 13: 8, 14: 8, 2: 11, 16: 11},
    "event_country_state": {1: 304, 6: 304, 8: 304, 11: 304, 2: 11, 16: 11},
}

# Page 300200 dates from 4 d 0.998 s before time 0. Display 1 comes after 20 h: 4 days; 2 after 24 h: 5; 11 after 11 d:
# 15, the largest. Page 203 is older than 3650 days, 205 comes out 2 ms after display 7: 0, as the unknown ones.
# log2(1 + days) / log2(16).
PAGE_AGE = {1: 2.321928 / 4, 2: 2.584963 / 4, 11: 1}
# Page 100100 dates from 10 d 3:59:59.998 before time 0: 10 days at displays 1 (2 ms before the 11th), 7 and 16; 11 at
# 2, 3, 6; 21 at 9 (10 d 23:59:59.999 later); 22 at 13 (12 d later), the largest. 8 has no time. Page 101 is of 2020: 0.
# log2(1 + days) / log2(23), log2 11 = 3.459432, log2 12 = 3.584963, log2 22 = 4.459432, log2 23 = 4.523562.
LANDING_AGE = {
    (1, A): 0.764758, (1, B): 0.764758, (7, A): 0.764758, (7, B): 0.764758, (16, A): 0.764758,
    (2, A): 0.792509, (2, B): 0.792509, (3, A): 0.792509, (6, A): 0.792509, (9, B): 0.985823, (13, A): 1,
}  # fmt: skip

# Six documents have a source. idf of an attribute of one document ln ln 6 = 0.583198, of two ln ln 3 = 0.094048, of
# three ln ln 2 = -0.366513; of six ln ln 1 is not defined: 0.
# Categories: 1000 is of three. Page 300200: (0.9 x -0.366513, 0.1 x 0.583198) = (-0.329862, 0.058320), length 0.334977.
CATEGORY_SIMILARITY = {(300200, 100100): 0.329862 / 0.334977, (203, 100100): 1.0}
# Topics: 1 is of three (250 is not in documents_meta), 2 of two, 3 of one, 9 of six. Page 300200: (-0.183256,
# 0.047024), length 0.189193; page 100100: (-0.073303, 0.056429, 0.116640), length 0.148870; product 0.0134331 +
# 0.0026535.
TOPIC_SIMILARITY = {(300200, 100100): 0.0160867 / (0.189193 * 0.148870)}
# Entities: 0.7 x 0.583198 and 0.2 x 0.094048 against the second alone: 0.018810 / sqrt(0.408239^2 + 0.018810^2).
ENTITY_SIMILARITY = {(300200, 101): 0.018810 / 0.408672}

# More than 5 rows: A 6, F 7, not B and C with 5. Pages: 100100 (A, B) 11 rows, 5 clicks; 104 (F) 7; not 101 (C) with 5.
# More than 10: source 4050, publisher 1060 and campaign 5007 (A, B) 11; not campaign 9 (D, E, F) with 10.
# Advertiser 2503 (A, C) 11 rows, 4 clicks; 9 (B, D, E, F) 15 rows, 5 clicks.
POP_AD = {A: 3 / 6, F: 1 / 7}
POP_PAGE = {A: 5 / 11, B: 5 / 11, F: 1 / 7}
POP_A_B = {A: 5 / 11, B: 5 / 11}
POP_ADVERTISER = {A: 4 / 11, C: 4 / 11, B: 5 / 15, D: 5 / 15, E: 5 / 15, F: 5 / 15}
# log2(1 + views), of keys with a rate: ads A log2 7 = 2.807355 and F log2 8 = 3, the largest; pages 100100 log2 12 =
# 3.584963, the largest, and 104 log2 8. The smallest are 0.
AD_VIEWS = {A: 2.807355 / 3, F: 1}
PAGE_VIEWS = {A: 1, B: 1, F: 3 / 3.584963}


def expected(display: int, ad: int) -> dict[str, float]:
    page = PAGE.get(display)
    pair = (page, LANDING.get(ad))
    no_event = display in (4, 5, 12)
    return {
        "doc_event_id": DOC_EVENT_ID.get(page, 0),
        "event_platform": PLATFORM.get(display, 0),
        "doc_id": DOC_ID[ad],
        "doc_event_source_id": SOURCE.get(page, 0),
        "doc_event_publisher_id": PUBLISHER.get(page, 0),
        **{name: 0 if no_event else GEO[name].get(display, rare) for name, rare in RARE.items()},
        "ad_id": AD_ID[ad],
        "ad_advertiser": ADVERTISER.get(ad, 0),
        "doc_ad_source_id": AD_SOURCE.get(ad, 3999),
        "doc_ad_publisher_id": AD_PUBLISHER.get(ad, 0),
        "campaign_id": CAMPAIGN.get(ad, 0),
        "doc_event_days_since_published_log_01scaled": PAGE_AGE.get(display, 0),
        "doc_ad_days_since_published_log_01scaled": LANDING_AGE.get((display, ad), 0),
        "doc_event_doc_ad_sim_categories": CATEGORY_SIMILARITY.get(pair, 0),
        "doc_event_doc_ad_sim_topics": TOPIC_SIMILARITY.get(pair, 0),
        "doc_event_doc_ad_sim_entities": ENTITY_SIMILARITY.get(pair, 0),
        "pop_document_id": POP_PAGE.get(ad, 0),
        "pop_publisher_id": POP_A_B.get(ad, 0),
        "pop_source_id": POP_A_B.get(ad, 0),
        "pop_ad_id": POP_AD.get(ad, 0),
        "pop_advertiser_id": POP_ADVERTISER.get(ad, 0),
        "pop_campain_id": POP_A_B.get(ad, 0),
        "doc_views_log_01scaled": PAGE_VIEWS.get(ad, 0),
        "ad_views_log_01scaled": AD_VIEWS.get(ad, 0),
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    data = tmp_path_factory.mktemp("spark") / "raw"
    data.mkdir()
    clicks = "".join(f"{display},{ad},{clicked}\n" for display, ads in CLICKS.items() for ad, clicked in ads)
    tables = {"clicks_train": "display_id,ad_id,clicked\n" + clicks, "events": EVENTS, "promoted_content": PROMOTED}
    tables |= {"documents_meta": META, "documents_categories": CATEGORIES, "documents_topics": TOPICS}
    for name, text in (tables | {"documents_entities": ENTITIES}).items():
        (data / f"{name}.csv").write_text(text)
    return data


@pytest.fixture(scope="module")
def output(small):
    out = small.parent / "out"
    return out, run(OutbrainConfig(small, out, flavour="spark", rows_per_shard=10, chunk_rows=4))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_feature_has_the_hand_computed_value(output, split):
    spec = FeatureSpec.load(output[0])
    shards = ShardSet.open(output[0] / split, verify=True)
    shards.check(spec)
    got = shards.read(0, shards.rows)
    displays = sorted(TEST_DISPLAYS) if split == "test" else [d for d in CLICKS if d not in TEST_DISPLAYS]
    rows = [(display, ad) for display in displays for ad, _ in CLICKS[display]]
    want = [expected(*row) for row in rows]
    assert len(rows) == {"train": 28, "test": 7}[split]
    assert got["label"].tolist() == [clicked for display in displays for _, clicked in CLICKS[display]]
    assert list(want[0]) == [*spec.names, *spec.numeric_names]
    for name in spec.names:
        assert got[name].tolist() == [row[name] for row in want], name
    for name in spec.numeric_names:
        np.testing.assert_allclose(got[name], [row[name] for row in want], rtol=1e-5, atol=2e-6, err_msg=name)
    if split == "test":
        assert got["display_id"].tolist() == [display for display, _ in rows]


def test_the_report_counts_what_is_missing(output):
    train = output[1]["train"]
    assert (train["rows"], train["displays"], train["clicks"]) == (28, 11, 11)
    nulls = train["nulls"]
    assert nulls["event_geo_location"] == 7  # displays 4, 5, 12
    assert nulls["doc_event_id"] == 9  # and 9
    assert nulls["doc_event_source_id"] == 14  # and 3, whose page has no source, and 14, whose page is unknown
    assert nulls["doc_ad_source_id"] == 11  # of E 2, F 7, M, G
    assert nulls["doc_id"] == nulls["campaign_id"] == 2
    assert nulls["doc_event_days_since_published_log_01scaled"] == 19  # displays 3 4 5 8 9 12 14 16, not 6
    assert output[1]["flavour"] == "spark"


def test_the_spec_is_that_of_the_first_release(output):
    """The columns of the deep input, with the embedding dims that sum to 976."""
    spec = FeatureSpec.load(output[0])
    assert (sum(spec.dims), spec.deep_width, sum(spec.cardinalities)) == (976, 989, 672304)
    columns = {name: (offset, width) for name, _, offset, width in spec.deep_columns}
    assert columns["ad_advertiser_embedding"] == (0, 64)
    assert columns["campaign_id_embedding"] == (193, 64)
    assert columns["doc_event_doc_ad_sim_categories"] == (387, 1)
    assert columns["doc_id_embedding"] == (646, 128)
    assert columns["event_platform_embedding"] == (967, 16)
    assert columns["pop_source_id"] == (988, 1)
    assert (spec.label, spec.group) == ("label", "display_id")


def test_given_statistics_decide_rates_scales_and_places(small, output, tmp_path):
    """Ten events fewer, no clicks of display 1: with the first data's statistics its rows are as they were."""
    data = shutil.copytree(small, tmp_path / "data")
    (data / "events.csv").write_text("".join((data / "events.csv").read_text().splitlines(keepends=True)[:-10]))
    clicks = (data / "clicks_train.csv").read_text().splitlines(keepends=True)
    (data / "clicks_train.csv").write_text("".join([clicks[0], *clicks[4:]]))
    run(OutbrainConfig(data, tmp_path / "given", flavour="spark", stats=output[0]))
    run(OutbrainConfig(data, tmp_path / "learned", flavour="spark"))
    want = ShardSet.open(output[0] / "train").read(3, 28)
    given, learned = (ShardSet.open(tmp_path / name / "train").read(0, 25) for name in ("given", "learned"))
    for name, values in want.items():
        np.testing.assert_array_equal(given[name], values, err_msg=name)
    changed = {name for name, values in want.items() if not np.array_equal(learned[name], values)}
    assert {"event_geo_location", "event_country", "pop_ad_id", "ad_views_log_01scaled"} <= changed


def test_statistics_of_the_other_flavour_are_refused(small, output, tmp_path):
    run(OutbrainConfig(small, tmp_path / "nvtabular"))
    for flavour, stats in (("spark", tmp_path / "nvtabular"), ("nvtabular", output[0])):
        with pytest.raises(InputError, match=rf"flavour {flavour}\), got version 1, flavour"):
            run(OutbrainConfig(small, tmp_path / "out", flavour=flavour, stats=stats))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"places": None},
        {"places": {"geo_location": {"US": "many"}}},
        {"places": [1, 2]},
        {"log2_min": {"ad_id": 0}},
        {"log2_max": 3},
    ],
)
def test_damaged_statistics_are_refused(small, output, tmp_path, damage):
    stats = shutil.copytree(output[0] / "statistics", tmp_path / "stats")
    plain = json.loads((stats / "statistics.json").read_text())
    (stats / "statistics.json").write_text(json.dumps(plain | damage))
    with pytest.raises(InputError, match=r"expected statistics\.json and keys\.npz of an earlier run"):
        run(OutbrainConfig(small, tmp_path / "out", flavour="spark", stats=stats))


def test_multi_hot_features_are_refused(small, tmp_path):
    with pytest.raises(InputError, match="multihot: expected flavour 'nvtabular', for 'spark' has no multi-hot"):
        OutbrainConfig(small, tmp_path / "out", flavour="spark", multihot=True)


@pytest.mark.parametrize("missing", ["documents_meta", "documents_topics"])
def test_an_absent_document_file_is_all_null(small, tmp_path, missing):
    data = shutil.copytree(small, tmp_path / "data")
    (data / f"{missing}.csv").unlink()
    run(OutbrainConfig(data, tmp_path / "out", flavour="spark"))
    got = ShardSet.open(tmp_path / "out" / "train").read(0, 28)
    assert not got["doc_event_doc_ad_sim_topics"].any()
    gone = missing == "documents_meta"
    assert got["doc_event_doc_ad_sim_categories"].any() != gone
    assert got["doc_event_source_id"].any() != gone
    assert got["doc_ad_days_since_published_log_01scaled"].any() != gone


def test_scales_begin_at_the_smallest_value_of_either_split():
    """Rows of ads 6, 8 and 6, 3 of them of the test set: log2 7 is 0, log2 9 is 1; days 3 and 15: log2 4 is 0."""
    none = np.full(3, -1, np.int32)
    promoted = Promoted(Lookup.build(np.empty(0, np.int32)), *(none[:1] for _ in range(6)), none[:1].astype(np.int64))
    ads = AdCounts(np.array([1, 2, 3], np.int32), np.array([6, 9, 8]), np.array([6, 8, 6]), np.array([3, 8, 0]))
    ages = np.zeros((2, 3652), np.int64)
    ages[:, [3, 15]] = 5
    learned = SparkStatistics.learn(ads, ages, promoted, {})
    np.testing.assert_allclose(learned.count("ad_id", ads.ad), [0, 1, 0], atol=1e-7)
    np.testing.assert_allclose(learned.count("ad_id", np.array([9], np.int32)), -math.log2(7) / math.log2(9 / 7))
    assert learned.count("document_id_promo", none).tolist() == [0, 0, 0]  # every row's views are 0: no scale
    age = learned.age("publish_time_days_since_published")
    np.testing.assert_allclose(age[[3, 7, 15, 3651]], [0, 0.5, 1, -1], atol=1e-7)


def test_the_double_logarithm_is_zero_where_it_is_not_defined():
    got = double_log_idf(6, np.array([1, 2, 3, 6, 7]), 1)
    np.testing.assert_allclose(got, [0.583198, 0.094048, -0.366513, 0, 0], atol=1e-6)
    assert double_log_idf(0, np.array([1, 5]), 1).tolist() == [0, 0]
