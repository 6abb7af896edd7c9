"""Flags and their combinations: names and defaults are the original's, nonsense is refused by name."""

from typing import get_args

import pytest

from widedeep.config import Precision, TrainConfig
from widedeep.errors import InputError
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


def test_unknown_key_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("num_epocs: 3\n")
    with pytest.raises(InputError, match=r"config.yaml: unknown key 'num_epocs'"):
        TrainConfig.load(path)


def test_every_precision_of_the_command_line_has_a_type():
    assert set(get_args(Precision)) == set(PRECISIONS)
