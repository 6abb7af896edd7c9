"""What every command that holds a model needs: the processes, the data set, the model, its step."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from widedeep import affinity
from widedeep.config import TrainConfig
from widedeep.data import Reader
from widedeep.dist import LocalComm, choose_device, connect
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.schedule import deep_lr
from widedeep.shards import ShardSet
from widedeep.share import ALL_ROWS, Share
from widedeep.step import Step, StepConfig, faster_than_fp32, make_step

FEW_STEPS = 500  # the original's job has 9,140
# Of hidden layers: on two cores of a Zen 4 bf16 took longer with 12,608 at batch 512, and 0.7 of the time with 75,008.
MANY_WEIGHTS = 50_000

# As the ops say it (csrc/bindings/embedding_cpu.h, steps/borrowed.py).
BAD_ID = re.compile(r"(feature \d+ has id -?\d+) in batch row \d+, (expected -1 \(padding\) or 0 to \d+)")


def launch(config: TrainConfig, action: Callable[[TrainConfig, LocalComm], Any]) -> Any:
    """Joins the run's processes, pins them, does `action(config, comm)`, and leaves; after a failure on its own.

    Raises:
        InputError: the configuration makes no sense on this machine; or the data turn out to be damaged, whose
            checksums were left out.
    """
    device = choose_device(config.training.cpu)
    config.check(device.type)
    if config.mode.threads:
        torch.set_num_threads(config.mode.threads)
    comm = connect(device)
    try:
        before = affinity.allowed()
        pinned = affinity.pin(config.mode.affinity, comm.local_rank, comm.local_world, device.index)
        if affinity.allowed() != before and not config.mode.threads:
            torch.set_num_threads(min(torch.get_num_threads(), len(affinity.by_physical_core(affinity.allowed()))))
        if config.mode.affinity != "disabled":
            tell(comm, pinned)
        if config.training.xla:
            tell(comm, "--xla has no effect here: there is no TensorFlow graph to compile")
        result = action(config, comm)
    except BaseException as error:
        comm.abort()
        if damage := _damaged_data(error, config):
            raise damage from error
        raise
    comm.close()
    return result


def _damaged_data(error: BaseException, config: TrainConfig) -> InputError | None:
    """What an op's account of an id past its table means where the checksums were left out; None for other errors."""
    found = BAD_ID.search(str(error)) if isinstance(error, RuntimeError) and not config.mode.verify else None
    return found and InputError(
        f"{config.location.dataset_path}: damaged data: {found[1]}, {found[2]}; rerun without --verify false;"
        " the checksums will then name the damaged file"
    )


def tell(comm: LocalComm, text: str) -> None:
    """One line for a person, from the first process only, on stdout: stderr is for the log and for errors."""
    if comm.rank == 0:
        print(text, flush=True)


def open_shards(spec: FeatureSpec, mapping: str, verify: bool) -> ShardSet:
    """The shards of a mapping (`train`, `test`) of a spec, checked against it; with `verify`, their checksums too.

    Raises:
        InputError: the spec names none, they are damaged, or they do not fit the spec.
    """
    chunks = spec.sources.get(mapping, ())
    where = (spec.directory or Path()) / "feature_spec.yaml"
    if len(chunks) != 1 or chunks[0].type != "shards" or len(chunks[0].files) != 1:
        raise InputError(
            f"{where}: source_spec.{mapping}: expected one chunk of type shards with one directory in files; "
            "`widedeep preprocess` makes such a data set from CSV or Parquet files"
        )
    shards = ShardSet.open(spec.source_files(mapping)[0], verify)
    shards.check(spec)
    return shards


def with_rows(shards: ShardSet) -> ShardSet:
    """The same. Raises InputError if they have no rows."""
    if shards.rows == 0:
        raise InputError(f"{shards.directory}: expected rows, and there are none")
    return shards


def check_memory(spec: FeatureSpec, hidden: Sequence[int], share: Share, comm: LocalComm) -> None:
    """Refuses a model that the host has no memory for: its processes would be killed without a word. All look before
    any of them takes its part.

    Raises:
        InputError: names what weights and slots need at least, and what is free.
    """
    rows = sum(share.count(f.cardinality) for f in spec.categorical)
    tables = sum(share.count(f.cardinality) * f.dim for f in spec.categorical) + rows
    dense = spec.parameter_count(hidden) - sum(f.cardinality * (f.dim + 1) for f in spec.categorical)
    # Weight and slot, and of each row another slot of the wide weight and its last step; or, on its way to a GPU, the
    # weight alone.
    need = 8 * (tables + dense) + 8 * rows if comm.device.type == "cpu" else 4 * (tables + dense)
    free = psutil.virtual_memory().available // comm.local_world
    comm.barrier()
    if need > free:
        raise InputError(
            f"the model has {tables + dense:,} parameters in each process, which need {need / 2**30:,.1f} GiB of memory"
            f" at least: expected what fits in the {free / 2**30:,.1f} GiB that are free"
        )


def shared_seed(comm: LocalComm) -> int:
    """A fresh seed, the first process's on all of them."""
    own = int.from_bytes(os.urandom(4), "little")
    return int(comm.all_gather_rows(torch.tensor([own], device=comm.device))[0])


@dataclass
class Run:
    """One run: where its rows come from, the model, and the step that trains and applies it."""

    config: TrainConfig
    comm: LocalComm
    spec: FeatureSpec
    model: WideDeep
    step: Step

    @classmethod
    def open(cls, config: TrainConfig, comm: LocalComm, spec: FeatureSpec | None = None) -> "Run":
        """Loads the spec that `config` names, unless one is given, and builds a model with fresh weights.

        `run.config.training.seed` is a number even when `config`'s is None.
        """
        where, shape = config.location, config.model
        if spec is None:
            spec = FeatureSpec.load(
                Path(where.dataset_path) / where.fspec_file,
                embedding_sizes=where.embedding_sizes_file,
                combiner=shape.combiner,
            )
        if config.training.seed is None:
            config = config.updated(seed=shared_seed(comm))
        share = Share(comm.rank, comm.world) if config.training.embedding_parallel == "sharded" else ALL_ROWS
        check_memory(spec, shape.deep_hidden_units, share, comm)
        model = WideDeep(
            spec,
            hidden=shape.deep_hidden_units,
            dropout=shape.deep_dropout,
            wide_init=shape.wide_init,
            seed=config.training.seed,
            share=share,
        )
        told = config.training
        rules = StepConfig(
            precision=config.precision,
            wide_lr=told.linear_learning_rate,
            l1=told.linear_l1,
            l2=told.linear_l2,
            gemm=told.gemm,
        )
        return cls(config, comm, spec, model, make_step(told.step, model, rules, comm.device, comm))

    @property
    def seed(self) -> int:
        """Of initial weights, row order and dropout: the config's, or what was drawn where it has none."""
        return self.model.seed

    @cached_property
    def train_shards(self) -> ShardSet:
        return with_rows(open_shards(self.spec, "train", self.config.mode.verify))

    @cached_property
    def test_shards(self) -> ShardSet:
        """Without rows where all were for training."""
        return open_shards(self.spec, "test", self.config.mode.verify)

    def train_reader(self) -> Reader:
        """Shuffled training batches."""
        return self._reader(self.train_shards, self.config.training.global_batch_size, shuffle=True)

    def ordered_reader(self, split: str) -> Reader:
        """Evaluation batches of `train` or `test`, in the order of the data."""
        shards = self.train_shards if split == "train" else self.test_shards
        return self._reader(with_rows(shards), self.config.training.eval_batch_size, shuffle=False)

    def test_reader(self) -> Reader | None:
        """Batches for the evaluation after an epoch; None where there are no test rows."""
        return self.ordered_reader("test") if self.test_shards.rows else None

    def _reader(self, shards: ShardSet, batch: int, shuffle: bool) -> Reader:
        return Reader(
            shards,
            batch,
            mode=self.config.mode.reader_mode,
            device=self.comm.device,
            seed=self.seed,
            shuffle=shuffle,
            rank=self.comm.rank,
            world=self.comm.world,
            spec=self.spec,
        )

    def describe(self) -> str:
        """One line about the data and the model."""
        t = self.config.training
        size = self.spec.parameter_count(self.config.model.deep_hidden_units)
        processes = f"{self.comm.world} process{'es' * (self.comm.world > 1)} on {self.comm.device.type}"
        if self.model.share.world > 1:
            processes += " with sharded tables"
        test = f"{self.test_shards.rows:,}" if self.test_shards.rows else "no"
        return (
            f"{self.train_shards.rows:,} train and {test} test rows, {size:,} parameters,"
            f" {self.steps_per_epoch} step{'s' * (self.steps_per_epoch > 1)} per epoch,"
            f" {t.num_epochs} epoch{'s' * (t.num_epochs > 1)}, {self.config.precision}, {processes},"
            f" seed {t.seed}"
        )

    def advice(self) -> Iterator[str]:
        """Lines for who trains on few rows, or leaves the precision: the original's defaults are made for tens of
        millions of rows, and for a TensorFlow that takes TF32 by itself.
        """
        t = self.config.training
        steps = self.steps_per_epoch * t.num_epochs
        if steps < FEW_STEPS:
            yield (
                f"{steps} step{'s' * (steps > 1)} in all are few: a smaller --global_batch_size (now"
                f" {t.global_batch_size}) makes more of them, a higher --deep_learning_rate (now"
                f" {t.deep_learning_rate:g}) larger ones"
            )
        chosen = t.amp or t.precision is not None
        weights = sum(layer.weight.numel() for layer in self.model.layers)
        if weights >= MANY_WEIGHTS and not chosen and (faster := faster_than_fp32(self.comm.device)):
            yield f"products are in fp32: {faster}"

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch.

        Raises:
            InputError: `training_set_size` is more than there is, or less than a batch.
        """
        t, rows = self.config.training, self.train_shards.rows
        batch = min(t.global_batch_size, rows)
        if t.training_set_size is not None and t.training_set_size < batch:
            raise InputError(f"--training_set_size ({t.training_set_size}) must be at least a batch, {batch} rows")
        if t.training_set_size is not None and t.training_set_size > rows:
            raise InputError(
                f"--training_set_size ({t.training_set_size}) must not exceed the {rows} rows"
                f" of {self.train_shards.directory}"
            )
        return t.steps_per_epoch(rows)

    def learning_rate(self, step: int) -> float:
        """Of the deep part, in update number `step` (from 0)."""
        t = self.config.training
        return deep_lr(
            step,
            base=t.deep_learning_rate,
            steps_per_epoch=self.steps_per_epoch,
            num_epochs=t.num_epochs,
            warmup_epochs=t.deep_warmup_epochs,
        )
