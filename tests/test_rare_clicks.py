"""Where clicks are rare: shares with the digits that count, and an AUC by thresholds that says little."""

import numpy as np
import pytest
import torch
from commands import main
from planted import planted_data
from sklearn.metrics import roc_auc_score

from widedeep.commands.preprocessing import show_splits
from widedeep.html_page import percent
from widedeep.journal import coarse_auc
from widedeep.metrics import Evaluation


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, None),
        (0, "0.00 %"),
        (1, "100.00 %"),
        (0.20876, "20.88 %"),
        (0.01, "1.00 %"),
        (0.0021743, "0.217 %"),
        (5.5e-5, "0.0055 %"),
        (2e-5, "0.002 %"),
    ],
)
def test_shares_have_the_digits_that_count(share, text):
    assert percent(share) == text


def test_preprocessing_says_how_rare_they_are(capsys):
    split = {"rows": 400_000, "positive_rate": 22 / 400_000}
    show_splits("out", {"train": split, "test": {"rows": 0, "positive_rate": None}})
    assert capsys.readouterr().out == "out/train: 400000 rows, 0.0055 % positive\nout/test: 0 rows, no rows\n"


@pytest.mark.parametrize(("thresholds", "told"), [(200, True), (8000, False)])
def test_an_auc_by_too_few_thresholds_is_told(thresholds, told):
    g = np.random.default_rng()
    label = np.arange(20_000) % 500 == 0
    logit = g.normal(-7 + 2.0 * label, 0.5).astype(np.float32)
    evaluation = Evaluation(thresholds=(thresholds, 9), groups=False)
    evaluation.update(torch.from_numpy(logit), torch.from_numpy(label.astype(np.float32)))
    line = coarse_auc(evaluation.compute(), thresholds)
    assert (line is not None) == told
    if told:
        assert f"the exact AUC {roc_auc_score(label, logit):.4f}: --num_auc_thresholds 8000 makes it finer" in line


def test_an_undefined_auc_is_not_told():
    evaluation = Evaluation(thresholds=(200, 9), groups=False)
    evaluation.update(torch.randn(50), torch.zeros(50))
    assert coarse_auc(evaluation.compute(), 200) is None


def test_a_run_tells_it_once(tmp_path, capsys):
    places = ["--dataset_path", planted_data(tmp_path / "set"), "--model_dir", tmp_path / "m", "--results_dir"]
    flags = ["train", *places, tmp_path / "r", "--num_epochs", 2, "--global_batch_size", 64, "--deep_warmup_epochs", 0]
    sizes = ["--deep_hidden_units", 8, "--cpu", "--threads", 1, "--seed", 1]
    assert main([*map(str, [*flags, *sizes]), "--num_auc_thresholds", "3"]) == 0
    assert capsys.readouterr().out.count("auc_val, by 3 thresholds, is 0.") == 1
    assert main([*map(str, [*flags, *sizes]), "--num_auc_thresholds", "8000", "--overwrite"]) == 0
    assert "auc_val, by" not in capsys.readouterr().out
