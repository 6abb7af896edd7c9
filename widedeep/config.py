"""What a run is told: small frozen dataclasses, one for each group of flags, with the original's names and defaults.

On the command line and in a config file the names are flat (`--num_epochs 3`, `num_epochs: 3`); in code they stand in
their groups (`config.training.num_epochs`). Imports nothing heavy.
"""

import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from widedeep.errors import InputError

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
StepKind = Literal["auto", "reference", "fused"]
Gemm = Literal["auto", "cublaslt", "sm90", "sm90-chain"]
Parallel = Literal["replicated", "sharded"]
OTHER_RESULTS = ("args.json", "config.yaml", "data_summary.json", "metrics.jsonl", "evaluation.json")  # of results_dir
THREADS = "CPU threads per process; if not given, as many as torch takes by itself (1 under torchrun)"
ReaderMode = Literal["auto", "device", "pinned", "stream"]


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text. Default `...`: a value must be given; a tuple: several values."""
    if default is ...:
        return field(metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Location:
    dataset_path: str = option("/outbrain/data", "directory of the preprocessed data set")
    fspec_file: str = option("feature_spec.yaml", "feature spec, relative to dataset_path")
    embedding_sizes_file: str | None = option(
        None, "JSON map of every categorical feature to its embedding dim; wins over the spec"
    )
    use_checkpoint: bool = option(False, "continue from the last checkpoint of model_dir")
    overwrite: bool = option(False, "replace the checkpoints of model_dir and the results of results_dir")
    initial_checkpoint: str | None = option(
        None, "checkpoint (of a model directory its best) whose weights and optimizer state a new training begins with"
    )
    model_dir: str = option("/outbrain/checkpoints", "directory of the checkpoints")
    results_dir: str = option("/results", "directory of the logs and summaries")
    log_filename: str = option("log.json", "name of the JSON-lines log in results_dir")

    def check_log(self) -> None:
        """Raises InputError where the log would take the place of another file of results_dir, or of it itself."""
        log = os.path.normpath(os.path.join(self.results_dir, self.log_filename))
        if log in (os.path.normpath(os.path.join(self.results_dir, name)) for name in ("", *OTHER_RESULTS)):
            others = ", ".join(OTHER_RESULTS)
            raise InputError(f"--log_filename: expected a name other than {others}, got {self.log_filename!r}")


@dataclass(frozen=True)
class Training:
    training_set_size: int | None = option(None, "rows per epoch, if not all of the data")
    global_batch_size: int = option(131072, "training batch, all devices together")
    eval_batch_size: int = option(131072, "evaluation batch, all devices together")
    num_epochs: int = option(20, "epochs")
    cpu: bool = option(False, "run on the CPU even if there is a GPU")
    amp: bool = option(False, "mixed precision: the same as --precision fp16")
    xla: bool = option(False, "accepted for the original's scripts; has no effect here")
    linear_learning_rate: float = option(0.02, "learning rate of the wide part (FTRL)")
    linear_l1: float = option(0.0, "L1 regularisation of the wide part (FTRL), which sets weights to 0")
    linear_l2: float = option(0.0, "L2 regularisation of the wide part (FTRL), which makes weights smaller")
    deep_learning_rate: float = option(
        0.00012,
        "learning rate of the deep part (RMSprop) at the end of the warm-up; after that a quarter of it, in the second"
        " half of the other epochs an eighth",
    )
    deep_warmup_epochs: float = option(6.0, "epochs of linear warm-up of the deep learning rate")
    precision: Precision | None = option(None, "precision of the matrix products (fp32 unless --amp)")
    step: StepKind = option("auto", "training step: plain torch (reference) or our own kernels (fused)")
    gemm: Gemm = option(
        "auto", "matrix products of the hidden layers on a GPU: the library's or ours; auto takes the fastest"
    )
    embedding_parallel: Parallel = option(
        "replicated", "whether each process holds the whole tables, or a share of their rows"
    )
    seed: int | None = option(None, "of initial weights, row order and dropout; random, and recorded, if not given")
    patience: int | None = option(
        None, "stop after this many epochs without a better MAP@12, or auc_val if there is none"
    )

    def steps_per_epoch(self, rows: int) -> int:
        """Batches of an epoch: of `rows`, or of `training_set_size` (whole batches only, as in the original)."""
        if self.training_set_size is None:
            return -(-rows // self.global_batch_size)
        return max(1, self.training_set_size // self.global_batch_size)


@dataclass(frozen=True)
class ModelShape:
    deep_hidden_units: tuple[int, ...] = option((1024,) * 5, "widths of the hidden layers")
    deep_dropout: float = option(0.1, "dropout rate after each hidden layer")
    combiner: Literal["sum", "mean"] | None = option(
        None, "of all multi-hot features; as the spec says when absent, sum where it says nothing"
    )
    wide_init: Literal["uniform", "zeros"] = option("uniform", "initial weights of the wide part")


@dataclass(frozen=True)
class RunMode:
    num_auc_thresholds: int = option(200, "thresholds of auc_val")
    disable_map_calculation: bool = option(False, "leave MAP@12 out, as always where the spec has no map feature")
    evaluate: bool = option(
        False,
        "evaluate only: with --use_checkpoint the last checkpoint, else random weights (--evaluation is the same)",
    )
    benchmark: bool = option(False, "measure throughput only")
    benchmark_warmup_steps: int = option(500, "steps before the clock starts")
    benchmark_steps: int = option(1000, "steps in all; those after the warm-up are measured")
    affinity: Literal[
        "all",
        "socket",
        "single",
        "single_unique",
        "unique_interleaved",
        "socket_unique_interleaved",
        "unique_contiguous",
        "socket_unique_continuous",
        "disabled",
    ] = option("socket_unique_interleaved", "pinning of processes to CPU cores")
    reader_mode: ReaderMode = option("auto", "where rows are kept: GPU memory, host memory, or the files")
    threads: int | None = option(None, THREADS)
    verify: bool = option(True, "check the checksums of the data before the first step")
    log_every: int = option(100, "steps between two log lines")
    checkpoint_every_steps: int | None = option(None, "save inside epochs too, every so many steps")
    keep_last: int = option(2, "checkpoints kept besides the best one")
    tensorboard: bool = option(False, "write TensorBoard events to model_dir/event_files")


@dataclass(frozen=True)
class Scoring:
    """What `widedeep evaluate` and `widedeep predict` can be told."""

    model: str = option(..., "a checkpoint, or the model directory of a run")
    dataset_path: str = option(..., "directory of the preprocessed data set")
    fspec_file: str = option("feature_spec.yaml", "feature spec, relative to dataset_path")
    split: Literal["train", "test"] = option("test", "which rows")
    checkpoint: str = option("best", "best, last or step-<n>, of a model directory")
    eval_batch_size: int = option(131072, "rows at a time, all devices together")
    cpu: bool = option(False, "run on the CPU even if there is a GPU")
    precision: Precision | None = option(None, "of the matrix products (as in training, where the device can)")
    step: StepKind = option("auto", "plain torch (reference) or our own kernels (fused)")
    embedding_parallel: Parallel | None = option(
        None, "whether each process holds the whole tables, or a share of their rows (as in training)"
    )
    reader_mode: ReaderMode = option("auto", "where rows are kept: GPU memory, host memory, or the files")
    threads: int | None = option(None, THREADS)
    verify: bool = option(True, "check the checksums of the data first")

    @classmethod
    def of(cls, values: Any) -> "Scoring":
        """From a namespace that has these fields among others."""
        return cls(**{f.name: getattr(values, f.name) for f in fields(cls)})


GROUPS = {"location": Location, "training": Training, "model": ModelShape, "mode": RunMode}


@dataclass(frozen=True)
class TrainConfig:
    """All that `widedeep train` can be told. Build one from flat names with `from_flat`."""

    location: Location = field(default_factory=Location)
    training: Training = field(default_factory=Training)
    model: ModelShape = field(default_factory=ModelShape)
    mode: RunMode = field(default_factory=RunMode)

    @classmethod
    def from_flat(cls, values: dict[str, Any], where: str = "the configuration") -> "TrainConfig":
        """Groups flat names; absent ones keep their defaults.

        Raises:
            InputError: a name that no group has.
        """
        known = {f.name: group for group, kind in GROUPS.items() for f in fields(kind)}
        parts: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in values.items():
            if name not in known:
                raise InputError(f"{where}: unknown key {name!r}")
            parts[known[name]][name] = tuple(value) if isinstance(value, list) else value
        return cls(**{group: kind(**parts[group]) for group, kind in GROUPS.items()})

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Reads a config.yaml that `to_yaml` wrote."""
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected a map of flag names to values")
        return cls.from_flat(values, str(path))

    def flat(self) -> dict[str, Any]:
        """All values under their flat names, in the order of the groups, as YAML and JSON have them."""
        values = {name: value for group in asdict(self).values() for name, value in group.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.flat(), sort_keys=False)

    def updated(self, **values: Any) -> "TrainConfig":
        """A copy with some flat names changed."""
        return self.from_flat(self.flat() | values)

    @property
    def precision(self) -> str:
        return self.training.precision or ("fp16" if self.training.amp else "fp32")

    def check(self, device: str) -> None:
        """Refuses values out of range and combinations without a meaning.

        Args:
            device: `cpu` or `cuda`, where the run will be.
        Raises:
            InputError: naming the flag and what was expected.
        """
        values = self.flat()
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"--{name}: expected a number, got {value}")
        for name, low in _AT_LEAST.items():
            if values[name] is not None and values[name] < low:
                raise InputError(f"--{name} must be at least {low}, got {values[name]}")
        for name, high in _AT_MOST.items():
            if values[name] is not None and values[name] > high:
                raise InputError(f"--{name} must be at most {high}, got {values[name]}")
        self.location.check_log()
        t, m = self.training, self.mode
        if t.linear_learning_rate == 0:  # FTRL divides by it
            raise InputError("--linear_learning_rate must be above 0, got 0")
        if any(width < 1 for width in self.model.deep_hidden_units):
            raise InputError(f"--deep_hidden_units must be at least 1 each, got {self.model.deep_hidden_units}")
        if not 0 <= self.model.deep_dropout < 1:
            raise InputError(f"--deep_dropout must be in [0, 1), got {self.model.deep_dropout}")
        if t.step == "reference" and t.embedding_parallel == "sharded":
            raise InputError("--embedding_parallel sharded needs the fused step, but --step reference is given")
        if self.location.use_checkpoint and self.location.overwrite:
            raise InputError("--use_checkpoint continues what --overwrite replaces: give one of the two")
        if self.location.initial_checkpoint and (m.evaluate or m.benchmark):
            other = "--evaluate" if m.evaluate else "--benchmark"
            raise InputError(f"--initial_checkpoint begins a training, but {other} is given too")
        if t.amp and t.precision not in (None, "fp16"):
            raise InputError(f"--amp means --precision fp16, but --precision {t.precision} is given too")
        if device == "cpu" and self.precision in ("fp16", "tf32"):
            flag = "--amp" if t.amp else f"--precision {self.precision}"
            raise InputError(f"{flag} needs a GPU: on a CPU use --precision fp32 or bf16")
        if m.benchmark and m.benchmark_warmup_steps >= m.benchmark_steps:
            raise InputError(
                f"--benchmark_steps ({m.benchmark_steps}) must exceed --benchmark_warmup_steps"
                f" ({m.benchmark_warmup_steps})"
            )
        if not m.evaluate and t.deep_warmup_epochs > t.num_epochs:
            raise InputError(
                f"--deep_warmup_epochs ({t.deep_warmup_epochs:g}) must not exceed --num_epochs ({t.num_epochs})"
            )


_AT_MOST = {
    "num_auc_thresholds": 1_000_000,  # each costs memory and time at every line of the log
    "seed": 2**63 - 1,
    "threads": 1024,  # many more and the threads' library dies
}
_AT_LEAST = {
    "training_set_size": 1,
    "global_batch_size": 1,
    "eval_batch_size": 1,
    "num_epochs": 1,
    "linear_learning_rate": 0,
    "linear_l1": 0,
    "linear_l2": 0,
    "deep_learning_rate": 0,
    "deep_warmup_epochs": 0,
    "seed": 0,
    "patience": 1,
    "num_auc_thresholds": 2,
    "benchmark_warmup_steps": 0,
    "benchmark_steps": 2,
    "threads": 1,
    "log_every": 1,
    "checkpoint_every_steps": 1,
    "keep_last": 1,
}
