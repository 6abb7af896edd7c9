"""A training killed inside an epoch, when continued, ends with the same bits as one that was never stopped."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import main
from planted import planted_data
from safetensors.torch import load_file

from widedeep.checkpoint import Checkpoints, read_progress

FLAGS = shlex.split(
    "--cpu --global_batch_size 32 --eval_batch_size 128 --num_epochs 3 --deep_warmup_epochs 1"
    " --seed 5 --deep_dropout 0.2 --deep_hidden_units 16 8 --deep_learning_rate 0.01 --checkpoint_every_steps 7"
    " --log_every 10 --threads 1"
)


def words(data: Path, out: Path, step: str, *more: str) -> list[str]:
    places = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out / "results"]
    return ["train", *map(str, places), *FLAGS, "--step", step, *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted_data(tmp_path_factory.mktemp("data") / "set")


def final_arrays(out: Path) -> dict:
    path = Checkpoints(out / "model").find("last")
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def kill_inside_second_epoch(data: Path, out: Path, step: str) -> None:
    """Starts training as a process of its own and kills it when a checkpoint lies inside the second epoch."""
    # Slowed down, so that the kill comes inside the epoch; the arithmetic is untouched.
    script = (
        "import sys, time, widedeep.train as t; real = t.LossWatch.add\n"
        "def add(self, loss): time.sleep(0.02); real(self, loss)\n"
        "t.LossWatch.add = add\n"
        "from widedeep import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words(data, out, step)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and process.poll() is None:
            steps = [int(path.name[5:]) for path in Checkpoints(out / "model").steps()]
            if steps and max(steps) > 36:  # an epoch has 32 steps: 42 is the first mid-epoch checkpoint of the second
                break
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("step", ["reference", "fused"])
def test_killed_run_continues_with_the_same_bits(data, tmp_path, step):
    assert main(words(data, tmp_path / "whole", step)) == 0
    killed = tmp_path / "killed"
    kill_inside_second_epoch(data, killed, step)
    left = read_progress(Checkpoints(killed / "model").find("last"))
    assert left.epoch == 1
    assert 0 < left.position < 32
    assert main(words(data, killed, step, "--use_checkpoint")) == 0
    want, got = final_arrays(tmp_path / "whole"), final_arrays(killed)
    assert want.keys() == got.keys()
    for name, array in want.items():
        assert array.equal(got[name]), name
    whole, continued = (
        json.loads((out / "results" / "evaluation.json").read_text()) for out in (tmp_path / "whole", killed)
    )
    assert whole == continued


def test_finished_run_is_left_alone(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference")) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    log = (tmp_path / "results" / "log.json").read_bytes()
    assert main(words(data, tmp_path, "reference", "--use_checkpoint")) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    assert (tmp_path / "results" / "log.json").read_bytes() == log


def test_more_epochs_continue_a_finished_run(data, tmp_path):
    assert main(words(data, tmp_path, "reference")) == 0
    assert main(words(data, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "4")) == 0
    assert read_progress(Checkpoints(tmp_path / "model").find("last")).epoch == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "6"], "was trained with --seed 5, not 6"),
        (["--global_batch_size", "64"], "was trained with 32 global_batch_size, not 64"),
        (["--deep_hidden_units", "16", "4"], "made for another model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(data, tmp_path, capsys, change, said):
    assert main(words(data, tmp_path, "reference")) == 0
    capsys.readouterr()
    assert main(words(data, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "4", *change)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.splitlines()[-1].startswith("widedeep: ")


def test_checkpoints_are_not_overwritten_unasked(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference")) == 0
    capsys.readouterr()
    assert main(words(data, tmp_path, "reference")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(words(data, tmp_path, "reference", "--overwrite", "--num_epochs", "1")) == 0
    assert [path.name for path in Checkpoints(tmp_path / "model").steps()] == ["step-28", "step-32"]


def test_missing_checkpoint_warns_in_training_and_stops_evaluation(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference", "--evaluate", "--use_checkpoint")) == 2
    assert "expected a checkpoint to evaluate" in capsys.readouterr().err
    assert main(words(data, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "1")) == 0
    assert "no checkpoint to continue" in capsys.readouterr().out
