"""Whole runs with features in the wide part only: what they learn, several processes, going on, scoring, export."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import main
from safetensors.torch import load_file
from test_dist import SHARDED, assert_as_alone, whole_run
from test_export import kind, load  # noqa: F401

import widedeep
from widedeep import export, run
from widedeep.checkpoint import Checkpoints
from widedeep.data import Reader
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature, SourceChunk
from widedeep.shards import ShardSet, ShardWriter
from widedeep.share import ALL_ROWS, Share

PAIRS = 60  # values of the product of `ad` and `site`, which decides the click: neither does alone, nor both added
SPEC = FeatureSpec(
    [
        CategoricalFeature("pair", PAIRS, 0),
        CategoricalFeature("ad", 10, 8),
        CategoricalFeature("site", 6, 4),
        CategoricalFeature("words", 20, 0, hotness=3, combiner="mean", multi_hot=True),
    ],
    [NumericFeature("age")],
    "clicked",
    sources={
        split: (SourceChunk("shards", ("pair", "ad", "site", "words", "age", "clicked"), (split,)),)
        for split in ("train", "test")
    },
)
RUN = shlex.split(
    "--cpu --global_batch_size 64 --eval_batch_size 150 --num_epochs 3 --deep_warmup_epochs 1 --seed 5 --threads 1"
    " --deep_hidden_units 16 8 --deep_dropout 0.3 --deep_learning_rate 0.0001 --linear_learning_rate 2"
    " --disable_map_calculation"
)


def planted(directory: Path, spec: FeatureSpec = SPEC) -> Path:
    """A data set whose log-odds are one weight for each pair, +-2, that add up to nothing over any ad or site."""
    rng = np.random.default_rng(0)
    ad, site = np.divmod(np.arange(PAIRS), 6)
    weights = np.where((ad + site) % 2, 2.0, -2.0)
    directory.mkdir(parents=True)
    spec.save(directory / "feature_spec.yaml")
    for split, rows in (("train", 1000), ("test", 700)):
        pair = rng.integers(0, PAIRS, rows)
        words = rng.integers(0, 20, (rows, 3))
        words[rng.random(rows) < 0.4, 1:] = -1
        click = rng.random(rows) < 1 / (1 + np.exp(-weights[pair]))
        columns = {"pair": pair, "ad": ad[pair], "site": site[pair], "words": words}
        columns |= {"age": rng.normal(size=rows).astype(np.float32), "clicked": click.astype(np.uint8)}
        with ShardWriter(directory / split, spec) as writer:
            writer.append(columns)
            writer.finish()
    return directory


def words_of(data: Path, out: Path, *more: object) -> list[str]:
    places = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out]
    return ["train", *map(str, places), *RUN, *map(str, more)]


def arrays_of(out: Path) -> dict[str, torch.Tensor]:
    path = Checkpoints(out / "model").find("last")
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("one")
    assert main(words_of(data, out)) == 0
    return out


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    program = ["-m", "widedeep", "train", *RUN]
    return whole_run(1, data, tmp_path_factory.mktemp("alone"), "--step", "reference", program=program)


def area(logit: torch.Tensor, label: torch.Tensor) -> float:
    """Under the ROC curve, by counting pairs of rows."""
    above = logit[label > 0.5][:, None] - logit[label < 0.5][None]
    return float((above > 0).double().mean() + (above == 0).double().mean() / 2)


def test_it_learns_what_only_the_product_says(data, one):
    model = widedeep.load_model(one / "model", "last")
    (batch,) = Reader(ShardSet.open(data / "test"), 700, spec=model.spec, shuffle=False).epoch(0)
    arrays = model.named_arrays()
    assert arrays["deep.table.pair"].shape == (PAIRS, 0)
    with torch.no_grad():
        logit = model(batch.ids, batch.numeric)
        arrays["wide.table.pair"].zero_()
        without = model(batch.ids, batch.numeric)
    assert area(logit, batch.label) > 0.8
    assert abs(area(without, batch.label) - 0.5) < 0.1
    evaluation = json.loads((one / "evaluation.json").read_text())
    assert evaluation["auc"] == pytest.approx(area(logit, batch.label), abs=1e-6)


@pytest.mark.parametrize(
    ("world", "flags"),
    [(2, ("--step", "reference")), (3, ("--step", "fused")), (3, SHARDED)],
    ids=["2-reference", "3-fused", "3-sharded"],
)
def test_processes_give_the_result_of_one(data, alone, tmp_path, world, flags):
    assert_as_alone(alone, whole_run(world, data, tmp_path, *flags, program=["-m", "widedeep", "train", *RUN]))


@pytest.mark.parametrize("flags", [("--step", "reference"), ("--precision", "bf16"), ()], ids=str)
def test_a_run_that_goes_on_has_the_same_bits(data, tmp_path, flags):
    stops = ("--checkpoint_every_steps", 7, "--keep_last", 9, "--num_epochs", 2, *flags)
    assert main(words_of(data, tmp_path, *stops)) == 0
    want = arrays_of(tmp_path)
    assert want["deep.table.words"].shape == (20, 0)
    slots = {name.partition(".")[0] for name in want if name.endswith("table.words")}
    assert slots == {"deep", "wide", "accum", "linear"}  # RMSprop's say nothing of a table without columns
    assert (want["last_step.deep.table.site"] > 0).all()
    for step in (14, 16, 28, 32):  # two inside the epochs, and those at their ends
        shutil.rmtree(tmp_path / "model" / "checkpoint" / f"step-{step}")
    assert main(words_of(data, tmp_path, *stops, "--use_checkpoint")) == 0
    got = arrays_of(tmp_path)
    assert got.keys() == want.keys()
    for name, a in want.items():
        assert torch.equal(got[name], a), name


def test_every_command_takes_the_run(data, one, tmp_path, capsys):
    where = ["--model", str(one / "model"), "--checkpoint", "last", "--dataset_path", str(data), "--cpu"]
    assert main(["evaluate", *where, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["auc"] == pytest.approx(json.loads((one / "evaluation.json").read_text())["auc"], abs=1e-6)
    assert main(["predict", *where, "--precision", "fp32", "--out", str(tmp_path / "p.parquet")]) == 0
    model = widedeep.load_model(one / "model", "last")
    (batch,) = Reader(ShardSet.open(data / "test"), 700, spec=model.spec, shuffle=False).epoch(0)
    with torch.no_grad():
        logit = torch.tensor(pq.read_table(tmp_path / "p.parquet")["logit"].to_pylist())
        torch.testing.assert_close(logit, model(batch.ids, batch.numeric), rtol=1e-5, atol=1e-6)
    assert main(["describe", str(data), "--out", str(tmp_path / "d.html")]) == 0
    assert "words" in (tmp_path / "d.html").read_text()
    assert main(["report", str(one), "--out", str(tmp_path / "r.html")]) == 0
    assert "pair" in (tmp_path / "r.html").read_text()
    summary = json.loads((one / "data_summary.json").read_text())
    assert [feature["dim"] for feature in summary["categorical"]] == [0, 8, 4, 0]
    assert summary["parameters"] == sum(a.numel() for a in model.named_arrays().values())


def test_the_exported_program_has_the_models_logits(one, kind, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    which = ["--model", str(one / "model"), "--checkpoint", "last"]
    assert main(["export", *which, "--format", kind, "--out", str(out)]) == 0
    model = widedeep.load_model(one / "model", "last")
    batch = export.random_batch(model.spec, 77, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(load(out, kind)(*batch)[0], model(*batch).detach().numpy(), rtol=0, atol=1e-5)
    if kind == "pt2":  # which looks up nothing in a table without columns
        nodes = torch.export.load(out / "model.pt2").graph.nodes
        assert sum("embedding" in str(node.target) for node in nodes if node.op == "call_function") == 2


def test_another_run_begins_with_its_weights_unless_a_dim_differs(data, one, tmp_path, capsys):
    begin = ("--initial_checkpoint", one / "model")
    assert main(words_of(data, tmp_path / "new", *begin, "--num_epochs", 1)) == 0
    assert "beginning with the weights of" in capsys.readouterr().out
    fresh, grown = arrays_of(one), arrays_of(tmp_path / "new")
    assert grown["updates"] == fresh["updates"] + 16
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(dict(zip(SPEC.names, (2, 8, 4, 0)))))
    assert main(words_of(data, tmp_path / "other", *begin, "--embedding_sizes_file", sizes)) == 2
    assert "was trained with embedding dim 0 of pair, not 2" in capsys.readouterr().err


def test_a_data_set_without_a_column_for_the_deep_part_is_refused(tmp_path, capsys):
    spec = replace(SPEC, categorical=[replace(f, dim=0) for f in SPEC.categorical])
    data = planted(tmp_path / "data", spec)
    out = tmp_path / "out"
    assert main(words_of(data, out, "--num_epochs", "1")) == 0  # `age` is one
    assert arrays_of(out)["deep.layer.0.weight"].shape == (16, 1)
    text = (data / "feature_spec.yaml").read_text().replace("numerical:\n  - age", "numerical: []")
    (data / "feature_spec.yaml").write_text(text)
    capsys.readouterr()
    assert main(words_of(data, tmp_path / "no")) == 2
    assert "feature spec: expected a numeric feature or one with an embedding_dim >= 1" in capsys.readouterr().err


def test_the_memory_of_a_row_is_that_of_its_wide_part_too(monkeypatch):
    """A weight, FTRL's two slots and a step: four words a row on a CPU, as against two of each column."""

    def refused(available, dim, share=ALL_ROWS, processes=1):
        monkeypatch.setattr(run.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        spec = FeatureSpec([CategoricalFeature("big", 10**6, dim)], [NumericFeature("n")], "y")
        try:
            comm = LocalComm()
            comm.local_world = processes
            run.check_memory(spec, [], share, comm)
        except InputError:
            return True
        return False

    small = 10_000  # for what is no table
    for dim, words in ((0, 4), (1, 6), (8, 20)):
        assert refused(words * 4 * 10**6 - 1, dim)
        assert not refused(words * 4 * 10**6 + small, dim)
    assert refused(8 * 10**6 - 1, 0, Share(1, 2))
    assert not refused(8 * 10**6 + small, 0, Share(1, 2))
    assert refused(3 * 16 * 10**6 - 3, 0, processes=3)  # of one machine
    assert not refused(3 * (16 * 10**6 + small), 0, processes=3)


def test_more_rows_than_an_int32_counts_are_refused():
    half = [CategoricalFeature("a", 2**30, 0), CategoricalFeature("b", 2**30 - 1, 0)]
    for parts, numeric in (("both", [NumericFeature("n")]), ("wide", [])):
        with pytest.raises(InputError) as error:
            widedeep.WideDeep(FeatureSpec(half, numeric, "y"), hidden=[], parts=parts)
        words = "feature spec: expected cardinalities that add up to at most 2147483646, got 2147483647"
        assert str(error.value) == words
