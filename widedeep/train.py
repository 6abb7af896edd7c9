"""Training: one loop over epochs and batches; everything else is called."""

import json
import math
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from torch import Tensor

from widedeep import checkpoint
from widedeep.checkpoint import Checkpoints, Progress
from widedeep.config import TrainConfig
from widedeep.dist import LocalComm
from widedeep.errors import InputError, RunError
from widedeep.evaluate import evaluate
from widedeep.journal import Journal
from widedeep.run import Run, tell
from widedeep.shards import ShardSet

WEIGHTS_DEPEND_ON = (
    "num_epochs",
    "linear_learning_rate",
    "deep_learning_rate",
    "deep_warmup_epochs",
    "precision",
    "step",
    "deep_dropout",
    "combiner",
)


def train(config: TrainConfig, comm: LocalComm) -> dict[str, Any]:
    """Trains, evaluating and saving after each epoch; returns the metrics of the last evaluation.

    Continues inside an epoch, with the same bits as if never stopped, when `use_checkpoint` finds a checkpoint; a
    finished run is left alone.

    Raises:
        InputError: data, checkpoint or directories do not fit, or another run is writing to model_dir.
        RunError: the loss is not finite, or the disk is full.
    """
    with Checkpoints(config.location.model_dir, config.mode.keep_last) as checkpoints:
        run, progress = start(config, comm, checkpoints)
        if is_finished(progress, run.config):
            tell(
                comm,
                f"{config.location.model_dir}: finished already, after {progress.epoch} epochs ({progress.step} steps)",
            )
        else:
            if comm.rank == 0:
                checkpoints.prepare()
            fit(run, checkpoints, progress)
    return progress.metrics


def fit(run: Run, checkpoints: Checkpoints, progress: Progress) -> None:
    """The epochs that are left; `progress` moves with them."""
    reader, test_reader = run.train_reader(), run.ordered_reader("test")
    tell(run.comm, run.describe())
    if run.step.note:
        tell(run.comm, run.step.note)
    mode, watch = run.config.mode, LossWatch(run.comm)
    with Journal(run, progress=progress) as journal:
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
                if to_log:
                    journal.batch(watch.check(progress.step), lr, logit, batch)
                if mode.checkpoint_every_steps and progress.step % mode.checkpoint_every_steps == 0:
                    watch.check(progress.step)
                    save(run, checkpoints, progress, best=False)
            watch.check(progress.step)
            progress.epoch, progress.position = progress.epoch + 1, 0
            progress.metrics = journal.epoch(evaluate(run, test_reader))
            save(run, checkpoints, progress, note_score(progress))
        journal.finish()


def start(config: TrainConfig, comm: LocalComm, checkpoints: Checkpoints) -> tuple[Run, Progress]:
    """A run at its beginning, or where its last checkpoint left it."""
    if comm.rank == 0 and os.access(checkpoints.directory, os.W_OK):
        checkpoints.prepare()  # before a look at what is there: another run may be changing it
    comm.barrier()
    found = checkpoints.find("last")
    if found and not (config.location.use_checkpoint or config.location.overwrite):
        raise InputError(
            f"{found} is there: give --use_checkpoint to continue it, --overwrite to replace it, or"
            " another --model_dir."
        )
    if found and config.location.use_checkpoint:
        progress = checkpoint.read_progress(found)
        check_ranks(comm, checkpoints.directory, progress.step, checkpoint.identity(found))
        run = resume(config, comm, found, progress)
        checkpoints.adopt()
        return run, progress
    check_ranks(comm, checkpoints.directory)
    if config.location.use_checkpoint:
        tell(comm, f"{checkpoints.directory}: no checkpoint to continue, starting afresh")
    run = Run.open(config, comm)
    training, shards = run.config.training, run.train_shards
    return run, Progress(training.seed, shards.rows, training.global_batch_size, rows_identity(shards))


def check_ranks(comm: LocalComm, directory: Path, step: int = 0, identity: int = 0) -> None:
    """Keeps processes apart that would begin with different weights.

    step, identity: of the checkpoint in `directory` that this process continues; 0 for none.

    Raises:
        InputError: the processes found different ones.
    """
    own = [step, identity]
    all_found = comm.all_gather_rows(torch.tensor([own], device=comm.device)).tolist()
    names = [f"step-{step}" if identity else "no checkpoint" for step, identity in all_found]
    for rank, theirs in enumerate(all_found):
        if theirs != all_found[0]:
            raise InputError(
                f"process {rank} found {names[rank]} in {directory}, process 0 {names[0]}"
                f"{' with other contents' * (names[rank] == names[0])}: model_dir must be on a disk that all share."
            )


def resume(config: TrainConfig, comm: LocalComm, found: Path, progress: Progress) -> Run:
    """A run with the weights and the optimizer state of a checkpoint.

    Raises:
        InputError: they do not fit the model, or the rows of an epoch are not those that it was trained with.
    """
    if config.training.seed not in (None, progress.seed):
        raise InputError(f"{found}: was trained with --seed {progress.seed}, not {config.training.seed}.")
    run = Run.open(config.updated(seed=progress.seed), comm)
    trained, shards = TrainConfig.load(found / checkpoint.CONFIG), run.train_shards
    for name, before, now in (
        ("rows", progress.rows, shards.rows),
        ("global_batch_size", progress.global_batch_size, config.training.global_batch_size),
        ("steps an epoch (--training_set_size)", trained.training.steps_per_epoch(progress.rows), run.steps_per_epoch),
    ):
        if before != now:
            raise InputError(f"{found}: was trained with {before} {name}, not {now}: it cannot be continued.")
    changes = changed_flags(trained, config)
    data = rows_identity(shards)
    if progress.data not in (None, data):
        if progress.position:
            raise InputError(
                f"{found}: was trained with other rows than those of {shards.directory}: inside an epoch it cannot"
                " be continued with these."
            )
        changes.append("rows of the train set")
    progress.data = data
    checkpoint.load_arrays(found, checkpoint.MODEL, run.model.named_arrays())
    run.step.load_state(checkpoint.read_arrays(found, checkpoint.OPTIMIZER))
    tell(comm, f"continuing {found}: epoch {progress.epoch + 1}, batch {progress.position + 1}")
    if changes:
        tell(comm, f"not as before: {', '.join(changes)}")
    return run


def changed_flags(before: TrainConfig, now: TrainConfig) -> list[str]:
    """Of the flags that the weights depend on from here on, those that differ, as `--deep_dropout 0.5 (was 0.1)`."""
    old, new = (
        {name: "not given" if value is None else value for name, value in config.flat().items()}
        | {"precision": config.precision}
        for config in (before, now)
    )
    return [f"--{name} {new[name]} (was {old[name]})" for name in WEIGHTS_DEPEND_ON if old[name] != new[name]]


def rows_identity(shards: ShardSet) -> str:
    """Equal for shard sets with the same rows in the same parts, wherever and by whomever they were written."""
    return xxhash.xxh3_64_hexdigest(json.dumps(shards.manifest["parts"], sort_keys=True).encode())


def is_finished(progress: Progress, config: TrainConfig) -> bool:
    """All epochs done, or patience at its end."""
    patience = config.training.patience
    return progress.epoch >= config.training.num_epochs or (patience is not None and progress.waited >= patience)


def save(run: Run, checkpoints: Checkpoints, progress: Progress, best: bool) -> None:
    """Writes a checkpoint from the first process; the others wait, so that none runs ahead of a failed write."""
    if run.comm.rank == 0:
        spec = run.spec.to_dict() | {"source_spec": {}}
        texts = {
            checkpoint.SPEC: yaml.safe_dump(spec, sort_keys=False, allow_unicode=True),
            checkpoint.CONFIG: run.config.to_yaml(),
        }
        checkpoints.save(run.model.named_arrays(), run.step.state(), progress, texts, best)
    run.comm.barrier()


def note_score(progress: Progress) -> bool:
    """Keeps the best MAP@12 (AUC without groups) and counts the epochs since; whether this epoch's is the best."""
    score = progress.metrics.get("streaming_map_val", progress.metrics["auc_val"])
    better = math.isfinite(score) and (progress.best is None or score > progress.best)
    progress.best = score if better else progress.best
    progress.waited = 0 if better else progress.waited + 1
    return better


class LossWatch:
    """Notices a loss that is not finite, reading the device only where a line is logged or a checkpoint written."""

    def __init__(self, comm: LocalComm):
        self._comm = comm
        self._sum = torch.zeros((), device=comm.device)
        self._last = torch.zeros((), device=comm.device)

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
            raise RunError(
                f"the loss is not finite at step {step}: a lower learning rate or --precision fp32 may help;"
                " no checkpoint of this state was written."
            )
        return last
