"""What a run says while it goes: the results directory, written by the first process, counted by all."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from widedeep import atomic
from widedeep.checkpoint import Progress
from widedeep.data import Batch
from widedeep.errors import InputError
from widedeep.logs import EVALUATION_FILE, KEPT, METRICS_FILE, RowProgress, RunLog, lacks_summary, last_seconds
from widedeep.metrics import BinaryAccuracy, Evaluation, ThresholdAUC, numbers
from widedeep.outputs import data_summary, write_json, write_text
from widedeep.run import Run, tell

SUMMARY_FILE = "data_summary.json"
COARSE = 0.005  # how far an AUC by thresholds may be from the exact one before the run says so
UNITS: dict[str, dict[str, Any]] = {
    "streaming_map_val": {"unit": None},
    "map_all_val": {"unit": None},
    "train_throughput": {"unit": "samples/s"},
    "validation_throughput": {"unit": "samples/s"},
}


class Journal:
    """Writes args.json, config.yaml, data_summary.json, the log, and evaluation.json to the results directory of a run.

    A context manager; leaving it closes the log.

    Args:
        splits: those of the data that the run reads.
        progress: where a training begins; one that continues continues its log. None for what is no training.
    """

    _progress: Progress  # of a training, whose methods alone read it

    def __init__(self, run: Run, splits: tuple[str, ...] = ("train", "test"), progress: Progress | None = None):
        config = run.config
        self._run, self._progress = run, progress  # type: ignore[assignment]  # None elsewhere
        self._results = Path(config.location.results_dir)
        self._writes = run.comm.rank == 0
        self._bar: RowProgress | None = None
        self._is_coarse_told = False
        # Evaluations and benchmarks add to the record of the training that went before; they do not take its place.
        self._adds = progress is None and (self._results / METRICS_FILE).is_file()
        done = None if progress is None else progress.step
        if self._writes and progress is not None and progress.step:
            check_run(self._results, progress)
        if self._writes and done == 0:
            with atomic.write_errors(self._results, KEPT):
                (self._results / EVALUATION_FILE).unlink(missing_ok=True)  # of the run that is replaced
        if self._writes and not self._adds:
            write_json(self._results / "args.json", config.flat())
            write_text(self._results / "config.yaml", config.to_yaml())
            shards = {name: getattr(run, f"{name}_shards") for name in splits}
            summary = data_summary(run.spec, config.model.deep_hidden_units, shards)
            summary |= {} if progress is None else {"begun": progress.begun}
            write_json(self._results / SUMMARY_FILE, summary)
            for name, split in summary["splits"].items():
                if split["rows"] and split["clicks"] in (0, split["rows"]):
                    tell(run.comm, one_class(name, split))
        self._log = RunLog(
            self._results,
            config.location.log_filename,
            rank=run.comm.rank,
            append=bool(self._adds or done),
            done=done,
            inside=progress is not None and progress.position > 0,
            events_dir=Path(config.location.model_dir) / "event_files" if config.mode.tensorboard else None,
            first_event=done + 1 if done else done,
            elapsed=last_seconds(self._results / METRICS_FILE, done) if done else 0.0,
        )
        self.log("PARAMETER", config.flat())
        with atomic.write_errors(self._results, KEPT):
            for metric, unit in UNITS.items():
                self._log.metadata(metric, unit)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._close_bar()
        with atomic.write_errors(self._results, KEPT):
            self._log.close()

    def log(self, step: tuple[int, ...] | str, data: dict[str, Any]) -> None:
        """One line of the log."""
        with atomic.write_errors(self._results, KEPT):
            self._log.log(step, data)

    def advance(self, rows: int) -> None:
        """A training batch is done."""
        self._shown().advance(rows)

    def batch(self, loss: float, lr: float, logit: Tensor, batch: Batch) -> None:
        """Loss, accuracy and AUC of one training batch before its update, and the deep part's learning rate."""
        values = {"loss": loss} | batch_values(self._run, logit, batch) | {"schedule": lr}
        self._shown().show(loss=loss)
        self.log((self._progress.step, self._total_steps), values)

    def epoch(self, evaluation: Evaluation | None, loss: float) -> dict[str, float]:
        """The evaluation after an epoch; returns it under the original's keys. Without one the loss of the last batch
        tells of the epoch.
        """
        self._close_bar()
        if evaluation is None:
            if self._progress.step % self._run.config.mode.log_every:  # else `batch` has said it
                self.log((self._progress.step, self._total_steps), {"loss": loss})
            return {"loss": loss}
        result = evaluation.compute()
        values = log_values(result, evaluation)
        self.log((self._progress.step, self._total_steps), values)
        self._write_evaluation(result, evaluation)
        if not self._is_coarse_told and (told := coarse_auc(result, evaluation.thresholds[0])):
            tell(self._run.comm, told)
            self._is_coarse_told = True
        return values

    def finish(self) -> None:
        """What ended the last epoch once more, as the run's summary."""
        self.log((), self._progress.metrics)

    def running(self, batches: int, evaluation: Evaluation) -> None:
        """What an evaluation under way has seen, every `log_every` batches; of this process's rows."""
        if batches % self._run.config.mode.log_every == 0:
            self.log((batches,), evaluation.running())

    def evaluated(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """The end of an evaluation that is a run of its own; step 0: of weights that no training has touched."""
        result = evaluation.compute()
        values = log_values(result, evaluation)
        self.log((step,), values)
        if step or not self._adds:
            self._write_evaluation(result, evaluation)
        return values

    @property
    def _total_steps(self) -> int:
        return self._run.steps_per_epoch * self._run.config.training.num_epochs

    def _write_evaluation(self, result: dict[str, float | int], evaluation: Evaluation) -> None:
        if self._writes:
            write_json(self._results / EVALUATION_FILE, result | {"calibration": evaluation.calibration()})

    def _shown(self) -> RowProgress:
        """The bar of the epoch, which its first batch begins."""
        if self._bar is None:
            run, progress = self._run, self._progress
            batch, training = run.config.training.global_batch_size, run.config.training
            total = min(run.steps_per_epoch * batch, run.train_shards.rows)
            title = f"epoch {progress.epoch + 1}/{training.num_epochs}"
            self._bar = self._log.progress(title, total, (progress.position - 1) * batch).__enter__()
        return self._bar

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def end_log(run: Run, progress: Progress) -> None:
    """Adds the summary to the log of a finished training that was killed between its last checkpoint and that."""
    results = Path(run.config.location.results_dir)
    is_ours = progress.begun is not None and begun_at(results) == progress.begun
    if is_ours and lacks_summary(results / METRICS_FILE, progress.step):
        with Journal(run, progress=progress) as journal:
            journal.finish()


def begun_at(results: Path) -> str | None:
    """When the run began whose records these are; None where they do not say."""
    try:
        return json.loads((results / SUMMARY_FILE).read_text(encoding="utf-8")).get("begun")
    except (OSError, ValueError, AttributeError):
        return None


def check_run(results: Path, progress: Progress) -> None:
    """Refuses to continue the records of another run than the one that is continued.

    Raises:
        InputError: they say that their run began at another time.
    """
    begun = begun_at(results)
    if None not in (begun, progress.begun) and begun != progress.begun:
        raise InputError(
            f"{results}: holds the records of a run that began at {begun}, and the one to continue began at"
            f" {progress.begun}: expected its own, or another --results_dir"
        )


def one_class(name: str, split: dict[str, Any]) -> str:
    """A sentence for a split whose labels are all equal."""
    label = int(split["clicks"] > 0)
    what = {"train": "there is nothing to learn but that", "test": "no AUC is defined, so auc_val will be nan"}
    return f"all {split['rows']:,} {name} rows have the label {label}: {what[name]}"


def coarse_auc(result: dict[str, float | int], thresholds: int) -> str | None:
    """A sentence where clicks are so rare, or so sure, that few of the thresholds lie between the probabilities."""
    coarse, exact = result[f"auc_{thresholds}"], result["auc"]
    if not abs(coarse - exact) > COARSE:  # as when they are undefined
        return None
    return (
        f"auc_val, by {thresholds} thresholds, is {coarse:.4f}, and the exact AUC {exact:.4f}:"
        f" --num_auc_thresholds {40 * thresholds} makes it finer"
    )


def log_values(result: dict[str, float | int], evaluation: Evaluation) -> dict[str, float]:
    """An evaluation's result under the original's log keys; `map_all_val`, ours, where a group has several clicks."""
    names = {"loss_val": "loss", "auc_val": f"auc_{evaluation.thresholds[0]}", "binary_accuracy_val": "binary_accuracy"}
    names |= {"streaming_map_val": "map"} if evaluation.groups else {}
    names |= {"map_all_val": "map_all"} if result["multi_click_groups"] else {}
    return {name: result[key] for name, key in names.items()}


def batch_values(run: Run, logit: Tensor, batch: Batch) -> dict[str, float]:
    """Accuracy and AUC of one global batch, by the logits [B] of this process's rows."""
    gather = run.comm.all_gather_rows
    logit, label = gather(logit), gather(batch.label)
    accuracy, auc = BinaryAccuracy(), ThresholdAUC(run.config.mode.num_auc_thresholds)
    accuracy.update(logit.sigmoid(), label)
    auc.update_logits(logit, label)
    return numbers({"binary_accuracy": accuracy.value(), "auc": auc.value()})
