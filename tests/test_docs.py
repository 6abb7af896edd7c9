"""The programs of docs/your-own-loop.md run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from commands import main
from planted import planted_data

PAGE = Path(__file__).resolve().parents[1] / "docs" / "your-own-loop.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    planted_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)


def test_the_loop_trains(here, capsys):
    torch.manual_seed(0)
    exec(PROGRAMS[0], {})
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
