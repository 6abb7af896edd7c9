"""Models past what the kernels of the GPU step take: refused in a sentence, or the reference step's."""

import re
from pathlib import Path

import pytest
import torch
from test_cuda_step import EVEN, gpu_step

from widedeep import step as steps
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.steps import limits

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def spec_of(tables=1, dim=4, hotness=1, numerics=1):
    categorical = [CategoricalFeature(f"f{i}", 3, dim, hotness=hotness) for i in range(tables)]
    return FeatureSpec(categorical, [NumericFeature(f"n{i}") for i in range(numerics)], label="y")


PAST = [
    ({"tables": 257}, [8], "feature spec: expected at most 256 tables for the fused step on a GPU, got 257"),
    ({"numerics": 257}, [8], "feature spec: expected at most 256 numeric features .*, got 257"),
    ({"tables": 17, "hotness": 241}, [8], "feature spec: expected at most 4096 id columns .*, got 4097"),
    ({"dim": 300}, [8], "feature f0: expected an embedding_dim of at most 256 .*, got 300"),
    ({}, [8, 4096], "--deep_hidden_units: expected a last layer of at most 2048 units .*, got 4096"),
    ({"dim": 256, "tables": 8}, [], "expected at most 2048 columns of the deep input where .*, got 2112"),
]


@pytest.mark.parametrize(("sizes", "hidden", "words"), PAST)
def test_a_model_past_the_limits_is_refused_or_falls_to_the_reference(sizes, hidden, words, monkeypatch, caplog):
    spec = spec_of(**sizes)
    with pytest.raises(InputError, match=f"^{words}$"):
        gpu_step(spec, hidden=hidden)
    monkeypatch.setattr(steps, "_has_cuda_step", lambda device: True)
    cuda = torch.device("cuda")
    assert steps._automatic(WideDeep(spec, hidden=hidden), cuda, LocalComm("cpu")) == "reference"
    (record,) = caplog.records
    assert re.fullmatch(f"{words}: the reference step takes this model", record.message)


def test_a_model_at_the_limits_is_taken(monkeypatch, caplog):
    monkeypatch.setattr(steps, "_has_cuda_step", lambda device: True)
    no_hidden = spec_of(8, 256, numerics=0)
    assert no_hidden.padded_width == limits.WIDEST_HEAD
    for spec, hidden in ((spec_of(256, 256, 16, 256), [4096, 2048]), (EVEN, []), (no_hidden, [])):
        assert steps._automatic(WideDeep(spec, hidden=hidden), torch.device("cuda"), LocalComm("cpu")) == "fused"
    wide = WideDeep(spec_of(dim=300), hidden=[4096], parts="wide")  # its tables have no columns
    assert steps._automatic(wide, torch.device("cuda"), LocalComm("cpu")) == "fused"
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "file", "value"),
    [
        ("kMaxHead", "kernels/head.h", limits.WIDEST_HEAD),
        ("kMaxFeatures", "kernels/embedding.h", limits.MOST_TABLES),
        ("kMaxDim", "kernels/embedding.h", limits.WIDEST_TABLE),
        ("kMaxNumeric", "kernels/embedding.h", limits.MOST_NUMERICS),
        ("kMaxWideNumeric", "kernels/head.h", limits.MOST_NUMERICS),
        ("features.K <", "bindings/embedding_cuda.h", limits.MOST_ID_COLUMNS),
    ],
)
def test_the_limits_are_those_of_the_kernels(name, file, value):
    assert re.findall(rf"{re.escape(name)} ?= (\d+)", (CSRC / file).read_text()) == [str(value)]
