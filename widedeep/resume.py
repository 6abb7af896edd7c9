"""Where a training begins: fresh, or where its last checkpoint left it; and what must be the same to go on."""

import json
import os
from datetime import datetime
from pathlib import Path

import torch
import xxhash

from widedeep import checkpoint
from widedeep.checkpoint import Checkpoints, Progress
from widedeep.config import Location, TrainConfig
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.logs import EVALUATION_FILE, METRICS_FILE
from widedeep.run import Run, tell
from widedeep.shards import ShardSet

WEIGHTS_DEPEND_ON = (
    "num_epochs",
    "linear_learning_rate",
    "linear_l1",
    "linear_l2",
    "deep_learning_rate",
    "deep_warmup_epochs",
    "precision",
    "step",
    "gemm",
    "embedding_parallel",
    "deep_dropout",
    "combiner",
)


def start(config: TrainConfig, comm: LocalComm, checkpoints: Checkpoints) -> tuple[Run, Progress]:
    """A run at its beginning, or where its last checkpoint left it."""
    if comm.rank == 0 and os.access(checkpoints.directory, os.W_OK):
        checkpoints.prepare()  # before a look at what is there: another run may be changing it
    comm.barrier()
    found = checkpoints.find("last")
    if found and not (config.location.use_checkpoint or config.location.overwrite):
        raise InputError(
            f"{found} is there: give --use_checkpoint to continue it, --overwrite to replace it, or another --model_dir"
        )
    if found and config.location.use_checkpoint:
        progress = checkpoint.read_progress(found)
        check_ranks(comm, checkpoints.directory, progress.step, checkpoint.identity(found))
        run = resume(config, comm, found, progress)
        checkpoints.adopt(found)
        return run, progress
    if config.location.use_checkpoint:
        checkpoints.check_not_tensorflow()
    if comm.rank == 0:
        check_results(config.location)
    check_ranks(comm, checkpoints.directory)
    if config.location.use_checkpoint:
        tell(comm, f"{checkpoints.directory}: no checkpoint to continue, starting afresh")
    run = Run.open(config, comm)
    if config.location.initial_checkpoint:
        begin_with(run, checkpoint.locate(config.location.initial_checkpoint))
    training, shards = run.config.training, run.train_shards
    rows = (shards.rows, training.global_batch_size, rows_identity(shards))
    begun = datetime.now().astimezone().isoformat(timespec="milliseconds")
    return run, Progress(run.seed, *rows, comm.world, comm.device.type, run.step.threads, begun)


def is_finished(progress: Progress, config: TrainConfig) -> bool:
    """All epochs done, or patience at its end."""
    patience = config.training.patience
    return progress.epoch >= config.training.num_epochs or (patience is not None and progress.waited >= patience)


def begin_with(run: Run, found: Path) -> None:
    """Gives a new run the weights and the optimizer state of a checkpoint, of whatever rows it was trained with.

    Raises:
        InputError: it is damaged, does not fit the model, or its rows were encoded otherwise; or the processes found
            different ones.
    """
    progress = checkpoint.read_progress(found)  # which checks the files
    check_ranks(run.comm, found.parent, progress.step, checkpoint.identity(found))
    trained = FeatureSpec.load(found / checkpoint.SPEC)
    run.spec.check_statistics(trained, found)
    load_state(run, found, trained)
    tell(run.comm, f"beginning with the weights of {found}")
    if changes := changed_features(trained, run.spec):
        tell(run.comm, f"not as trained: {', '.join(changes)}")


def load_state(run: Run, found: Path, trained: FeatureSpec) -> None:
    """Weights and optimizer state of a checkpoint whose files were checked, and whose feature spec is `trained`.

    Raises:
        InputError: they are those of another model.
    """
    check_layers(run, found)
    dims = dict(zip(trained.names, trained.dims))
    for name, dim in zip(run.spec.names, run.spec.dims):
        if dims.get(name, dim) != dim:
            raise InputError(
                f"{found}: was trained with embedding dim {dims[name]} of {name}, not {dim}: expected the feature spec"
                " or --embedding_sizes_file that it was trained with"
            )
    share = run.model.share
    checkpoint.load_arrays(found, checkpoint.MODEL, run.model.named_arrays(), share)
    if state := checkpoint.read_arrays(found, checkpoint.OPTIMIZER, share):
        run.step.load_state(state)
    else:  # of a model that `save_model` wrote
        run.step.start_from_weights()


def check_layers(run: Run, found: Path) -> None:
    """Raises InputError where a checkpoint has other hidden layers than the model: its arrays would not say which."""
    before, now = (
        TrainConfig.load(found / checkpoint.CONFIG).model.deep_hidden_units,
        run.config.model.deep_hidden_units,
    )
    if before != now:
        widths = [" ".join(map(str, units)) or "(none)" for units in (before, now)]
        raise InputError(f"{found}: was trained with --deep_hidden_units {widths[0]}, not {widths[1]}")


def check_results(where: Location) -> None:
    """Refuses results that a new run would replace unasked, but those of a run that this one continues and that was
    stopped before its first checkpoint.

    Raises:
        InputError: names one of them.
    """
    results = Path(where.results_dir)
    config = results / "config.yaml"
    ours = where.use_checkpoint and config.is_file() and TrainConfig.load(config).location.model_dir == where.model_dir
    for found in (results / EVALUATION_FILE, results / METRICS_FILE):
        if found.is_file() and found.stat().st_size and not (ours or where.overwrite):
            raise InputError(f"{found} is there: give --overwrite to replace these results, or another --results_dir")


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
                f"{' with other contents' * (names[rank] == names[0])}: it must be on a disk that all share"
            )


def resume(config: TrainConfig, comm: LocalComm, found: Path, progress: Progress) -> Run:
    """A run with the weights and the optimizer state of a checkpoint.

    Raises:
        InputError: they do not fit the model, or the rows of an epoch are not those that it was trained with.
    """
    if config.training.seed not in (None, progress.seed):
        raise InputError(f"{found}: was trained with --seed {progress.seed}, not {config.training.seed}")
    run = Run.open(config.updated(seed=progress.seed), comm)
    trained, shards = TrainConfig.load(found / checkpoint.CONFIG), run.train_shards
    for name, before, now in (
        ("rows", progress.rows, shards.rows),
        ("global_batch_size", progress.global_batch_size, config.training.global_batch_size),
        ("steps per epoch (--training_set_size)", trained.training.steps_per_epoch(progress.rows), run.steps_per_epoch),
    ):
        if before != now:
            raise InputError(f"{found}: was trained with {before} {name}, not {now}: it cannot be continued")
    trained_spec = FeatureSpec.load(found / checkpoint.SPEC)
    changes = changed_flags(trained, config) + changed_features(trained_spec, run.spec)
    data = rows_identity(shards)
    if progress.data not in (None, data):
        if progress.position:
            raise InputError(
                f"{found}: was trained with other rows than those of {shards.directory}: inside an epoch it cannot"
                " be continued with these"
            )
        changes.append("rows of the train set")
    if progress.processes not in (None, comm.world):
        changes.append(f"{comm.world} process{'es' * (comm.world > 1)} (was {progress.processes})")
    if progress.device not in (None, comm.device.type):
        changes.append(f"on {comm.device.type} (was {progress.device})")
    threads = run.step.threads
    if progress.threads is not None and threads is not None and progress.threads != threads:
        changes.append(f"{threads} thread{'s' * (threads > 1)} (was {progress.threads})")
    progress.data, progress.processes = data, comm.world
    progress.device, progress.threads = comm.device.type, threads
    load_state(run, found, trained_spec)
    if not is_finished(progress, config):
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


def changed_features(before: FeatureSpec, now: FeatureSpec) -> list[str]:
    """What makes another function of the same weights, as `combiner of tags sum (was mean)`: shapes need no words here,
    for weights of other shapes are not loaded.
    """
    old, new = (
        {"categorical features": ", ".join(spec.names), "numeric features": ", ".join(spec.numeric_names)}
        | {f"max_hotness of {f.name}": f.hotness for f in spec.categorical}
        | {f"combiner of {f.name}": f.combiner for f in spec.categorical if f.hotness > 1}
        for spec in (before, now)
    )
    return [f"{name} {new[name]} (was {old[name]})" for name in new if old.get(name, new[name]) != new[name]]


def rows_identity(shards: ShardSet) -> str:
    """Equal for shard sets with the same rows in the same parts, wherever and by whomever they were written."""
    return xxhash.xxh3_64_hexdigest(json.dumps(shards.manifest["parts"], sort_keys=True).encode())
