"""Flags and their combinations: names and defaults are the original's, nonsense is refused by name."""

from dataclasses import fields, replace
from typing import get_args

import pytest

from widedeep.config import Location, Precision, RunMode, TrainConfig
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.resume import changed_features, changed_flags
from widedeep.steps.base import PRECISIONS

ORIGINAL = {
    "fspec_file": "feature_spec.yaml",
    "log_filename": "log.json",
    "global_batch_size": 131072,
    "eval_batch_size": 131072,
    "num_epochs": 20,
    "linear_learning_rate": 0.02,
    "deep_learning_rate": 0.00012,
    "deep_warmup_epochs": 6,
    "deep_hidden_units": [1024] * 5,
    "deep_dropout": 0.1,
    "benchmark_warmup_steps": 500,
    "benchmark_steps": 1000,
    "use_checkpoint": False,
    "amp": False,
    "evaluate": False,
}


def test_defaults_are_the_originals():
    flat = TrainConfig().flat()
    assert {name: flat[name] for name in ORIGINAL} == ORIGINAL


def test_yaml_round_trip(tmp_path):
    config = TrainConfig().updated(
        num_epochs=3, deep_hidden_units=[8, 4], seed=7, precision="bf16", deep_warmup_epochs=0.5
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.load(path) == config


def test_amp_is_fp16():
    assert TrainConfig().precision == "fp32"
    assert TrainConfig().updated(amp=True).precision == "fp16"
    TrainConfig().updated(amp=True, precision="fp16").check("cuda")


@pytest.mark.parametrize(
    ("values", "device", "words"),
    [
        ({"amp": True}, "cpu", "--amp needs a GPU"),
        ({"precision": "tf32"}, "cpu", "--precision tf32 needs a GPU"),
        ({"amp": True, "precision": "bf16"}, "cuda", "--amp means --precision fp16"),
        ({"benchmark": True, "benchmark_warmup_steps": 9, "benchmark_steps": 9}, "cpu", "must exceed"),
        ({"num_epochs": 2}, "cpu", r"--deep_warmup_epochs \(6\) must not exceed --num_epochs \(2\)"),
        ({"global_batch_size": 0}, "cpu", "--global_batch_size must be at least 1"),
        ({"deep_dropout": 1.0}, "cpu", "--deep_dropout must be in"),
        ({"deep_dropout": float("nan")}, "cpu", "--deep_dropout: expected a number, got nan"),
        ({"deep_learning_rate": float("inf")}, "cpu", "--deep_learning_rate: expected a number, got inf"),
        ({"deep_learning_rate": -1.0}, "cpu", "--deep_learning_rate must be at least 0"),
        ({"linear_learning_rate": 0.0}, "cpu", "--linear_learning_rate must be above 0"),
        ({"deep_hidden_units": [8, 0]}, "cpu", "--deep_hidden_units must be at least 1"),
        ({"seed": 2**63}, "cpu", "--seed must be at most 9223372036854775807, got 9223372036854775808"),
        ({"threads": 100_000}, "cpu", "--threads must be at most 1024, got 100000"),
        (
            {"num_auc_thresholds": 99_999_999_999},
            "cpu",
            "--num_auc_thresholds must be at most 1000000",
        ),
        ({"use_checkpoint": True, "overwrite": True}, "cpu", "give one of the two"),
        ({"log_filename": "args.json"}, "cpu", "--log_filename: expected a name other than .*, got 'args.json'"),
        ({"log_filename": "sub/../metrics.jsonl"}, "cpu", "--log_filename: expected a name other than args.json,"),
        ({"results_dir": "r", "log_filename": ""}, "cpu", "--log_filename: expected a name other than .*, got ''"),
        ({"step": "reference", "embedding_parallel": "sharded"}, "cpu", "sharded needs the fused step"),
    ],
)
def test_nonsense_is_refused(values, device, words):
    with pytest.raises(InputError, match=words):
        TrainConfig().updated(**values).check(device)


def test_long_warm_up_is_fine_when_only_evaluating():
    TrainConfig().updated(num_epochs=2, evaluate=True).check("cpu")


ON_THE_EDGE = {
    "training_set_size": 1,
    "global_batch_size": 1,
    "eval_batch_size": 1,
    "num_epochs": 1,
    "linear_l1": 0.0,
    "linear_l2": 0.0,
    "deep_learning_rate": 0.0,
    "deep_warmup_epochs": 0.0,
    "patience": 1,
    "num_auc_thresholds": 2,
    "benchmark_warmup_steps": 0,
    "log_every": 1,
    "checkpoint_every_steps": 1,
    "keep_last": 1,
    "threads": 1,
    "seed": 0,
}


@pytest.mark.parametrize(("name", "least"), ON_THE_EDGE.items())
def test_the_least_of_each_number_is_taken_and_less_is_refused(name, least):
    base = TrainConfig().updated(deep_warmup_epochs=0.0)
    base.updated(**{name: least}).check("cpu")
    with pytest.raises(InputError, match=f"^--{name} must be at least {least:g}, got "):
        base.updated(**{name: least - 1}).check("cpu")


def test_the_largest_numbers_are_taken():
    largest = {"seed": 2**63 - 1, "threads": 1024, "num_auc_thresholds": 1_000_000, "deep_dropout": 0.999}
    TrainConfig().updated(num_epochs=6, deep_warmup_epochs=6.0, **largest).check("cpu")
    benchmark = {"benchmark": True, "benchmark_steps": 2, "benchmark_warmup_steps": 1}
    TrainConfig().updated(deep_hidden_units=[1], linear_learning_rate=1e-9, **benchmark).check("cpu")


@pytest.mark.parametrize(("rows", "steps", "whole"), [(1, 1, 1), (9, 1, 1), (10, 2, 1), (17, 2, 1), (18, 2, 2)])
def test_an_epoch_ends_with_what_is_left_and_a_shorter_one_with_a_whole_batch(rows, steps, whole):
    config = TrainConfig().updated(global_batch_size=9)
    assert config.training.steps_per_epoch(rows) == steps
    assert config.updated(training_set_size=rows).training.steps_per_epoch(1000) == whole


# On what the weights do not depend, or what keeps a run from being continued when it differs.
FREE = {f.name for kind in (Location, RunMode) for f in fields(kind)}
FREE |= {"training_set_size", "global_batch_size", "eval_batch_size", "seed", "deep_hidden_units"}
FREE |= {"patience", "cpu", "xla", "wide_init"}
OTHER = {
    "num_epochs": 7,
    "amp": True,
    "linear_learning_rate": 0.5,
    "linear_l1": 0.5,
    "linear_l2": 0.5,
    "deep_learning_rate": 0.5,
    "deep_warmup_epochs": 0.5,
    "precision": "bf16",
    "step": "fused",
    "gemm": "sm90",
    "embedding_parallel": "sharded",
    "deep_dropout": 0.5,
    "combiner": "mean",
}


def test_every_flag_that_the_weights_depend_on_is_named_where_it_differs():
    before = TrainConfig()
    assert {*before.flat()} == {*FREE, *OTHER}
    for name, value in OTHER.items():
        was = {"precision": "fp32", "combiner": "not given"}.get(name, before.flat()[name])
        told = f"--{name} {value} (was {was})" if name != "amp" else "--precision fp16 (was fp32)"
        assert changed_flags(before, before.updated(**{name: value})) == [told]
    assert changed_flags(before, before.updated(precision="fp32", log_every=7, reader_mode="stream")) == []
    several = changed_flags(before, before.updated(**{name: OTHER[name] for name in ("gemm", "linear_l2")}))
    assert several == ["--linear_l2 0.5 (was 0.0)", "--gemm sm90 (was auto)"]


def test_every_change_of_the_features_that_fits_the_weights_is_named():
    ad, tags = CategoricalFeature("ad", 9, 4), CategoricalFeature("tags", 9, 4, hotness=3)
    before = FeatureSpec((ad, tags), (NumericFeature("x"), NumericFeature("y")), "clicked")

    def changes(categorical, numeric=before.numeric):
        return changed_features(before, replace(before, categorical=categorical, numeric=numeric))

    assert changes((ad, tags)) == []
    assert changes((ad, replace(tags, hotness=2))) == ["max_hotness of tags 2 (was 3)"]
    assert changes((ad, replace(tags, combiner="mean"))) == ["combiner of tags mean (was sum)"]
    assert changes((tags, ad)[::-1], before.numeric[::-1]) == ["numeric features y, x (was x, y)"]
    assert changes((replace(ad, combiner="mean"), tags)) == []  # of one id
    named = (CategoricalFeature("tags", 9, 4), replace(tags, name="ad"))
    assert "categorical features tags, ad (was ad, tags)" in changes(named)


def test_unknown_key_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("num_epocs: 3\n")
    with pytest.raises(InputError, match=r"config.yaml: unknown key 'num_epocs'"):
        TrainConfig.load(path)


def test_every_precision_of_the_command_line_has_a_type():
    assert set(get_args(Precision)) == set(PRECISIONS)
