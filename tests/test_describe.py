"""The data report: every number against plain counting, memory in pieces, and what is refused."""

import json

import numpy as np
import pytest
from commands import main

from widedeep import describe
from widedeep.describe_page import page
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardWriter


def write_set(directory, rows, seed=0, cardinality=50):
    """A data set of one one-hot and one multi-hot feature and a number; gives the arrays of its splits."""
    chunks = {m: [{"type": "shards", "features": ["ad", "tags", "x", "click"], "files": [m]}] for m in rows}
    spec = FeatureSpec.from_dict(
        {
            "feature_spec": {
                "ad": {"cardinality": cardinality},
                "tags": {"cardinality": 9, "max_hotness": 3},
                "x": {},
                "click": {},
            },
            "source_spec": chunks,
            "channel_spec": {
                "onehot_categorical": ["ad"],
                "multihot_categorical": ["tags"],
                "numerical": ["x"],
                "label": ["click"],
                "map": [],
            },
        },
        "test",
    )
    directory.mkdir()
    spec.save(directory / "feature_spec.yaml")
    splits = {}
    for name, count in rows.items():
        rng = np.random.default_rng((seed, count))
        ad = np.minimum(rng.geometric(0.2, count) - 2, cardinality - 1)
        tags = np.where(rng.random((count, 3)) < 0.4, -1, rng.integers(0, 9, (count, 3)))
        click = (rng.random(count) < 0.1 + 0.02 * ad).astype(np.uint8)
        splits[name] = {"ad": ad, "tags": tags, "x": rng.lognormal(0, 1, count).astype(np.float32), "click": click}
        with ShardWriter(directory / name, spec, rows_per_shard=70) as writer:
            writer.append(splits[name])
    return splits


@pytest.mark.parametrize("dense", [1 << 22, 0])
def test_numbers_are_those_of_plain_counting(tmp_path, monkeypatch, dense):
    monkeypatch.setattr(describe, "ROWS", 33)
    monkeypatch.setattr(describe, "DENSE", dense)
    splits = write_set(tmp_path / "data", {"train": 300, "test": 100})
    report = describe.describe(tmp_path / "data")
    for name, arrays in splits.items():
        assert report["splits"][name]["clicks"] == arrays["click"].sum()
        for feature in ("ad", "tags"):
            ids = arrays[feature].reshape(len(arrays["click"]), -1)
            got = report["categorical"][feature][name]
            flat, clicks = ids[ids >= 0], np.broadcast_to(arrays["click"][:, None], ids.shape)[ids >= 0]
            values = sorted(set(flat.tolist()), key=lambda v: (-(flat == v).sum(), v))
            assert got["used"] == len(values)
            assert got["padding"] == pytest.approx((ids < 0).mean())
            assert got["empty_rows"] == (ids < 0).all(axis=1).sum()
            assert got["mean_length"] == pytest.approx((ids >= 0).sum(axis=1).mean())
            for n in (1, 10, 100):
                assert got["head"][str(n)] == pytest.approx(np.isin(flat, values[:n]).mean())
            assert [entry["id"] for entry in got["top"]] == values[:10]
            for entry in got["top"]:
                assert entry["rows"] == (flat == entry["id"]).sum()
                assert entry["click_rate"] == pytest.approx(clicks[flat == entry["id"]].mean())
            if name == "test":
                assert got["unseen"] == pytest.approx((~np.isin(flat, splits["train"][feature])).mean())
        x = arrays["x"].astype(np.float64)
        number = report["numeric"]["x"][name]
        assert [number[k] for k in ("min", "max", "mean", "std")] == pytest.approx(
            [x.min(), x.max(), x.mean(), x.std()]
        )
        assert list(number["quantiles"].values()) == pytest.approx(np.quantile(x, describe.LEVELS))


def test_quantiles_of_many_rows_are_of_a_sample(tmp_path, monkeypatch):
    splits = write_set(tmp_path / "data", {"train": 5000, "test": 9})
    monkeypatch.setattr(describe, "SAMPLE_ROWS", 2000)
    quantiles = describe.describe(tmp_path / "data" / "train")["numeric"]["x"]["train"]["quantiles"]
    ranks = [float((splits["train"]["x"] <= q).mean()) for q in quantiles.values()]
    assert ranks == pytest.approx(describe.LEVELS, abs=0.05)
    assert ranks != pytest.approx(describe.LEVELS, abs=1e-4)


def test_a_split_without_rows_and_a_huge_table(tmp_path):
    write_set(tmp_path / "data", {"train": 40, "test": 0}, cardinality=2**31 - 1)
    report = describe.describe(tmp_path / "data")
    assert report["splits"]["test"] == {"rows": 0, "clicks": 0, "click_rate": None}
    assert report["categorical"]["ad"]["test"]["top"] == []
    assert report["numeric"]["x"]["test"] is None
    assert "nan" not in page(report)


def test_without_train_rows_no_value_is_called_unseen(tmp_path):
    write_set(tmp_path / "data", {"train": 0, "test": 40})
    report = describe.describe(tmp_path / "data")
    assert [report["categorical"][name]["test"]["unseen"] for name in ("ad", "tags")] == [None, None]
    assert "nan" not in page(report)


def test_words_and_nulls_of_tables(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("town,size,click\n" + "<Rome>,1,1\n" * 8 + ",2,0\n" * 2)
    (tmp_path / "spec.yaml").write_text(
        "feature_spec: {town: {transform: vocabulary}, size: {}, click: {}}\n"
        "channel_spec: {onehot_categorical: [town], multihot_categorical: [], numerical: [size], label: [click],"
        " map: []}"
    )
    words = ["preprocess", "tabular", tmp_path / "a.csv", "--spec", tmp_path / "spec.yaml", "--split", "last:2"]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 0
    for suffix in (".html", ".json"):
        assert main(["describe", str(tmp_path / "out"), "--out", str(tmp_path / f"report{suffix}")]) == 0
    assert "<Rome>" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text()
    assert "&lt;Rome&gt;" in html
    assert "<Rome>" not in html
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["categorical"]["town"]["nulls"] == 2
    assert report["categorical"]["town"]["train"]["top"][0]["value"] == "<Rome>"
    assert report["categorical"]["town"]["test"]["top"][0]["value"] == "(missing, rare or unseen)"
    assert report["categorical"]["town"]["test"]["unseen"] == 1
    assert main(["describe", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_values_without_an_id_of_their_own_are_counted(tmp_path, capsys):
    """Missing, rare and unseen values share id 0, which train rows may have too: by ids none of them is new."""
    g = np.random.default_rng()
    train, test = g.integers(0, 40, 300), g.integers(20, 90, 200)
    lines = ["user,tags,age,kind,click"]
    for user in (*train, *test):
        age = "" if user % 7 == 0 else user
        lines.append(f"{user},{user % 5}|t{user},{age},{user},{user % 2}")
    (tmp_path / "a.csv").write_text("\n".join([*lines, ""]))
    (tmp_path / "spec.yaml").write_text(
        "feature_spec: {user: {transform: {vocabulary: {min_count: 8}}}, tags: {max_hotness: 2, transform: {vocabulary:"
        " {min_count: 8}, separator: '|'}}, age: {transform: {bucketise: {quantiles: 4}}}, kind: {cardinality: 50,"
        " transform: {hash: {}}}, band: {transform: {column: age, bucketise: {edges: [18, 30]}}}, click: {}}\n"
        "channel_spec: {onehot_categorical: [user, age, band, kind],"
        " multihot_categorical: [tags], numerical: [], label: [click], map: []}"
    )
    words = ["preprocess", "tabular", tmp_path / "a.csv", "--spec", tmp_path / "spec.yaml", "--split", "last:200"]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 0
    assert main(["describe", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.split("\n", 2)[2])["categorical"]
    known = [user for user in range(40) if (train == user).sum() >= 8]
    for split, users in (("train", train), ("test", test)):
        assert report["user"][split]["unknown"] == pytest.approx(1 - np.isin(users, known).mean())
        assert report["tags"][split]["unknown"] == pytest.approx((1 - np.isin(users, known).mean()) / 2)
        for buckets in ("age", "band"):
            assert report[buckets][split]["unknown"] == pytest.approx((users % 7 == 0).mean())
        words = {value["id"]: value["value"] for value in report["band"][split]["top"]}
        assert words.items() <= {0: "(missing)", 1: "[-inf, 18)", 2: "[18, 30)", 3: "[30, inf)"}.items()
        assert "unknown" not in report["kind"][split]
    assert report["user"]["test"]["unknown"] > 0.5
    assert report["user"]["test"]["unseen"] == 0
    assert "unknown" in page(describe.describe(tmp_path / "out"))


def test_words_of_crosses(tmp_path):
    """Of the combination where each has an id; a feature without words shows its id, and so does a hashed cross."""
    rows = ["Rome,red,2,1"] * 5 + ["Rome,,0,0"] * 4 + ["Oslo,blue,1,1"] * 3
    (tmp_path / "a.csv").write_text("\n".join(["town,colour,slot,click", *rows, ""]))
    (tmp_path / "spec.yaml").write_text(
        "feature_spec: {town: {transform: vocabulary}, colour: {transform: vocabulary}, slot: {cardinality: 3},"
        " all: {transform: {cross: [town, slot, colour]}}, click: {},"
        " hashed: {cardinality: 3, transform: {cross: [town, colour]}}}\n"
        "channel_spec: {onehot_categorical: [all, town, colour, slot, hashed], multihot_categorical: [], numerical: [],"
        " label: [click], map: []}"
    )
    words = ["preprocess", "tabular", tmp_path / "a.csv", "--spec", tmp_path / "spec.yaml", "--split", "none"]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 0
    described = describe.describe(tmp_path / "out")["categorical"]
    top = described["all"]["train"]["top"]
    assert [entry["value"] for entry in top] == [
        "Rome x 2 x red",
        "Rome x 0 x (missing, rare or unseen)",
        "Oslo x 1 x blue",
    ]
    assert [(entry["rows"], entry["click_rate"]) for entry in top] == [(5, 1), (4, 0), (3, 1)]
    assert described["all"]["nulls"] == 4
    assert "value" not in described["hashed"]["train"]["top"][0]


def test_words_of_buckets(tmp_path):
    """Are the interval between two edges, also in a cross, whether the edges were learned or given."""
    rows = ["1234567.5,1"] * 6 + ["18,1"] * 5 + [",0"] * 3 + ["17,0"] * 2
    (tmp_path / "a.csv").write_text("\n".join(["age,click", *rows, ""]))
    (tmp_path / "spec.yaml").write_text(
        "feature_spec: {age: {cardinality: 9, transform: {bucketise: {quantiles: 4}}}, click: {},"
        " one: {transform: {column: age, bucketise: {quantiles: 2}}},"
        " given: {transform: {column: age, bucketise: {edges: [20]}}}, both: {transform: {cross: [one, age]}}}\n"
        "channel_spec: {onehot_categorical: [age, one, given, both], multihot_categorical: [], numerical: [],"
        " label: [click], map: []}"
    )
    words = ["preprocess", "tabular", tmp_path / "a.csv", "--spec", tmp_path / "spec.yaml", "--split", "none"]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 0
    described = describe.describe(tmp_path / "out")["categorical"]
    tops = {name: described[name]["train"]["top"] for name in described}
    ages = ["[1234567.5, inf)", "[18, 1234567.5)", "(missing)", "[-inf, 18)"]
    assert [entry["value"] for entry in tops["age"]] == ages
    assert [entry["value"] for entry in tops["one"]] == ["[18, inf)", "(missing)", "[-inf, 18)"]
    pairs = zip(["[18, inf)", "[18, inf)", "(missing)", "[-inf, 18)"], ages, strict=True)
    assert [entry["value"] for entry in tops["both"]] == [" x ".join(pair) for pair in pairs]
    assert [entry["value"] for entry in tops["given"]] == ["[-inf, 20)", "[20, inf)", "(missing)"]
    learned = tmp_path / "out" / "statistics" / "statistics.json"
    learned.write_text(learned.read_text().replace("1234567.5", '"much"'))
    assert "value" not in describe.describe(tmp_path / "out")["categorical"]["age"]["train"]["top"][0]


@pytest.mark.parametrize("columns", [None, "80"])
def test_names_are_whole_in_a_file_and_on_a_narrow_terminal(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    name = "publish_time_promo_days_since_published"
    (tmp_path / "a.csv").write_text(f"town,{name},click\n" + "Rome,1,1\n" * 8 + "Oslo,2,0\n" * 2)
    (tmp_path / "spec.yaml").write_text(
        f"feature_spec: {{town: {{transform: vocabulary}}, {name}: {{}}, click: {{}}}}\n"
        f"channel_spec: {{onehot_categorical: [town], multihot_categorical: [], numerical: [{name}], label: [click],"
        " map: []}"
    )
    words = ["preprocess", "tabular", tmp_path / "a.csv", "--spec", tmp_path / "spec.yaml", "--split", "last:2"]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "\u2026" not in shown
    assert columns or name in shown
    pieces = [line.split()[0] for line in shown.splitlines() if line.split()]
    assert columns is None or name in "".join(pieces)


def test_what_is_no_data_set_is_refused(tmp_path):
    write_set(tmp_path / "data", {"train": 40, "test": 5})
    with pytest.raises(InputError, match="expected a data set"):
        describe.describe(tmp_path)
    assert main(["describe", str(tmp_path / "data"), "--out", "report.pdf"]) == 2
    part = tmp_path / "data" / "test" / "part-00000.shard"
    part.write_bytes(part.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match="is damaged"):
        describe.describe(tmp_path / "data")
    (tmp_path / "data" / "test" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json: not found"):
        describe.describe(tmp_path / "data")
