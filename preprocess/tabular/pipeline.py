"""The run: pass 1 learns on train rows, pass 2 writes shards."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import engine, inputs
from preprocess.engine import Engine
from preprocess.provenance import statistics_digest
from preprocess.stages import Stages
from preprocess.tabular import source, statistics
from preprocess.tabular.columns import Lists, single
from preprocess.tabular.config import TabularConfig
from preprocess.tabular.encode import Encoded, encode_all, values_of
from preprocess.tabular.source import Chunk
from preprocess.tabular.spec import Feature, TabularSpec
from preprocess.tabular.split import parse
from preprocess.tabular.transforms import Vocabulary, are_strange
from widedeep import __version__, atomic
from widedeep.errors import InputError
from widedeep.feature_spec import MAPPINGS, STATISTICS
from widedeep.shards import DATA_SET_OUTPUT, UNLABELLED, ShardWriter

log = logging.getLogger(__name__)

FEW = 5  # values that a message names


def run(config: TabularConfig) -> dict[str, Any]:
    """Write `config.out`: feature_spec.yaml, train/, test/, statistics/, report.json.

    Rows keep the input order. The directory appears only when all of it is written.

    Returns:
        The report: rows and positive rate (None without rows or labels) by split; nulls and cut-off list elements by
        feature; cardinalities; stages; seconds.
    Raises:
        InputError: the spec, a file or a value is not as expected, or a file changes meanwhile; names file and field or
            line.
        RunError: the disk is full, or a worker was lost.
    """
    spec = TabularSpec.load(config.spec)
    sources = [*spec.sources.get("train", ()), *spec.sources.get("test", ())]
    inputs.check_outside(config.out, [*(config.inputs or sources), *config.test])
    reads = [config.spec, *config.inputs, *config.test, *sources, *([config.stats] if config.stats else [])]
    with (
        atomic.directory(Path(config.out), DATA_SET_OUTPUT, reads) as out,
        engine.make(config.engine, config.workers, out, scheduler=config.scheduler) as pool,
    ):
        pool.check_sees([out])
        job = _Run(config, spec, out, pool)
        with inputs.unchanged([*job.inputs, *job.test]):
            return job.all()


class _Run:
    def __init__(self, config: TabularConfig, spec: TabularSpec, out: Path, engine: Engine):
        self.config, self.spec, self.out, self.engine = config, spec, out, engine
        self.split = None
        if config.split is not None:
            group = next((f.columns[0] for f in spec.features if f.kind == "group"), None)
            if config.split.startswith("group:") and group is None:
                raise InputError(
                    f"{spec.path}: channel_spec.map: expected a feature for the split {config.split}, got none"
                )
            self.split = parse(config.split, config.seed, group)
        self.inputs = inputs.files_of(config.inputs or spec.sources.get("train", ()))
        own_test = [] if config.inputs else spec.sources.get("test", ())
        self.test = [] if self.split else inputs.files_of(config.test or own_test)
        if not self.inputs and not (self.test and config.stats):
            raise InputError("expected input files, got none; only with --stats may there be test files alone")
        if not self.split and not self.test:
            raise InputError("expected test files or a split such as random:0.2 or none, got neither")
        extra = [self.split.column] if self.split and self.split.column else []
        # Only evaluation needs the group: a spec's own train files may lack it.
        self.train_group = bool(config.inputs) or spec.has_group.get("train", True)
        self.columns = tuple(dict.fromkeys([*spec.columns(() if self.train_group else ("group",)), *extra]))
        self.absent: tuple[str, ...] = ()  # the kinds of features, of label and group, that test files do not have
        self.label = next(f for f in spec.features if f.kind == "label")
        self.counts = {m: {"rows": 0, "positive": 0} for m in MAPPINGS}
        self.stages = Stages()
        self.rows: int | None = None  # of all files, once a pass has seen them
        self.nulls = {f.name: 0 for f in spec.features}
        self.cut = {f.name: 0 for f in spec.features if f.hotness}
        # Of features with a vocabulary, by split: values that are in it, and all.
        words = [f.name for f in spec.features if isinstance(f.encoder, Vocabulary)]
        self.known = {name: {m: np.zeros(2, np.int64) for m in MAPPINGS} for name in words}

    def all(self) -> dict[str, Any]:
        started = time.perf_counter()
        if self.config.stats is not None and not self.inputs:
            # Rows to be scored alone: nothing is learned from them, and perhaps nothing measured.
            self.absent = tuple(f.kind for f in self.spec.features if f.kind in ("label", "group") and self.lacks(f))
        if self.split and self.split.surveys:
            with self.stages.stage("survey") as stage:
                for chunk in self.read(self.inputs, self.split.column or self.columns[0]):
                    with chunk.blame(self.split.column):
                        self.split.survey(chunk.rows, chunk.columns)
                    stage.advance(len(chunk.rows))
        if self.config.stats is None:
            self.learn()
        else:
            statistics.load(self.spec, Path(self.config.stats))
            if not self.inputs:
                self.label.encoder.is_strict = False  # rows to be scored need no true labels
        statistics.save(self.spec, self.out)
        completed = self.spec.completed(self.train_group)
        self.write(completed)
        digest = statistics_digest(self.out / STATISTICS)
        completed.with_statistics(digest, self.config.numeric).save(self.out / "feature_spec.yaml")
        report = self.report(completed, time.perf_counter() - started)
        (self.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def chunks(self, stage: str) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Every chunk of inputs and test files, with a bool mask of its test rows, as a stage of that name."""
        with self.stages.stage(stage, self.rows) as done:
            for chunk, is_test in self.divided():
                yield chunk, is_test
                done.advance(len(chunk.rows))
        self.rows = done.rows

    def divided(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        for chunk in self.read(self.inputs, *self.columns):
            if self.split is None:
                yield chunk, np.zeros(len(chunk.rows), bool)
            else:
                with chunk.blame(self.split.column):
                    is_test = self.split.is_test(chunk.rows, chunk.columns)
                yield chunk, is_test
        for chunk in self.read(self.test, *self.spec.columns(self.absent)):
            yield chunk, np.ones(len(chunk.rows), bool)

    def lacks(self, feature: Feature) -> bool:
        """Whether no test file has the feature's column, or no row a value in it."""
        column = feature.columns[0]
        headers = [source.column_names(Path(path), self.spec.csv_of(path)) for path in self.test]
        if not any(column in names or column in faults for names, faults in headers):
            return True
        for chunk in self.read(self.test, column):
            with chunk.blame(column):
                if (values_of(feature, chunk, column).codes >= 0).any():
                    return False
        return True

    def read(self, paths: list, *columns: str) -> Iterator[Chunk]:
        return source.chunks(paths, columns, self.engine, self.config.chunk_bytes, csv=self.spec.csv_of)

    def learn(self) -> None:
        learning = [f for f in self.spec.features if f.encoder.learns]
        rows = 0
        for chunk, is_test in self.chunks("learn") if learning else ():
            rows += int((~is_test).sum())
            if not is_test.all():
                for feature in learning:
                    _learn(feature, chunk, ~is_test)
        if learning and not rows:
            raise InputError(f"{self.inputs[0]}: expected train rows to learn from, found none")
        for feature in learning:
            feature.encoder.finish()

    def write(self, completed: Any) -> None:
        with ExitStack() as stack:
            has_group = {"train": self.train_group, "test": "group" not in self.absent}
            groups = {m: self.spec.group is not None and has_group[m] for m in MAPPINGS}
            writers = {}
            for m in MAPPINGS:
                writer = ShardWriter(
                    self.out / m,
                    completed,
                    rows_per_shard=self.config.rows_per_shard,
                    numeric=self.config.numeric,
                    group=groups[m],
                    final=Path(self.config.out) / m,
                )
                writers[m] = stack.enter_context(writer)
            for chunk, is_test in self.chunks("write"):
                present = [f for f in self.spec.features if f.kind not in self.absent and f.columns[0] in chunk.columns]
                encoded = self.encode(present, chunk)
                arrays = {name: values.rows for name, values in encoded.items()}
                if "label" in self.absent:
                    arrays[completed.label] = np.zeros(len(chunk.rows), np.uint8)
                for mapping, chosen in zip(MAPPINGS, (~is_test, is_test)):
                    if not chosen.any():
                        continue
                    part = {name: values[chosen] for name, values in arrays.items()}
                    writers[mapping].append(part)
                    self.counts[mapping]["rows"] += int(chosen.sum())
                    self.counts[mapping]["positive"] += int(part[completed.label].sum())
                    for name, known in self.known.items():
                        values = encoded[name].present[chosen]
                        known[mapping] += np.count_nonzero(part[name] > 0), np.count_nonzero(values)
            self.check_positive()
            measured = UNLABELLED if "label" in self.absent else None
            for writer in writers.values():
                writer.finish(measured, self.provenance())

    def check_positive(self) -> None:
        """Raise InputError if no train row is positive although the spec says which values are: they are misspelt."""
        label, train, test = self.label, self.counts["train"], self.counts["test"]
        if label.encoder.positive is None or not train["rows"] or self.config.stats is not None:
            return
        if train["positive"]:
            if test["rows"] and not test["positive"]:
                told = "%s: none of %d test rows is positive; are the values spelled as in train rows?"
                log.warning(told, label.name, test["rows"])
            return
        chunk, is_test = next(pair for pair in self.divided() if not pair[1].all())
        column = single(chunk.columns[label.columns[0]])
        found = ", ".join(repr(column.texts[code]) for code in np.flatnonzero(column.counts(~is_test))[:FEW])
        given = ", ".join(map(repr, sorted({*map(str, label.encoder.positive)})))
        field = f"{self.spec.path}: feature_spec.{label.name}.transform.positive"
        raise InputError(f"{field}: expected a value that train rows have, such as {found}, got {given}")

    def encode(self, features: list[Feature], chunk: Chunk) -> dict[str, Encoded]:
        """The features by name; their rows are as the shard writer takes them."""
        encoded = encode_all(features, chunk, self.config.numeric)
        for name, values in encoded.items():
            self.nulls[name] += values.nulls
            if values.cut:
                self.cut[name] += values.cut
        return encoded

    def provenance(self) -> dict[str, Any]:
        return {
            "program": f"widedeep {__version__} preprocess tabular",
            "inputs": [str(path) for path in self.inputs],
            "test": [str(path) for path in self.test],
            "split": self.config.split,
            "seed": self.config.seed,
            "stats": None if self.config.stats is None else str(self.config.stats),
        }

    def report(self, completed: Any, seconds: float) -> dict[str, Any]:
        if self.inputs and not self.counts["test"]["rows"] and self.config.split != "none":
            told = f"the split {self.config.split} makes no test rows" if self.split else "the test files hold no rows"
            log.warning("%s: a training would not be evaluated", told)
        tested = {*map(os.path.realpath, self.test)}
        if both := [str(path) for path in self.inputs if os.path.realpath(path) in tested]:
            log.warning("%s: among the train files and the test files: metrics of known rows say nothing", both[0])
        for name, cut in self.cut.items():
            if cut:
                log.warning("%s: %d elements beyond max_hotness were left out", name, cut)
        self.warn_of_strange_values()
        if others := self.label.encoder.others:
            told = "%s: %d of %d rows have a label that the spec does not name, such as %r: it counts as 0 in metrics"
            log.warning(told, self.label.name, others, self.counts["test"]["rows"], self.label.encoder.other)
        unused = [name for name in completed.other if name not in (completed.label, completed.group)]
        if unused:
            log.warning(
                "%s: in no list of channel_spec, so no part of the data set: %s", self.spec.path, ", ".join(unused)
            )
        result: dict[str, Any] = {}
        for mapping, count in self.counts.items():
            rate = count["positive"] / count["rows"] if count["rows"] and "label" not in self.absent else None
            result[mapping] = {"rows": count["rows"], "positive_rate": rate}
        if (rate := result["train"]["positive_rate"]) in (0, 1):
            told = "%s: all labels of the %d train rows are %d: nothing can be learned, and their AUC is not defined"
            log.warning(told, self.label.name, result["train"]["rows"], rate)
        return result | {
            "nulls": self.nulls,
            "elements_cut": self.cut,
            "cardinality": dict(zip(completed.names, completed.cardinalities)),
            "stages": self.stages.to_dict(),
            "seconds": seconds,
        }

    def warn_of_strange_values(self) -> None:
        """Tell of vocabularies that hold hardly any of the test values."""
        by_split = [f.name for f in self.spec.features if self.split and self.split.column in f.columns]
        rule = (self.config.split or "").partition(":")[0]
        for name, known in self.known.items():
            (hits, values), (train_hits, train_values) = known["test"].tolist(), known["train"].tolist()
            learned = self.config.stats is None  # else train rows are as strange as test rows
            expected = values * train_hits / max(1, train_values) if learned else values
            if not are_strange(hits, expected):
                continue
            if name in by_split:
                told = "%s: its column splits the rows by %s, so its test values are new: leave it out of the features"
                log.warning(told, name, rule)
            else:
                told = "%s: %d of %d test values occur among those learned from train rows; is the spelling the same?"
                log.warning(told, name, hits, values)


def _learn(feature: Feature, chunk: Chunk, chosen: np.ndarray) -> None:
    for name in feature.columns:
        with chunk.blame(name):
            values = values_of(feature, chunk, name)
            if isinstance(values, Lists):
                elements = values.chosen_elements(chosen)
                feature.encoder.learn(elements, np.ones(len(elements), bool), chunk.rows)
            else:
                feature.encoder.learn(values, chosen, chunk.rows)
