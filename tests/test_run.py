"""What each step of a training is given: the rows of the seed's order, its number, and its learning rate."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import main
from planted import planted_data
from thread_comm import in_ranks

from widedeep.checkpoint import Checkpoints, Progress, read_progress
from widedeep.config import TrainConfig
from widedeep.dist import LocalComm
from widedeep.errors import RunError
from widedeep.run import Run, launch, shared_seed
from widedeep.schedule import deep_lr
from widedeep.shards import ShardSet
from widedeep.shuffle import EpochOrder
from widedeep.steps.reference import ReferenceStep
from widedeep.termination import Termination
from widedeep.train import LossWatch, leave, note_score, what_is_left

ROWS, BATCH, EPOCHS = 203, 20, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted_data(tmp_path_factory.mktemp("data") / "set", train=ROWS, test=41)


def steps_of(monkeypatch, data, out, *more):
    """(step, lr, rows) of each call of the step; rows by their prices, which are all different."""
    price = ShardSet.open(data / "train").read(0, ROWS)["price"]
    row_of = {float(p): i for i, p in enumerate(price)}
    assert len(row_of) == ROWS
    steps, real = [], ReferenceStep.train

    def train(self, batch, step, lr):
        steps.append((step, lr, [row_of[float(p)] for p in batch.numeric[:, 1]]))
        return real(self, batch, step, lr)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceStep, "train", train)
        words = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out / "results", *more]
        flags = f"--cpu --threads 1 --step reference --deep_hidden_units 4 --global_batch_size {BATCH}"
        flags += f" --num_epochs {EPOCHS} --deep_warmup_epochs 1 --deep_learning_rate 0.25"
        assert main(["train", *map(str, words), *flags.split()]) == 0
    return steps


def expected(seed, per_epoch):
    """The rates of the schedule, and the rows of each epoch in the order of the seed, a batch after the other."""
    result = []
    for step in range(EPOCHS * per_epoch):
        epoch, position = divmod(step, per_epoch)
        start = position * BATCH
        rows = EpochOrder(ROWS, seed, epoch).rows_at(start, min(start + BATCH, ROWS))
        lr = deep_lr(step, base=0.25, steps_per_epoch=per_epoch, num_epochs=EPOCHS, warmup_epochs=1)
        result.append((step, lr, rows.tolist()))
    return result


@pytest.mark.parametrize("seed", [0, 6])
def test_every_step_has_its_rows_and_its_rate(data, tmp_path, monkeypatch, seed):
    steps = steps_of(monkeypatch, data, tmp_path, "--seed", seed)
    assert steps == expected(seed, 11)
    for epoch in range(EPOCHS):  # the last batch of three rows included
        assert sorted(row for *_, rows in steps[11 * epoch :][:11] for row in rows) == list(range(ROWS))
    assert len({tuple(steps[11 * epoch][2]) for epoch in range(EPOCHS)}) == EPOCHS


def test_a_shorter_epoch_has_the_first_batches_of_the_order(data, tmp_path, monkeypatch):
    steps = steps_of(monkeypatch, data, tmp_path, "--seed", 6, "--training_set_size", 4 * BATCH + 19)
    assert steps == expected(6, 4)


@pytest.mark.parametrize("at", [1, 10, 11, 12, 21])
def test_a_continued_run_makes_the_steps_that_are_left(data, tmp_path, monkeypatch, at):
    """Begun anew from any checkpoint: behind the first step, at an epoch's end, and around it."""
    every = ("--checkpoint_every_steps", 1, "--keep_last", 100)
    steps_of(monkeypatch, data, tmp_path, "--seed", 6, *every)
    checkpoints = Checkpoints(tmp_path / "model")
    progress = read_progress(checkpoints.directory / f"step-{at}")
    assert (progress.step, progress.epoch, progress.position) == (at, *divmod(at, 11))
    assert [path.name for path in checkpoints.steps()] == [f"step-{n}" for n in range(1, 34)]
    (checkpoints.directory / "last").write_text(f"step-{at}\n")
    steps = steps_of(monkeypatch, data, tmp_path, "--use_checkpoint")
    assert steps == expected(6, 11)[at:]
    assert np.isfinite([lr for _, lr, _ in steps]).all()


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_continued_run_of_shorter_epochs_makes_the_steps_that_are_left(data, tmp_path, monkeypatch, at):
    flags = ("--training_set_size", 4 * BATCH, "--checkpoint_every_steps", 1, "--keep_last", 100)
    steps_of(monkeypatch, data, tmp_path, "--seed", 6, *flags)
    (Checkpoints(tmp_path / "model").directory / "last").write_text(f"step-{at}\n")
    assert steps_of(monkeypatch, data, tmp_path, "--use_checkpoint", *flags) == expected(6, 4)[at:]


def test_a_loss_that_was_not_finite_once_is_noticed_later():
    watch = LossWatch(comm := LocalComm(), "fp32", last=7.0)
    assert watch.check(0) == 7
    comm.rank = 1
    assert LossWatch(comm, "fp32", last=7.0).check(0) == 0  # the ranks' add up to what one of them knows
    for loss in (1.0, 2.0, float("nan"), 3.0):
        watch.add(torch.tensor(loss))
        if loss == 2:
            assert watch.check(2) == 2  # the last one, not their sum
    with pytest.raises(RunError, match="the loss is not finite at or before step 4"):
        watch.check(4)


def test_a_first_score_that_is_undefined_is_not_the_best():
    progress = Progress(seed=0, rows=1, global_batch_size=1)
    history = []
    for score in (float("nan"), 0.3, 0.2):
        progress.metrics = {"auc_val": score}
        history.append((note_score(progress), progress.best, progress.waited))
    assert history == [(False, None, 1), (True, 0.3, 0), (False, 0.3, 1)]
    progress.best_step = 2
    progress.metrics = {"streaming_map_val": float("nan")}  # the first of another kind: what was waited for is no more
    assert (note_score(progress), progress.best, progress.best_step, progress.waited) == (False, None, None, 1)


def test_a_run_has_the_threads_that_are_asked_for():
    before = torch.get_num_threads()
    config = TrainConfig().updated(cpu=True, affinity="disabled", threads=before + 1)
    try:
        assert launch(config, lambda *_: torch.get_num_threads()) == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flags", [{}, {"amp": True}, {"precision": "fp32"}])
def test_who_has_chosen_a_precision_is_advised_no_other(flags, monkeypatch):
    monkeypatch.setattr("widedeep.run.faster_than_fp32", lambda device: "take another")
    model = SimpleNamespace(layers=[torch.nn.Linear(300, 300)])
    shown = SimpleNamespace(config=TrainConfig().updated(**flags), model=model, comm=LocalComm(), steps_per_epoch=10**6)
    assert [*Run.advice(shown)] == ([] if flags else ["products are in fp32: take another"])


def test_a_ranking_that_is_not_wanted_is_in_no_record(data, tmp_path, monkeypatch):
    steps_of(monkeypatch, data, tmp_path, "--disable_map_calculation")
    results = tmp_path / "results"
    assert "map" not in (results / "metrics.jsonl").read_text()
    evaluation = json.loads((results / "evaluation.json").read_text())
    assert (evaluation["map"], evaluation["map_all"], evaluation["gauc"], evaluation["groups"]) == (None, None, None, 0)


def test_processes_have_one_seed_and_each_run_has_another():
    seeds = [in_ranks(3, shared_seed) for _ in range(3)]
    assert [len({*of_run}) for of_run in seeds] == [1, 1, 1]
    assert len({of_run[0] for of_run in seeds}) > 1


def test_no_process_leaves_while_a_checkpoint_is_written():
    """torchrun would end the one that writes it."""
    done = []
    comm = SimpleNamespace(barrier=lambda: done.append("together"))
    leave(SimpleNamespace(comm=comm), SimpleNamespace(finish=lambda: done.append("written")))
    assert done == ["written", "together"]


def test_a_signal_is_noted_in_a_training_alone():
    before = signal.getsignal(signal.SIGTERM)
    for asks in (True, False):
        with Termination(LocalComm()) as termination:
            assert not termination.agreed(waits=False)
            for _ in range(2 * asks):
                os.kill(os.getpid(), signal.SIGTERM)
            assert termination.agreed(waits=False) == asks
        assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("newest", "every", "hint"), [("step-5", 0, False), ("step-4", 0, True), (None, 0, True), ("step-4", 2, False)]
)
def test_who_lost_steps_is_told_how_to_lose_fewer(newest, every, hint):
    checkpoints = SimpleNamespace(finish=lambda: None, newest=lambda: newest and Path("model") / newest)
    config = TrainConfig().updated(checkpoint_every_steps=every)
    told = what_is_left(checkpoints, config, Progress(seed=0, rows=1, global_batch_size=1, step=5))
    left = f"--use_checkpoint goes on from model/{newest}" if newest else "it has no checkpoint to go on from"
    assert told == left + "; --checkpoint_every_steps saves inside epochs too" * hint
