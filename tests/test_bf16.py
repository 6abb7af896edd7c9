"""bf16 on a CPU: who multiplies, where that is said, and that a run learns what it learns in fp32."""

import logging

import numpy as np
import pytest
import torch
from commands import main
from planted import CATEGORICAL, NUMERIC, TAGS, planted_data, planted_rows

from widedeep import _load, doctor, ops
from widedeep.data import Batch
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.step import StepConfig, make_step

SPEC = FeatureSpec((*CATEGORICAL, TAGS), NUMERIC, "clicked")
ROWS = 256


def new_step(kind="fused", precision="bf16"):
    return make_step(kind, WideDeep(SPEC, [64, 33], seed=3), StepConfig(precision))


def batch_of(seed):
    data = planted_rows(ROWS, 4, seed)
    ids = np.column_stack([data[f.name] for f in SPEC.categorical]).astype(np.int32)
    numeric = np.column_stack([data[f.name] for f in SPEC.numeric])
    columns = (torch.from_numpy(c) for c in (ids, numeric, data["clicked"].astype(np.float32)))
    return Batch(*columns, None, 0, ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nan_stays_one_whatever_its_bits(dtype):
    """Rounded as a number, one whose bits are all set would become 0."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7F80FFFF], np.uint32)
    numeric, none = torch.from_numpy(bits.view(np.float32))[:, None], torch.zeros(0)
    ids = torch.zeros(len(bits), 0, dtype=torch.int32)
    x, _ = ops.embedding_forward(ids, numeric, [], none, torch.ones(1), torch.zeros(1), [], [], [], [0], 8, dtype)
    assert x[:, 0].isnan().all()


@pytest.mark.parametrize(("choice", "who"), [("own", "our own products"), ("library", "oneDNN's products")])
def test_the_choice_is_logged_once_and_named_by_the_doctor(choice, who, monkeypatch, caplog):
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", choice)
    caplog.set_level(logging.INFO)
    new_step(precision="fp32")
    assert not caplog.records
    step = new_step()
    step.train(batch_of(0), 0, 1e-3)
    (record,) = caplog.records
    assert record.getMessage() == step.note == f"bf16: {_load.bf16_products()}"
    assert step.note.startswith(f"bf16: {who} ")
    assert doctor.diagnose()["bf16"] == _load.bf16_products()


def test_training_says_once_who_multiplies(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "own")
    data = planted_data(tmp_path / "data")
    where = [f"--{flag}={tmp_path / flag}" for flag in ("results_dir", "model_dir")]
    sizes = ["--num_epochs=1", "--deep_warmup_epochs=0.5", "--global_batch_size=300", "--deep_hidden_units", "8"]
    assert main(["train", f"--dataset_path={data}", *where, *sizes, "--cpu", "--precision=bf16"]) == 0
    assert capsys.readouterr().out.count("bf16: our own products in float32 (this CPU has ") == 1


def test_left_alone_the_choice_follows_the_processor(monkeypatch):
    for value in ("", "auto"):
        monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", value)
        assert _load.bf16_products().startswith("oneDNN") == _load.cpu_multiplies_bf16()


def test_an_unknown_choice_is_bad_input(monkeypatch):
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "mkl")
    with pytest.raises(InputError, match="WIDEDEEP_BF16_PRODUCTS: expected auto, own or library, got mkl"):
        new_step()


@pytest.mark.parametrize("has", [False, True])
def test_only_the_reference_step_is_slow_without_instructions(has, monkeypatch, caplog):
    monkeypatch.setattr(_load, "cpu_multiplies_bf16", lambda: has)
    new_step("reference")
    new_step("fused")
    new_step("reference", "fp32")
    assert [record.getMessage()[:21] for record in caplog.records] == ["this CPU has no bf16 "] * (not has)


@pytest.mark.parametrize("choice", ["own", "library"])
def test_bf16_learns_what_fp32_learns(choice, monkeypatch):
    """The same batches and masks: curves that differ by rounding alone, far less than what is learnt."""
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", choice)
    steps = {precision: new_step(precision=precision) for precision in ("fp32", "bf16")}
    losses = {precision: [] for precision in steps}
    for i in range(80):
        batch = batch_of(i)
        for precision, step in steps.items():
            losses[precision].append(float(step.train(batch, i, 1e-3)))
    fp32, bf16 = (torch.tensor(losses[precision]) for precision in steps)
    learnt = fp32[:10].mean() - fp32[-20:].mean()
    assert learnt > 0.1
    assert not torch.equal(fp32, bf16)
    assert (bf16 - fp32).abs().max() < 0.02 * learnt
    assert (bf16 - fp32).mean().abs() < 0.005 * learnt
    held_out = batch_of(1000)
    torch.testing.assert_close(steps["bf16"].predict(held_out), steps["fp32"].predict(held_out), rtol=0, atol=0.05)
