"""Scores of a model on a data set: logits in the order of the data, and the metrics of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from widedeep import checkpoint
from widedeep.checkpoint import Checkpoints
from widedeep.config import Scoring, TrainConfig
from widedeep.data import Reader
from widedeep.dist import LocalComm, choose_device
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.journal import Journal
from widedeep.metrics import Evaluation
from widedeep.outputs import metric_text, metrics_note, plain, write_json
from widedeep.resume import changed_features, check_layers
from widedeep.run import Run, tell
from widedeep.shard_manifest import is_labelled, name_of


def evaluate(run: Run, reader: Reader, watch: Callable[[int, Evaluation], None] | None = None) -> Evaluation:
    """Applies the model to all rows of `reader`; then every process holds all, in the order of the data.

    Args:
        watch: called after each batch with its number (from 1) and what this process has seen.
    """
    mode = run.config.mode
    groups = name_of("group", reader.shards.columns) is not None and not mode.disable_map_calculation
    evaluation = Evaluation(thresholds=(mode.num_auc_thresholds, 8000), groups=groups)
    for index, batch in enumerate(reader.epoch(0)):
        logit = run.step.predict(batch)
        evaluation.update(logit, batch.label, batch.group, index * reader.global_batch + batch.first_row)
        if watch:
            watch(index + 1, evaluation)
    evaluation.gather(run.comm)
    return evaluation


def check_labels(reader: Reader) -> None:
    """Raises InputError for rows that were preprocessed without labels, of which only predictions can be made."""
    if not is_labelled(reader.shards.manifest):
        raise InputError(
            f"{reader.shards.directory}: expected rows with labels, and these have none: `widedeep predict` takes them"
        )


def scored(run: Run, reader: Reader) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Logit [G] float32, label [G] float32, group [G] int64 or None of each global batch, in order, everywhere."""
    gather = run.comm.all_gather_rows
    for batch in reader.epoch(0):
        logit = gather(run.step.predict(batch))
        yield logit, gather(batch.label), None if batch.group is None else gather(batch.group)


def load(run: Run, directory: Path) -> None:
    """Puts the weights of a checkpoint whose files were checked into the model.

    Raises:
        InputError: they are those of another model.
    """
    checkpoint.load_arrays(directory, checkpoint.MODEL, run.model.named_arrays(), run.model.share)


def scoring_config(scoring: Scoring) -> tuple[TrainConfig, Path]:
    """The config that a checkpoint was trained with, changed to what is to be scored now, and its directory.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    directory = checkpoint.locate(scoring.model, scoring.checkpoint)
    checkpoint.read_progress(directory)  # which checks the files
    config = TrainConfig.load(directory / checkpoint.CONFIG)
    precision = scoring.precision or config.precision
    if scoring.precision is None and precision in ("fp16", "tf32") and choose_device(scoring.cpu).type == "cpu":
        precision = "fp32"
    taken = ("dataset_path", "fspec_file", "eval_batch_size", "cpu", "step", "reader_mode", "threads", "verify")
    values = {name: getattr(scoring, name) for name in taken}
    fixed: dict[str, Any] = {"embedding_parallel": scoring.embedding_parallel or config.training.embedding_parallel}
    fixed |= {"precision": precision, "amp": False, "evaluate": True, "benchmark": False, "affinity": "disabled"}
    fixed |= {"initial_checkpoint": None}
    return config.updated(**values, **fixed), directory


def open_scored(config: TrainConfig, comm: LocalComm, directory: Path, split: str) -> tuple[Run, Reader]:
    """A checkpoint's model, with the rows of a data set: the model's features, the data's files and groups.

    directory: of a checkpoint that `scoring_config` has found whole.

    Raises:
        InputError: the data lacks a feature of the model, or was encoded otherwise.
    """
    data = FeatureSpec.load(Path(config.location.dataset_path) / config.location.fspec_file)
    run = open_model(config, comm, directory, data)
    return run, run.ordered_reader(split)


def open_model(config: TrainConfig, comm: LocalComm, directory: Path, data: FeatureSpec) -> Run:
    """A checkpoint's model for rows of a data set: the model's features, the data's files, label and groups.

    Raises:
        InputError: the data was encoded with other statistics than the model's.
    """
    spec = FeatureSpec.load(directory / checkpoint.SPEC)
    data.check_statistics(spec, directory)
    spec = replace(spec, sources=data.sources, directory=data.directory, group=data.group, label=data.label)
    run = Run.open(config, comm, spec)
    load(run, directory)
    return run


def evaluate_checkpoint(
    config: TrainConfig, comm: LocalComm, directory: Path, split: str, out: str | None, as_json: bool
) -> dict[str, Any]:
    """Scores a checkpoint on a split, prints the metrics, and writes them to `out` with the calibration bins.

    Raises:
        InputError: the data does not fit the model, or has no labels.
    """
    run, reader = open_scored(config, comm, directory, split)
    check_labels(reader)
    evaluation = evaluate(run, reader)
    result = evaluation.compute()
    if comm.rank == 0:
        lines = [f"{key:<18} {metric_text(value, '.9g')}" for key, value in result.items()]
        lines += metrics_note(result.values())
        # First: a file that cannot be written shall not cost the result
        print(json.dumps(plain(result)) if as_json else "\n".join(lines))
        if out:
            write_json(Path(out), {"checkpoint": directory.name} | result | {"calibration": evaluation.calibration()})
    return result


def evaluate_run(config: TrainConfig, comm: LocalComm) -> dict[str, Any]:
    """`widedeep train --evaluate`: the metrics of the last checkpoint of model_dir, logged as the original does.

    Raises:
        InputError: --use_checkpoint is given and there is none, or none that is whole and fits the data.
    """
    checkpoints = Checkpoints(config.location.model_dir)
    found = checkpoints.find("last")
    if config.location.use_checkpoint and not found:
        checkpoints.check_not_tensorflow()
        raise InputError(f"{checkpoints.directory}: expected a checkpoint to evaluate, and there is none")
    run = Run.open(config, comm)
    step = 0
    if found and config.location.use_checkpoint:
        step = checkpoint.read_progress(found).step  # which checks the files
        trained = FeatureSpec.load(found / checkpoint.SPEC)
        run.spec.check_statistics(trained, found)
        check_layers(run, found)
        load(run, found)
        if changes := changed_features(trained, run.spec):
            tell(comm, f"not as trained: {', '.join(changes)}")
    else:
        tell(comm, "evaluating fresh random weights, for --use_checkpoint is not given")
    reader = run.ordered_reader("test")
    check_labels(reader)  # before anything is written
    with Journal(run, ("test",)) as journal:
        return journal.evaluated(step, evaluate(run, reader, journal.running))
