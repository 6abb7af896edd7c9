"""Training: one loop over epochs and batches; everything else is called."""

import math
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from widedeep import checkpoint
from widedeep.checkpoint import Checkpoints, Progress
from widedeep.config import TrainConfig
from widedeep.dist import LocalComm
from widedeep.errors import InputError, RunError
from widedeep.evaluate import check_labels, evaluate
from widedeep.journal import Journal, end_log
from widedeep.resume import is_finished, start
from widedeep.run import Run, tell
from widedeep.share import gather_arrays
from widedeep.termination import Terminated, Termination


def train(config: TrainConfig, comm: LocalComm) -> dict[str, Any]:
    """Trains, evaluating and saving after each epoch; returns the metrics of the last evaluation, or without test rows
    the loss of the last batch.

    Continues inside an epoch, with the same bits as if never stopped, when `use_checkpoint` finds a checkpoint; a
    finished run is left alone. SIGTERM ends it after the step, or the evaluation, with a checkpoint.

    Raises:
        InputError: data, checkpoint or directories do not fit, rows have no labels, or another run is writing to
            model_dir.
        RunError: the loss is not finite, or the disk is full.
    """
    with Checkpoints(config.location.model_dir, config.mode.keep_last) as checkpoints:
        run, progress = start(config, comm, checkpoints)
        if is_finished(progress, run.config):
            tell(
                comm,
                f"{config.location.model_dir}: finished already, after {progress.epoch} epochs ({progress.step} steps)",
            )
            if comm.rank == 0:
                end_log(run, progress)
        else:
            if comm.rank == 0:
                checkpoints.prepare()
                check_untouched(config, checkpoints, progress)
            try:
                fit(run, checkpoints, progress)
            except (KeyboardInterrupt, Terminated):
                tell(comm, f"stopped at step {progress.step}: {what_is_left(checkpoints, run.config, progress)}")
                raise
    return progress.metrics


def fit(run: Run, checkpoints: Checkpoints, progress: Progress) -> None:
    """The epochs that are left; `progress` moves with them."""
    reader, test_reader = run.train_reader(), run.test_reader()
    for rows in (reader, test_reader) if test_reader else (reader,):
        check_labels(rows)
    if not test_reader and run.config.training.patience is not None:
        raise InputError(f"--patience waits for a better score: expected test rows in {run.test_shards.directory}")
    for line in (run.describe(), *run.advice(), run.step.note):
        if line:
            tell(run.comm, line)
    mode, watch = run.config.mode, LossWatch(run.comm, run.config.precision, progress.metrics.get("loss", 0.0))
    with Journal(run, progress=progress) as journal, Termination(run.comm) as termination:
        while not is_finished(progress, run.config):
            batches = reader.epoch(progress.epoch, progress.position, into=run.step.places)
            for batch in islice(batches, run.steps_per_epoch - progress.position):
                to_log = (progress.step + 1) % mode.log_every == 0
                logit = run.step.predict(batch) if to_log else None  # the update has not seen this batch yet
                lr = run.learning_rate(progress.step)
                watch.add(run.step.train(batch, progress.step, lr))
                progress.step += 1
                progress.position += 1
                journal.advance(batch.global_rows)
                if logit is not None:
                    journal.batch(watch.check(progress.step), lr, logit, batch)
                ends = termination.agreed(waits=to_log)
                if ends or (mode.checkpoint_every_steps and progress.step % mode.checkpoint_every_steps == 0):
                    loss = watch.check(progress.step)
                    if not test_reader:  # the epoch may have no batch left that says it
                        progress.metrics = {"loss": loss}
                    save(run, checkpoints, progress)
                if ends:
                    end_early(run, checkpoints)
            loss = watch.check(progress.step)
            progress.epoch, progress.position = progress.epoch + 1, 0
            progress.metrics = journal.epoch(evaluate(run, test_reader) if test_reader else None, loss)
            if note_score(progress):
                progress.best_step = progress.step
            save(run, checkpoints, progress)
            if termination.agreed(waits=True) and not is_finished(progress, run.config):  # asked in the evaluation
                end_early(run, checkpoints)
        leave(run, checkpoints)
        journal.finish()


def check_untouched(config: TrainConfig, checkpoints: Checkpoints, progress: Progress) -> None:
    """Raises InputError where another run began and ended here between this one's first look and its lock."""
    found = checkpoints.find("last")
    if found and not progress.step and not config.location.overwrite:
        raise InputError(f"{found}: another run has just written it: expected another --model_dir")


def leave(run: Run, checkpoints: Checkpoints) -> None:
    """Waits for what is being written: where one process leaves, torchrun ends the others."""
    checkpoints.finish()
    run.comm.barrier()


def end_early(run: Run, checkpoints: Checkpoints) -> NoReturn:
    """SIGTERM was noted, and a checkpoint begun."""
    leave(run, checkpoints)
    raise Terminated


def what_is_left(checkpoints: Checkpoints, config: TrainConfig, progress: Progress) -> str:
    """Of a run that is stopped here: its last checkpoint, not one of a run that it was to replace."""
    failed = ""
    try:
        checkpoints.finish()
    except (InputError, RunError) as error:
        failed = f"; the last one failed: {error}"
    found = checkpoints.newest()
    left = f"--use_checkpoint goes on from {found}" if found else "it has no checkpoint to go on from"
    saved = config.mode.checkpoint_every_steps or (found and found.name == f"step-{progress.step}")
    hint = "" if saved else "; --checkpoint_every_steps saves inside epochs too"
    return left + failed + hint


def save(run: Run, checkpoints: Checkpoints, progress: Progress) -> None:
    """Writes a checkpoint from the first process, on a GPU beside the steps to come: the others wait for the copies on
    its host, on a CPU for the files.
    """
    state = (run.model.named_arrays(), run.step.state())
    arrays, optimizer = (gather_arrays(run.comm, run.model.share, part) for part in state)
    if run.comm.rank == 0:
        texts = {checkpoint.SPEC: run.spec.without_sources().to_yaml(), checkpoint.CONFIG: run.config.to_yaml()}
        checkpoints.save(arrays, optimizer, progress, texts, beside=run.comm.device.type == "cuda")
    run.comm.barrier()


def note_score(progress: Progress) -> bool:
    """Keeps the best score and counts the epochs since; whether this epoch's is the best. The score is MAP@12, of all
    clicks where groups have several, or AUC where there are no groups; without an evaluation the latest epoch is best.
    """
    name = next((name for name in ("map_all_val", "streaming_map_val", "auc_val") if name in progress.metrics), None)
    if name is None:
        return True
    if progress.score not in (None, name):  # a run that goes on with the other one: they do not compare
        progress.best, progress.best_step, progress.waited = None, None, 0
    progress.score = name
    score = progress.metrics[name]
    better = math.isfinite(score) and (progress.best is None or score > progress.best)
    progress.best = score if better else progress.best
    progress.waited = 0 if better else progress.waited + 1
    return better


class LossWatch:
    """Notices a loss that is not finite, reading the device only where a line is logged or a checkpoint written."""

    def __init__(self, comm: LocalComm, precision: str, last: float = 0.0):
        """last: the loss of the batch before, of all processes."""
        self._comm, self._precision = comm, precision
        self._sum = torch.zeros((), device=comm.device)
        self._last = torch.full((), last if comm.rank == 0 else 0.0, device=comm.device)

    def add(self, loss: Tensor) -> None:
        """Takes this process's share of a batch's loss."""
        self._sum += loss
        self._last = loss

    def check(self, step: int) -> float:
        """The loss of the last batch.

        Raises:
            RunError: a loss since the start was not finite.
        """
        total, last = self._comm.all_reduce_(torch.stack([self._sum, self._last])).tolist()
        if not math.isfinite(total):
            advice = "a lower learning rate" + " or --precision fp32" * (self._precision != "fp32")
            raise RunError(
                f"the loss is not finite at or before step {step}: {advice} may help;"
                " no checkpoint of this state was written"
            )
        return last
