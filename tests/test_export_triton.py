"""Entries of Triton's model repository: the configuration is as Triton reads it, and the ONNX model is as it says."""

import re
import secrets

import numpy as np
import pytest
import torch
from commands import main
from planted import CATEGORICAL, NUMERIC, TAGS, planted_data

from widedeep import export, export_triton
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep

SPEC = FeatureSpec((*CATEGORICAL, TAGS), NUMERIC, "clicked", None, {})
NO_NUMERIC = FeatureSpec((*CATEGORICAL, TAGS), (), "clicked", None, {})
NO_IDS = FeatureSpec((), NUMERIC, "clicked", None, {})
NOTHING = FeatureSpec((), (), "clicked", None, {})
SPECS = pytest.mark.parametrize("spec", [SPEC, NO_NUMERIC, NO_IDS], ids=["both", "no numeric", "no ids"])
TYPES = {"TYPE_INT32": "tensor(int32)", "TYPE_FP32": "tensor(float)"}
TENSOR = r'{\s*name: "(\w+)"\s*data_type: (\w+)\s*dims: \[ (\d+) \]\s*(reshape { shape: \[ \] })?\s*}'


@pytest.fixture
def onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"export to ONNX needs {package}, which is not installed")


def model_of(spec, parts="both"):
    return WideDeep(spec, hidden=[] if parts == "wide" else [8, 4], seed=secrets.randbits(30), parts=parts)


def session_of(directory):
    """The model as Triton's backend finds it."""
    import onnxruntime

    path = directory / "1" / "model.onnx"
    path = path / "model.onnx" if path.is_dir() else path
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def answers(directory, ids, numeric):
    """logit, prob as a client gets them but for the reshape to [B, 1]."""
    session, given = session_of(directory), {"ids": ids.numpy(), "numeric": numeric.numpy()}
    return session.run(["logit", "prob"], {tensor.name: given[tensor.name] for tensor in session.get_inputs()})


def files_of(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


TEXT = """
    name: "clicks" backend: "onnxruntime" max_batch_size: 512
    input [
      { name: "ids" data_type: TYPE_INT32 dims: [ 5 ] },
      { name: "numeric" data_type: TYPE_FP32 dims: [ 2 ] }
    ]
    output [
      { name: "logit" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } },
      { name: "prob" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }
    ]
    dynamic_batching { }
"""


def test_the_text_of_the_configuration():
    assert export_triton.config("clicks", SPEC, 512).split() == TEXT.split()


@pytest.mark.parametrize(("spec", "name"), [(NO_NUMERIC, "ids"), (NO_IDS, "numeric")])
def test_an_input_without_columns_is_not_declared(spec, name):
    inputs = export_triton.config("m", spec, 1).partition("input [")[2].partition("]\noutput")[0]
    assert re.findall(r'name: "(\w+)"', inputs) == [name]
    with pytest.raises(InputError, match="the model has no features: expected at least one"):
        export_triton.config("m", NOTHING, 1)


@SPECS
def test_the_configuration_is_a_message_of_tritons(spec):
    """By Triton's own protobuf, whose parser refuses unknown fields, wrong types and second values."""
    for package in ("grpc", "rapidjson", "tritonclient"):  # the last, without its extra, raises no ImportError
        pytest.importorskip(package, reason="tritonclient[grpc] is not installed")
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    config = text_format.Parse(export_triton.config("a.b-c_1", spec, export_triton.LARGEST_BATCH), pb.ModelConfig())
    assert (config.name, config.backend, config.platform) == ("a.b-c_1", "onnxruntime", "")
    assert config.max_batch_size == export_triton.LARGEST_BATCH
    want = [("ids", pb.TYPE_INT32, spec.id_columns), ("numeric", pb.TYPE_FP32, len(spec.numeric))]
    got = [(t.name, t.data_type, list(t.dims)) for t in config.input]
    assert got == [(name, kind, [columns]) for name, kind, columns in want if columns]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
        (name, pb.TYPE_FP32, [1]) for name in ("logit", "prob")
    ]
    assert all(t.HasField("reshape") and not t.reshape.shape for t in config.output)
    assert config.HasField("dynamic_batching")
    assert not config.instance_group


@pytest.mark.slow
@SPECS
@pytest.mark.parametrize("parts", ["both", "wide"])
def test_the_model_is_as_the_configuration_says(spec, parts, onnx, tmp_path):
    model, out = model_of(spec, parts), tmp_path / "clicks"
    told = export.export(model, out, "triton")
    assert model.training
    assert 0 <= told["largest_difference"] < 1e-5
    assert files_of(out) == {"config.pbtxt", "1/model.onnx", "export.json", "feature_spec.yaml"}
    text = (out / "config.pbtxt").read_text()
    assert 'name: "clicks"' in text
    assert "max_batch_size: 4096" in text
    inputs, outputs = (re.findall(TENSOR, part) for part in text.split("output ["))
    session = session_of(out)
    for declared, tensors in ((inputs, session.get_inputs()), (outputs, session.get_outputs())):
        assert [name for name, *_ in declared] == [tensor.name for tensor in tensors]
        for (_, data_type, columns, reshaped), tensor in zip(declared, tensors):
            assert TYPES[data_type] == tensor.type
            rows, *rest = tensor.shape
            assert isinstance(rows, str), "the number of rows is not free"
            assert rest == ([] if reshaped else [int(columns)])
    model.eval()
    for B in (1, 2, 129):
        batch = export.random_batch(spec, B, torch.Generator().manual_seed(secrets.randbits(30)))
        logit, prob = answers(out, *batch)
        want = model(*batch).detach().numpy()
        np.testing.assert_allclose(logit, want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(prob, 1 / (1 + np.exp(-want.astype(float))), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_model_of_several_files_has_a_directory_of_its_own(onnx, tmp_path, monkeypatch):
    model, out = model_of(SPEC), tmp_path / "clicks"
    batch = export.random_batch(SPEC, 5, torch.Generator().manual_seed(secrets.randbits(30)))
    small = export.LARGEST_ONNX
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "statistics.json").write_text("{}")
    statistics = export.Statistics(tmp_path / "statistics", "digest")
    for largest in (0, 0, small):  # each replaces the one before, data and all
        monkeypatch.setattr(export, "LARGEST_ONNX", largest)
        export.export(model, out, "triton", statistics=statistics)
        assert (out / "statistics" / "statistics.json").read_text() == "{}"
        programs = {name for name in files_of(out) if name.startswith("1/")}
        files = {"1/model.onnx"} if largest else {"1/model.onnx/model.onnx", "1/model.onnx/model.onnx.data"}
        assert programs == files
        np.testing.assert_allclose(answers(out, *batch)[0], model.eval()(*batch).detach().numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_trained_checkpoint_by_the_command_line(onnx, tmp_path, capsys):
    data = planted_data(tmp_path / "data")
    model, out = tmp_path / "model", tmp_path / "models" / "clicks"
    places = ["--dataset_path", str(data), "--model_dir", str(model), "--results_dir", str(tmp_path / "r")]
    sizes = ["--deep_hidden_units", "16", "--num_epochs", "1", "--global_batch_size", "64", "--deep_warmup_epochs", "1"]
    assert main(["train", *places, *sizes, "--cpu", "--seed", "5", "--threads", "1"]) == 0
    capsys.readouterr()
    exported = ["export", "--model", str(model), "--out"]
    assert main([*exported, f"{out}/", "--format", "triton", "--max-batch-size", "64"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}/1/model.onnx: {model}/")
    assert "inputs ids [B, 5] int32 and numeric [B, 2] float32; logits within" in said
    assert "max_batch_size: 64\n" in (out / "config.pbtxt").read_text()

    # Replaced by another format, and back; not where anything else lies there: another version, settings of its own.
    assert main([*exported, str(out), "--format", "pt2"]) == 0
    assert files_of(out) == {"model.pt2", "export.json", "feature_spec.yaml"}
    assert main([*exported, str(out), "--format", "triton"]) == 0
    assert files_of(out) == {"config.pbtxt", "1/model.onnx", "export.json", "feature_spec.yaml"}
    for name in ("2/model.onnx", "1/model.plan", "configs/gpu.pbtxt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        capsys.readouterr()
        assert main([*exported, str(out), "--format", "triton"]) == 2
        assert f"beside an earlier output it holds {name}" in capsys.readouterr().err
        (out / name).unlink()
    assert {path.name for path in out.parent.iterdir()} == {"clicks"}


@pytest.mark.slow
def test_a_program_that_disagrees_is_not_written(onnx, tmp_path, monkeypatch):
    forward = export.Served.forward

    def off(self, ids, numeric):
        logit, prob = forward(self, ids, numeric)
        return logit + 1e-3, prob

    monkeypatch.setattr(export.Served, "forward", off)
    with pytest.raises(RunError, match=r"logits differ from the model's by 0\.001"):
        export.export(model_of(NO_NUMERIC), tmp_path / "models" / "clicks", "triton")
    assert not list((tmp_path / "models").iterdir())


def test_a_server_cannot_take_what_is_not_complete_for_a_model(tmp_path, monkeypatch):
    """Triton refuses a directory whose config has another name, and without a config makes up one of its own."""
    seen = []

    def look(directory, of_several_files):
        seen.append((directory.name, (directory / "config.pbtxt").read_text()))
        raise RunError("no further")

    monkeypatch.setattr(export_triton, "onnx_path", look)
    with pytest.raises(RunError, match="no further"):
        export.export(model_of(SPEC), tmp_path / "clicks", "triton")
    [(name, text)] = seen
    assert name != "clicks"
    assert text == export_triton.config("clicks", SPEC, 4096)
    assert not list(tmp_path.iterdir())


BAD_NAMES = ["my model", 'a"b', "a\\b", "a\nb", "a'b", ".hidden", "a%20b", "modèle", "a#b", "a:b", "a\udc80b", "a]"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_requests_cannot_hold(name, tmp_path):
    with pytest.raises(InputError, match="expected a last part of ASCII letters"):
        export.export(model_of(SPEC), tmp_path / name, "triton")
    assert not list(tmp_path.iterdir())


def test_the_name_is_that_of_the_directory(tmp_path, monkeypatch):
    (tmp_path / "ctr.v2").mkdir()
    monkeypatch.chdir(tmp_path / "ctr.v2")
    assert export_triton.model_name(tmp_path / "a b" / "x" / ".." / "ctr-1_A") == "ctr-1_A"
    assert export_triton.model_name(tmp_path / "a" / "x" / "..") == "a"
    assert export_triton.model_name(type(tmp_path)(".")) == "ctr.v2"
    with pytest.raises(InputError, match="expected a last part"):
        export_triton.model_name(type(tmp_path)("/"))


def test_a_batch_size_that_does_not_fit(tmp_path):
    model = model_of(SPEC)
    for size in (0, -1, 2**31):
        with pytest.raises(InputError, match=f"max_batch_size: expected 1 to 2147483647, got {size}"):
            export.export(model, tmp_path / "out", "triton", max_batch_size=size)
    for kind in ("onnx", "pt2"):
        with pytest.raises(InputError, match=f"expected with the format triton alone, got it with {kind}"):
            export.export(model, tmp_path / "out", kind, max_batch_size=8)
    assert not list(tmp_path.iterdir())
