"""A model is applied to rows that were encoded with the statistics of those it was trained with, and to no others."""

import numpy as np
import pytest
import yaml
from commands import main
from test_tabular import write_spec

from preprocess.provenance import statistics_digest
from preprocess.tabular import TabularConfig, run
from widedeep.feature_spec import FeatureSpec


def test_a_digest_is_of_what_the_files_hold(tmp_path):
    digests = []
    for i, (save, value) in enumerate(((np.savez, 3), (np.savez_compressed, 3), (np.savez, 4))):
        (directory := tmp_path / str(i)).mkdir()
        save(directory / "keys.npz", value=np.arange(value), rows=np.zeros(2, np.int64))
        (directory / "statistics.json").write_text("{}")
        digests.append(statistics_digest(directory))
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "0" / "statistics.json").write_text("[]")
    assert statistics_digest(tmp_path / "0") not in digests


def test_a_digest_tells_names_types_shapes_and_late_values_apart(tmp_path):
    def digest(name="keys.npz", **arrays):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        np.savez(directory / name, **arrays)
        return statistics_digest(directory)

    zeros = np.zeros(1000, np.int64)
    late = zeros.copy()
    late[-1] = 1
    found = [digest(a=zeros), digest(b=zeros), digest("other.npz", a=zeros), digest(a=late)]
    found += [digest(a=zeros.astype(np.float64)), digest(a=zeros.reshape(10, 100)), digest(a=late[:-1])]
    assert len(set(found)) == len(found)
    assert digest(a=zeros) == found[0]


TRAIN = "--cpu --deep_hidden_units 4 --global_batch_size 32 --num_epochs 1 --deep_warmup_epochs 0 --seed 1 --threads 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of `own`; `other`, whose cities are numbered otherwise; `given`, its rows with the model's statistics."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name, cities in (("own", ["Oslo", "Rome", "Rome"]), ("other", ["Oslo", "Oslo", "Rome"])):
        rows = [f"{rng.choice(cities)},{rng.integers(2)}" for _ in range(120)]
        (place / f"{name}.csv").write_text("\n".join(["city,click", *rows, ""]))
    spec = write_spec(place / "spec.yaml", {"city": {"transform": {"vocabulary": {}}}, "click": {}}, one_hot=["city"])
    own, other = place / "own.csv", place / "other.csv"
    run(TabularConfig(spec, place / "own", [own], split="last:40"))
    run(TabularConfig(spec, place / "other", [other], split="last:40"))
    run(TabularConfig(place / "own", place / "given", test=[other], stats=place / "own"))
    data = ["--dataset_path", str(place / "own"), "--model_dir", str(place / "model")]
    assert main(["train", *data, "--results_dir", str(place / "results"), *TRAIN.split()]) == 0
    return place


def commands(place, data, out):
    where = ["--dataset_path", str(place / data), "--cpu"]
    yield ["evaluate", "--model", str(place / "model"), *where]
    yield ["predict", "--model", str(place / "model"), *where, "--out", str(out / "scores.csv")]


def test_rows_with_other_statistics_are_refused(place, tmp_path, capsys):
    again = ["train", "--evaluate", "--use_checkpoint", "--dataset_path", str(place / "other"), "--cpu"]
    again += ["--model_dir", str(place / "model"), "--results_dir", str(tmp_path), "--deep_hidden_units", "4"]
    for words in (*commands(place, "other", tmp_path), again):
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert f"{place / 'other'}: was encoded with other statistics" in said
        assert "expected a data set made with --stats of that one" in said
    assert not list(tmp_path.iterdir())


def test_a_training_on_rows_with_other_statistics_does_not_begin_with_its_weights(place, tmp_path, capsys):
    for data, code in (("other", 2), ("own", 0)):
        words = ["train", "--dataset_path", str(place / data), "--initial_checkpoint", str(place / "model")]
        words += ["--model_dir", str(tmp_path / data), "--results_dir", str(tmp_path / f"{data} results")]
        assert main([*words, *TRAIN.split()]) == code
        said = capsys.readouterr().err
        assert (f"{place / 'other'}: was encoded with other statistics" in said) == (code == 2)
    assert not (tmp_path / "other results").exists()


@pytest.mark.parametrize("data", ["own", "given"])
def test_rows_with_its_own_are_taken(place, tmp_path, data):
    for words in commands(place, data, tmp_path):
        assert main(words) == 0


def test_a_data_set_that_names_none_is_taken(place, tmp_path):
    """As those of earlier versions."""
    path = place / "other" / "feature_spec.yaml"
    spec = yaml.safe_load(path.read_text())
    assert spec["metadata"].pop("statistics") != FeatureSpec.load(place / "own").metadata["statistics"]
    (place / "other" / "old.yaml").write_text(yaml.safe_dump(spec))
    for words in commands(place, "other", tmp_path):
        assert main([*words, "--fspec_file", "old.yaml"]) == 0
