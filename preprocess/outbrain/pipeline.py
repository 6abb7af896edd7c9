"""The run: tables, pass 1, statistics, pass 2, and the report."""

import dataclasses
import json
import logging
import platform
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from preprocess import csv_io, inputs
from preprocess.engine import Engine, make
from preprocess.outbrain import clicks, layout, memory, resume, store, tables, transform
from preprocess.outbrain.ads import Ads
from preprocess.outbrain.clicks import SPLITS, Scan
from preprocess.outbrain.columns import Events
from preprocess.outbrain.config import OutbrainConfig
from preprocess.outbrain.flavours import FLAVOURS
from preprocess.provenance import statistics_digest
from preprocess.stages import Stage, Stages, Watched
from widedeep import __version__
from widedeep.errors import InputError
from widedeep.feature_spec import STATISTICS, FeatureSpec
from widedeep.shards import DATA_SET_OUTPUT, ShardWriter

log = logging.getLogger(__name__)

REQUIRED = ("clicks_train", "events", "promoted_content")
OPTIONAL = ("documents_meta", *(f"documents_{kind}" for kind in layout.ATTRIBUTES))


def run(config: OutbrainConfig) -> dict[str, Any]:
    """Writes `config.out`: feature_spec.yaml, train/, test/, statistics/, report.json.

    train keeps the input order (readers shuffle); test ascends by display_id, rows of a display in input order. Every
    click row lands in exactly one of them. The directory appears only when all of it is written. A run that was killed
    continues at its last finished stage when the same run is started again; see `resume`.

    Returns:
        The report: rows, displays and click rate by split, nulls by feature, seconds and rows/s by stage, peak memory.
    Raises:
        InputError: a file is missing or malformed or changes meanwhile, no row is for training, or the memory limit is
            too small.
        RunError: the disk is full, or a worker was lost; after the latter the same run continues too.
    """
    files = _find(config)
    present = [*files.values()]
    reads = present if config.stats is None else [*present, Path(config.stats)]
    if config.memory_limit is not None:
        memory.keep_one_heap()
    with (
        resume.directory(Path(config.out), DATA_SET_OUTPUT, _key(config, present), reads) as journal,
        make(config.engine, config.workers, journal.work, scheduler=config.scheduler, device=config.device) as engine,
        inputs.unchanged(present),
    ):
        engine.check_sees([*present, journal.work])
        engine.everywhere(store.forget)
        try:
            report = _Run(config, files, journal, engine).all()
            engine.everywhere(store.forget)  # what a worker still maps would keep its place on the disk
            return report
        finally:
            store.forget()


def _find(config: OutbrainConfig) -> dict[str, Path]:
    """The raw files by name, without those that are absent and may be."""
    files = {}
    for name in (*REQUIRED, *OPTIONAL):
        path = csv_io.find(config.data_path, name)
        if path is not None:
            files[name] = path
        elif name in REQUIRED:
            raise InputError(
                f"{Path(config.data_path) / name}.csv: the file is missing; expected it plain, or as .gz or .zst"
            )
        else:
            log.warning("%s.csv is missing: what it would give is null", Path(config.data_path) / name)
    return files


def _key(config: OutbrainConfig, files: list[Path]) -> dict[str, Any]:
    """What the output depends on; neither workers nor memory."""
    free = ("data_path", "out", "stats", "engine", "workers", "scheduler", "memory_limit", "chunk_rows")
    settings = {name: value for name, value in vars(config).items() if name not in free}
    given = [] if config.stats is None else sorted(p for p in Path(config.stats).rglob("*") if p.is_file())
    return {"version": __version__, **settings, "inputs": resume.state(files), "stats": resume.state(given)}


class _Run:
    """One run: the paths, and what the stages leave for the report."""

    def __init__(self, config: OutbrainConfig, files: dict[str, Path], journal: resume.Journal, engine: Engine):
        self.config, self.files, self.journal, self.engine = config, files, journal, engine
        self.out, self.work = journal.out, journal.work
        self.flavour = FLAVOURS[config.flavour]
        shipped = self.flavour.multihot_spec if config.multihot else self.flavour.spec
        assert shipped is not None  # else the settings are refused
        spec = FeatureSpec.outbrain(shipped)
        self.spec = dataclasses.replace(spec, metadata={"flavour": config.flavour})
        ours = {theirs: ours for ours, theirs in self.flavour.names.items()}
        self.buckets = {ours.get(name, name): n for name, n in zip(spec.names, spec.cardinalities)}
        self.stages = Stages()
        self.resumed = list(journal.stages)
        for name, note in journal.stages.items():
            self.stages.done[name] = Stage(name, note["rows"], note["seconds"])
        self.clear()
        self.block_bytes = memory.block_bytes(config, self.files, engine)
        self.given = None if config.stats is None else self.flavour.statistics.load(config.stats)

    def clear(self) -> None:
        """Removes what an unfinished stage left."""
        for path in self.out.iterdir():
            if f"transform {path.name}" in self.journal.stages:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if "clicks" not in self.journal.stages:
            for path in (p for split in SPLITS for p in self.work.glob(f"{split}-*")):
                path.unlink()

    def once(self, name: str, work: Callable[[Stage], dict[str, Any] | None], total: int | None) -> dict[str, Any]:
        """Does a stage unless it is done already; returns what it noted, plain values."""
        if name not in self.journal.stages:
            with self.stages.stage(name, total) as done:
                note = work(done) or {}
            memory.give_back()
            self.journal.add(name, {"rows": done.rows, "seconds": done.seconds, **note})
        return self.journal.stages[name]

    def read(self, name: str, work: Callable[[Stage], dict[str, Any] | None], file: str) -> dict[str, Any]:
        """`once` for a stage that reads a raw file, whose bytes tell how far it is."""
        path = self.files.get(file)
        return self.once(name, work, None if path is None else csv_io.text_bytes(path))

    def parsing(self, done: Stage) -> Watched:
        """The engine for `tables`, whose tasks are blocks and whose results are their columns."""
        return Watched(
            self.engine, done, lambda columns: len(next(iter(columns.values()))), lambda block: block.stop - block.start
        )

    def all(self) -> dict[str, Any]:
        events = self.read("events", self.read_events, "events")
        self.read("documents", self.read_documents, "documents_meta")
        self.read("promoted_content", self.read_promoted, "promoted_content")
        for kind in layout.ATTRIBUTES:
            self.read(kind, partial(self.read_attributes, kind), f"documents_{kind}")
        scan = Scan.load(self.work, self.read("clicks", self.scan_clicks, "clicks_train"))
        promoted = store.load(self.work, "promoted", tables.Promoted, "cpu")
        learn = self.flavour.statistics.learn
        statistics = self.given or learn(scan.ads, scan.ages, promoted, events["places"])
        store.save(self.work, "ads", Ads.build(scan.ads.ad, promoted, statistics, self.flavour, self.buckets))
        store.save(self.work, "ages", transform.Ages.build(statistics))
        statistics.save(self.out / STATISTICS)
        absent = promoted.lookup.find(scan.ads.ad) < 0
        rows = memory.chunk_rows(self.config, store.size(self.work, besides=SPLITS), self.engine)
        nulls = {}
        for split in SPLITS:
            write = partial(self.write, scan, split, rows)
            nulls[split] = self.once(f"transform {split}", write, scan.rows(split))["nulls"]
        spec = self.spec.with_statistics(statistics_digest(self.out / STATISTICS), self.config.numeric)
        spec.save(self.out / "feature_spec.yaml")
        report = self.report(scan, nulls, absent)
        (self.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def read_events(self, done: Stage) -> dict[str, Any]:
        how = self.parsing(done), self.block_bytes, self.flavour
        events, geo, places = tables.read_events(self.files["events"], *how, self.buckets, self.given, self.config.seed)
        store.save(self.work, "events", events)
        store.save(self.work, "geo", geo)
        return {"places": places}

    def read_documents(self, done: Stage) -> None:
        path = self.files.get("documents_meta")
        documents = tables.read_documents(path, self.parsing(done), self.block_bytes, self.flavour, self.buckets)
        store.save(self.work, "documents", documents)

    def read_promoted(self, done: Stage) -> None:
        documents = store.load(self.work, "documents", tables.Documents, "cpu")
        how = self.parsing(done), self.block_bytes
        store.save(self.work, "promoted", tables.read_promoted(self.files["promoted_content"], *how, documents))

    def read_attributes(self, kind: str, done: Stage) -> None:
        path, name = self.files.get(f"documents_{kind}"), layout.LISTS[kind]
        how = (
            self.parsing(done),
            self.block_bytes,
            self.flavour.idf(store.load(self.work, "documents", tables.Documents, "cpu")),
        )
        attributes, lists = tables.read_attributes(path, kind, *how, self.buckets.get(name))
        store.save(self.work, kind, attributes)
        if lists is not None:
            store.save(self.work, name, lists)

    def scan_clicks(self, done: Stage) -> dict[str, Any]:
        path, config = self.files["clicks_train"], self.config
        tasks = (
            clicks.Task(block, i, self.work, self.flavour, config.device)
            for i, block in enumerate(csv_io.blocks(path, layout.CLICKS, self.block_bytes))
        )
        counting = Watched(
            self.engine,
            done,
            lambda scan: sum(scan.rows(split) for split in SPLITS),
            lambda task: task.block.stop - task.block.start,
        )
        scan = Scan.merge(counting.map(clicks.scan, tasks))
        if not done.rows:
            raise InputError(f"{path}: expected at least one row after the header")
        if self.given is None and not scan.rows("train"):
            end = (layout.LAST_SHARED_DAY + 1) * layout.MILLISECONDS_A_DAY
            raise InputError(
                f"{path}: expected train rows to learn from, found none: four fifths of the displays with a timestamp"
                f" from 0 to {end - 1} are for training, and {self.timestamps()}"
            )
        clicks.sort_by_display(scan, "test", self.work)
        return scan.save(self.work)

    def timestamps(self) -> str:
        """What a message says of the times of the events: another origin is the usual reason for an empty split."""
        times = store.load(self.work, "events", Events, "cpu").timestamp
        found = times[times >= 0]
        range_ = f"from {found.min()} to {found.max()}" if len(found) else "of no row"
        return (
            f"{self.files['events'].name} has timestamps {range_} (milliseconds since {layout.ORIGIN_MS} of Unix time)"
        )

    def write(self, scan: Scan, split: str, rows: int, done: Stage) -> dict[str, Any]:
        """Transforms the rows of a split into its shards; returns the nulls by feature as `nulls`."""
        config, grouped = self.config, split == "test"
        common = {
            "work": self.work,
            "flavour": self.flavour,
            "buckets": tuple(self.buckets.items()),
            "grouped": grouped,
            "device": config.device,
        }
        nulls: dict[str, int] = {}
        writer = ShardWriter(
            self.out / split,
            self.spec,
            rows_per_shard=config.rows_per_shard,
            numeric=config.numeric,
            group=grouped,
            threads=memory.writers(config, self.engine),
            rows=scan.rows(split),
            final=Path(config.out) / split,
        )
        with writer:
            for columns, missing in self.engine.map(transform.run, transform.tasks(scan, split, rows, **common)):
                writer.append(columns)
                done.advance(len(columns[self.spec.label]))
                for name, count in missing.items():
                    nulls[name] = nulls.get(name, 0) + count
            writer.finish(
                statistics={"rows": scan.rows(split), "clicks": scan.clicks[split]}, provenance=self._provenance()
            )
        return {"nulls": nulls}

    def report(self, scan: Scan, nulls: dict[str, dict[str, int]], absent: np.ndarray) -> dict[str, Any]:
        """nulls: by split and feature; absent: [ads] bool, the ads of the clicks that promoted_content.csv lacks."""
        splits = {}
        for split in SPLITS:
            rows, clicked = scan.rows(split), scan.clicks[split]
            splits[split] = {
                "rows": rows,
                "displays": clicks.count_displays(scan, split),
                "clicks": clicked,
                "click_rate": clicked / rows if rows else None,
                "nulls": nulls[split],
            }
        if (rate := splits["train"]["click_rate"]) in (0, 1):
            told = "%s: all labels of the %d train rows are %d: nothing can be learned, and their AUC is not defined"
            log.warning(told, self.spec.label, splits["train"]["rows"], rate)
        if not splits["test"]["rows"]:
            told = "%s: no rows are test rows, so a training would not be evaluated; %s"
            log.warning(told, self.files["clicks_train"], self.timestamps())
        return {
            "rows": sum(s["rows"] for s in splits.values()),
            **splits,
            "ads_not_promoted": {"ads": int(absent.sum()), "rows": int(scan.ads.rows[absent].sum())},
            "missing_files": [f"{name}.csv" for name in OPTIONAL if name not in self.files],
            "stages": self.stages.to_dict(),
            "resumed_stages": self.resumed,
            "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **self._provenance(),
        }

    def _provenance(self) -> dict[str, Any]:
        """Nothing here depends on the machine's clock or paths: the same input gives the same manifest."""
        return {
            "flavour": self.config.flavour,
            "seed": self.config.seed,
            "statistics": "learned" if self.config.stats is None else "given",
            "inputs": {path.name: path.stat().st_size for path in self.files.values()},
            "input_rows": {name: stage.rows for name, stage in self.stages.done.items() if " " not in name},
            "versions": {
                "widedeep": __version__,
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                "xxhash": xxhash.VERSION,
                "python": platform.python_version(),
            },
        }
