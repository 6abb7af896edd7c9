"""Exported programs: the model's logits from any batch, without this package, and nothing of this machine in them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import main
from planted import CATEGORICAL, NUMERIC, TAGS, planted_data
from test_tabular import write_spec

from preprocess.tabular import Encoder, TabularConfig, run
from widedeep import export
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec
from widedeep.model import WideDeep

SUMMED = CategoricalFeature("words", 9, 2, hotness=4, combiner="sum", multi_hot=True)
SPEC = FeatureSpec((*CATEGORICAL, TAGS, SUMMED), NUMERIC, "clicked", None, {})
WIDE_ONLY = replace(SPEC, categorical=[replace(f, dim=0 if f.name != "site" else 4) for f in SPEC.categorical])
FORMATS = ["pt2", pytest.param("onnx", marks=pytest.mark.slow)]


@pytest.fixture(params=FORMATS)
def kind(request):
    if request.param == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"export to ONNX needs {package}, which is not installed")
    return request.param


def load(directory, kind):
    """The program, from its file alone."""
    if kind == "pt2":
        module = torch.export.load(directory / "model.pt2").module()
        return lambda *batch: [t.detach().numpy() for t in module(*batch)]
    import onnxruntime

    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["logit", "prob"]
    return lambda ids, numeric: session.run(names, {"ids": ids.numpy(), "numeric": numeric.numpy()})


@pytest.mark.parametrize(
    ("spec", "parts", "hidden"),
    [
        (SPEC, "both", [16, 8]),
        (SPEC, "wide", []),
        (SPEC, "deep", [5]),
        (SPEC, "both", []),
        (FeatureSpec(CATEGORICAL, (), "clicked", None, {}), "both", [3]),
        (FeatureSpec((), NUMERIC, "clicked", None, {}), "both", [3]),
        (WIDE_ONLY, "both", [3]),
        (replace(WIDE_ONLY, categorical=[replace(f, dim=0) for f in WIDE_ONLY.categorical]), "both", []),
    ],
)
def test_logits_are_the_models(spec, parts, hidden, kind, tmp_path):
    model = WideDeep(spec, hidden=hidden, seed=3, parts=parts, dropout=0.5)
    told = export.export(model, str(tmp_path / "out"), kind)
    assert model.training
    assert 0 <= told["largest_difference"] < 1e-5
    program = load(tmp_path / "out", kind)
    model.eval()
    for B in (1, 2, 129):
        batch = export.random_batch(spec, B, torch.Generator().manual_seed(B))
        logit, prob = program(*batch)
        want = model(*batch).detach().numpy()
        np.testing.assert_allclose(logit, want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(prob, 1 / (1 + np.exp(-want.astype(float))), rtol=0, atol=1e-6)


def test_what_is_told_of_a_program():
    """A list of one id is a list; the difference is the largest of all batches."""
    single = CategoricalFeature("one", 5, 2, multi_hot=True)
    spec = replace(SPEC, categorical=[*SPEC.categorical, single])
    ids = export._description(spec, "pt2", "")["inputs"]["ids"]
    assert ids[-5:] == [*(f"words[{i}]" for i in range(4)), "one[0]"]
    model = WideDeep(spec, hidden=[4], seed=1).eval()
    errors = dict(zip(export.CHECKED, (2e-6, 7e-6, 1e-6)))
    with torch.no_grad():
        found = export._difference(lambda *batch: model(*batch).double() + errors[len(batch[0])], model)
    assert found == pytest.approx(7e-6, abs=1e-9)


def test_a_program_sums_only_where_there_is_more_than_one_row():
    """Runtimes take long for sums of one: there is one sum of the wide part, and one of each list's embeddings."""
    single = CategoricalFeature("one", 5, 2, combiner="mean", multi_hot=True)
    spec = replace(SPEC, categorical=[*SPEC.categorical, single])
    served = export.Served(WideDeep(spec, hidden=[4], seed=1).eval()).eval()
    inputs, shapes = export._example(spec)
    nodes = torch.export.export(served, inputs, dynamic_shapes=shapes).graph.nodes
    sums = [node for node in nodes if node.target is torch.ops.aten.sum.dim_IntList]
    assert len(sums) == 1 + 2 + 1  # wide; tags and words; and, as tags has a mean, how many there are


@pytest.mark.parametrize("missing", [{"numeric": ()}, {"categorical": ()}])
def test_no_logit_depends_on_a_product_of_no_columns(missing):
    """In onnxruntime 1.20 to 1.31 it is what the memory held before."""
    served = export.Served(WideDeep(replace(SPEC, **missing), hidden=[4], seed=1).eval()).eval()
    inputs, shapes = export._example(served.spec)
    nodes = torch.export.export(served, inputs, dynamic_shapes=shapes).graph.nodes
    assert any(0 in node.meta["val"].shape for node in nodes if node.op == "placeholder")
    *_, output = nodes
    found, reached = set(output.all_input_nodes), set()
    while found - reached:
        reached |= found
        found = {source for node in reached for source in node.all_input_nodes}
    assert len(reached) > 10
    assert not [node for node in reached if 0 in node.meta["val"].shape]


def test_padding_adds_nothing(kind, tmp_path):
    model = WideDeep(SPEC, hidden=[4], seed=1).eval()
    export.export(model, tmp_path / "out", kind)
    batch = (torch.full((2, SPEC.id_columns), -1, dtype=torch.int32), torch.zeros(2, len(SPEC.numeric)))
    np.testing.assert_allclose(load(tmp_path / "out", kind)(*batch)[0], model(*batch).detach().numpy(), atol=1e-6)


def test_a_trained_checkpoint_by_the_command_line(kind, tmp_path, capsys):
    data = planted_data(tmp_path / "data")
    places = ["--dataset_path", str(data), "--model_dir", str(tmp_path / "model"), "--results_dir", str(tmp_path / "r")]
    sizes = ["--deep_hidden_units", "16", "--num_epochs", "1", "--global_batch_size", "64", "--deep_warmup_epochs", "1"]
    assert main(["train", *places, *sizes, "--cpu", "--seed", "5", "--threads", "1"]) == 0
    capsys.readouterr()
    out = tmp_path / "served"
    assert main(["export", "--model", str(tmp_path / "model"), "--format", kind, "--out", str(out)]) == 0
    assert f"{out}/model.{kind}: " in capsys.readouterr().out
    told = json.loads((out / "export.json").read_text())
    assert told["inputs"] == {"ids": ["ad", "site", "tags[0]", "tags[1]", "tags[2]"], "numeric": ["age", "price"]}
    assert told["checkpoint"].endswith("step-16")
    assert FeatureSpec.load(out).names == ("ad", "site", "tags")

    weights = tmp_path / "model" / "checkpoint" / "step-16" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    damaged = shutil.copytree(tmp_path / "model", tmp_path / "damaged") / weights.relative_to(tmp_path / "model")
    damaged.write_bytes(content)
    assert main(["export", "--model", str(tmp_path / "damaged"), "--format", kind, "--out", str(tmp_path / "no")]) == 2
    assert "damaged checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()

    predictions = tmp_path / "p.csv"
    scored = ["--model", str(tmp_path / "model"), "--dataset_path", str(data), "--cpu", "--precision", "fp32"]
    assert main(["predict", *scored, "--out", str(predictions)]) == 0
    want = np.loadtxt(predictions, delimiter=",", skiprows=1)[:, 2]
    # As a server would: the columns by the names in export.json, from a process without this package.
    rows = tmp_path / "rows.npz"
    np.savez(rows, **_columns(data))
    run = _SERVER_PT2 if kind == "pt2" else _SERVER_ONNX
    subprocess.run([sys.executable, "-c", run, str(out), str(rows), str(tmp_path / "logit.npy")], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "logit.npy"), want, atol=1e-5)


def test_an_export_with_statistics_serves_raw_rows(kind, tmp_path, capsys):
    """Encoded in memory and run by the program, rows of a file have the probabilities that `predict` gives them."""
    spec = write_spec(
        tmp_path / "spec.yaml",
        {
            "city": {"transform": {"vocabulary": {}}},
            "tags": {"max_hotness": 2, "transform": {"vocabulary": {}, "separator": "|"}},
            "age": {"transform": {"fill": "mean", "standardise": True}},
            "click": {},
        },
        one_hot=["city"],
        multi_hot=["tags"],
        numeric=["age"],
    )
    g = np.random.default_rng(1)
    rows = [
        {
            "city": str(g.choice(["Oslo", "Rome", "Paris"])),
            "tags": "|".join(g.choice(["a", "b", "c"], g.integers(3))),
            "age": None if g.random() < 0.2 else float(g.integers(18, 80)),
            "click": int(g.integers(2)),
        }
        for _ in range(200)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data, model, out = tmp_path / "data", tmp_path / "model", tmp_path / "served"
    run(TabularConfig(spec, data, [tmp_path / "rows.parquet"], split="last:50"))
    places = ["--dataset_path", str(data), "--model_dir", str(model), "--results_dir", str(tmp_path / "r")]
    sizes = ["--deep_hidden_units", "16", "--num_epochs", "2", "--global_batch_size", "32", "--deep_warmup_epochs", "0"]
    assert main(["train", *places, *sizes, "--cpu", "--seed", "5", "--threads", "1"]) == 0
    exported = ["export", "--model", str(model), "--format", kind, "--out"]
    (data / "statistics" / "statistics.json").chmod(0o400)
    (data / "statistics").chmod(0o500)
    assert main([*exported, str(out), "--stats", str(data)]) == 0
    (data / "statistics").chmod(0o700)
    for path, alike in ((out / "statistics", out), (out / "statistics" / "statistics.json", out / "export.json")):
        assert path.stat().st_mode == alike.stat().st_mode
    assert (out / "statistics" / "statistics.json").read_bytes() == (data / "statistics/statistics.json").read_bytes()
    scored = ["--model", str(model), "--dataset_path", str(data), "--cpu", "--precision", "fp32"]
    assert main(["predict", *scored, "--out", str(tmp_path / "p.csv")]) == 0
    want = np.loadtxt(tmp_path / "p.csv", delimiter=",", skiprows=1, usecols=1)
    batch = [torch.from_numpy(a) for a in Encoder(out)(rows[-50:])]
    np.testing.assert_allclose(load(out, kind)(*batch)[1], want, atol=1e-6)

    assert main([*exported, str(out), "--stats", str(out)]) == 2  # in the way of its own reading
    assert "this run reads" in capsys.readouterr().err
    other = shutil.copytree(data, tmp_path / "other") / "statistics" / "statistics.json"
    other.chmod(0o600)
    other.write_text(other.read_text().replace("Oslo", "Bergen"))
    assert main([*exported, str(tmp_path / "no"), "--stats", str(tmp_path / "other")]) == 2
    assert "expected the statistics that the model's rows were encoded with" in capsys.readouterr().err
    assert main([*exported, str(tmp_path / "no"), "--stats", str(tmp_path / "r")]) == 2
    assert "expected a data set with its directory statistics" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def _columns(data):
    from widedeep.shards import ShardSet

    shards = ShardSet.open(data / "test")
    return {
        name: column for name, column in shards.read(0, shards.rows).items() if name not in ("clicked", "display_id")
    }


_INPUTS = """
import json, sys
import numpy as np
out, rows, to = sys.argv[1:]
names, columns = json.load(open(out + "/export.json"))["inputs"], np.load(rows)
pick = lambda name: columns[name] if "[" not in name else columns[name.split("[")[0]][:, int(name[:-1].split("[")[1])]
ids = np.stack([pick(name) for name in names["ids"]], 1).astype(np.int32)
numeric = np.stack([columns[name] for name in names["numeric"]], 1).astype(np.float32)
"""
_SERVER_PT2 = f"""{_INPUTS}
import torch
module = torch.export.load(out + "/model.pt2").module()
np.save(to, module(torch.from_numpy(ids), torch.from_numpy(numeric))[0].detach().numpy())
assert "widedeep" not in sys.modules
"""
_SERVER_ONNX = f"""{_INPUTS}
import onnxruntime
session = onnxruntime.InferenceSession(out + "/model.onnx")
np.save(to, session.run(["logit"], {{"ids": ids, "numeric": numeric}})[0])
assert not {{"widedeep", "torch"}} & set(sys.modules)
"""


def test_the_program_holds_no_path_of_this_machine(kind, tmp_path):
    export.export(WideDeep(SPEC, hidden=[4], seed=1), tmp_path / "out", kind)
    content = (tmp_path / "out" / f"model.{kind}").read_bytes()
    assert str(tmp_path).encode() not in content
    assert export.__file__.encode() not in content


@pytest.mark.slow
def test_weights_too_large_for_the_file_lie_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript, which is not installed")
    pytest.importorskip("onnxruntime", reason="export to ONNX needs onnxruntime, which is not installed")
    monkeypatch.setattr(export, "LARGEST_ONNX", 0)
    for _ in range(2):  # the second replaces the first, data and all
        export.export(WideDeep(SPEC, hidden=[4], seed=1), tmp_path / "out", "onnx")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", "model.onnx.data"}


def test_a_program_that_disagrees_is_not_written(tmp_path, monkeypatch):
    forward = export.Served.forward

    def off(self, ids, numeric):
        logit, prob = forward(self, ids, numeric)
        return logit + 1e-3, prob

    monkeypatch.setattr(export.Served, "forward", off)
    model = WideDeep(SPEC, hidden=[4], seed=1)
    with pytest.raises(RunError, match=r"logits differ from the model's by 0\.001"):
        export.export(model, tmp_path / "out", "pt2")
    assert model.training
    assert not (tmp_path / "out").exists()


def test_bad_input(tmp_path, monkeypatch):
    model = WideDeep(SPEC, hidden=[4], seed=1)
    with pytest.raises(InputError, match="expected onnx, pt2 or triton, got tflite"):
        export.export(model, tmp_path / "out", "tflite")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="needs the package onnxruntime: pip install"):
        export.export(model, tmp_path / "out", "onnx")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("mine")
    with pytest.raises(InputError, match="will not replace"):
        export.export(model, tmp_path / "letters", "pt2")
    assert not (tmp_path / "out").exists()
