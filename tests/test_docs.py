"""The programs of docs/your-own-loop.md run as they stand; docs/from-the-original.md is right about flags and keys."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import command_line, main
from planted import planted_data

from widedeep.config import TrainConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "your-own-loop.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
ORIGINAL = (DOCS / "from-the-original.md").read_text(encoding="utf-8")

# Of main.py, of either release.
FLAGS = [
    "train_data_pattern",
    "eval_data_pattern",
    "transformed_metadata_path",
    "dataset_path",
    "fspec_file",
    "embedding_sizes_file",
    "use_checkpoint",
    "model_dir",
    "results_dir",
    "log_filename",
    "training_set_size",
    "global_batch_size",
    "eval_batch_size",
    "num_epochs",
    "cpu",
    "amp",
    "xla",
    "linear_learning_rate",
    "deep_learning_rate",
    "deep_warmup_epochs",
    "deep_hidden_units",
    "deep_dropout",
    "combiner",
    "num_auc_thresholds",
    "disable_map_calculation",
    "evaluate",
    "benchmark",
    "benchmark_warmup_steps",
    "benchmark_steps",
    "affinity",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    planted_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("program", [PROGRAMS[0], PROGRAMS[-1]], ids=["own", "step"])
def test_the_loop_trains(program, here, capsys):
    torch.manual_seed(0)
    exec(program, {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_the_model_of_a_run_scores_rows(here):
    places = "--dataset_path data --model_dir model --results_dir results"
    flags = f"{places} --cpu --global_batch_size 64 --num_epochs 1 --deep_warmup_epochs 1 --deep_hidden_units 8"
    assert main(["train", *flags.split()]) == 0
    names = {}
    exec(PROGRAMS[1], names)
    assert names["probabilities"].shape == (401,)
    assert ((names["probabilities"] > 0) & (names["probabilities"] < 1)).all()


def test_every_flag_of_the_original_is_taken_or_answered():
    taken = TrainConfig().flat()
    refused = {flag.removeprefix("--") for flag in command_line().GONE["train"]}
    assert set(FLAGS) - set(taken) == refused
    section = ORIGINAL.partition("## Flags")[2].partition("## Numbers")[0]
    named = re.findall(r"`--(\w+)`", "".join(line.split("|")[1] for line in section.splitlines() if "|" in line))
    assert refused <= set(named) <= {*FLAGS, "workers"}


def test_the_log_has_the_keys_of_the_page(here):
    flags = "--dataset_path data --model_dir m --results_dir r --cpu --global_batch_size 64 --eval_batch_size 64"
    flags += " --num_epochs 1 --deep_warmup_epochs 1 --deep_hidden_units 8 --log_every 2 --benchmark_warmup_steps 1"
    runs = ("", "--use_checkpoint --evaluate", "--benchmark --benchmark_steps 3")
    for more in (*runs, "--benchmark --evaluate --benchmark_steps 3"):
        assert main(["train", *flags.split(), *more.split()]) == 0
    records = [json.loads(line) for line in Path("r/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    section = ORIGINAL.partition("## Log")[2]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[-2] for line in section.splitlines() if "|" in line)))
    assert {key for record in records for key in record} - {"step", "seconds"} == named - {"auc_roc"}
