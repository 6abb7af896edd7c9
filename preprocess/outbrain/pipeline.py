"""The run: tables, pass 1, statistics, pass 2, and the report."""

import contextlib
import dataclasses
import json
import logging
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

import widedeep
from preprocess import csv_io
from preprocess.engine import LocalEngine
from preprocess.outbrain import clicks, layout, store, tables, transform
from preprocess.outbrain.ads import Ads
from preprocess.outbrain.clicks import SPLITS, Scan
from preprocess.outbrain.config import DEFAULT_CHUNK_ROWS, OutbrainConfig
from preprocess.outbrain.statistics import Statistics
from widedeep import atomic
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardWriter

log = logging.getLogger(__name__)

REQUIRED = ("clicks_train", "events", "promoted_content")
OPTIONAL = ("documents_meta", *(f"documents_{kind}" for kind in layout.ATTRIBUTES))
MARKER = "feature_spec.yaml"
# What the memory limit is shared out by, in bytes; measured with numpy 2.4 and pyarrow 26 on x86-64.
PROCESS_BYTES = 160 << 20
CHUNK_ROW_BYTES = 700
SHARD_ROW_BYTES = 100
MIN_CHUNK_ROWS = 4096


def run(config: OutbrainConfig) -> dict[str, Any]:
    """Writes `config.out`: feature_spec.yaml, train/, test/, statistics/, report.json.

    train keeps the input order (readers shuffle); test ascends by display_id, rows of a display in input order. Every
    click row lands in exactly one of them. The directory appears only when all of it is written.

    Returns:
        The report: rows, displays and click rate by split, nulls by feature, seconds and rows/s by stage, peak memory.
    Raises:
        InputError: a file is missing or malformed, or the memory limit is too small.
        RunError: the disk is full, or a worker died.
    """
    store.load.cache_clear()
    try:
        with atomic.directory(Path(config.out), MARKER) as out, LocalEngine(config.workers) as engine:
            return _Run(config, out, engine).all()
    finally:
        store.load.cache_clear()


def chunk_rows(config: OutbrainConfig, table_bytes: int) -> int:
    """Rows a chunk, within the memory limit. The limit has to hold

        (workers + 1) x 160 MiB            interpreters, libraries, CSV blocks; the 1 is the writing process
        + tables                           mapped once by all processes
        + rows_per_shard x 100 B           the shard being filled
        + (2 workers + 1) x rows x 700 B   chunks at work or on their way

    Raises:
        InputError: fewer than 4096 rows would fit.
    """
    wanted = config.chunk_rows or DEFAULT_CHUNK_ROWS
    if config.memory_limit is None:
        return wanted
    processes = (config.workers + 1) if config.workers > 1 else 1
    fixed = processes * PROCESS_BYTES + table_bytes + config.rows_per_shard * SHARD_ROW_BYTES
    a_row = (2 * config.workers + 1) * CHUNK_ROW_BYTES
    rows = (config.memory_limit - fixed) // a_row
    if rows < MIN_CHUNK_ROWS:
        need = fixed + MIN_CHUNK_ROWS * a_row
        raise InputError(
            f"memory_limit is {config.memory_limit / 2**30:.2f} GiB, expected at least {need / 2**30:.2f} GiB for this"
            " data set; fewer workers or a smaller rows_per_shard need less"
        )
    return min(wanted, rows)


class _Run:
    """One run: the paths, and what the stages leave for the report."""

    def __init__(self, config: OutbrainConfig, out: Path, engine: LocalEngine):
        self.config, self.out, self.engine = config, out, engine
        self.work = out / "work"
        self.work.mkdir()
        self.spec = dataclasses.replace(FeatureSpec.outbrain(), metadata={"flavour": config.flavour})
        self.buckets = dict(zip(self.spec.names, self.spec.cardinalities))
        self.stages: dict[str, dict[str, float]] = {}
        self.files = {name: csv_io.find(config.data_path, name) for name in (*REQUIRED, *OPTIONAL)}
        for name, path in self.files.items():
            if path is None and name in REQUIRED:
                raise InputError(f"{Path(config.data_path) / name}.csv: the file is missing")
            if path is None:
                log.warning("%s.csv is missing: what it would give is null", Path(config.data_path) / name)

    def all(self) -> dict[str, Any]:
        self.read_tables()
        scan = self.scan_clicks()
        promoted = store.load(self.work, "promoted", tables.Promoted, "cpu")
        if self.config.stats is None:
            statistics = Statistics.learn(scan.ads, scan.ages, promoted)
        else:
            statistics = Statistics.load(self.config.stats)
        store.save(self.work, "ads", Ads.build(scan.ads.ad, promoted, statistics, self.buckets))
        store.save(self.work, "ages", transform.Ages.build(statistics))
        statistics.save(self.out / "statistics")
        absent = promoted.lookup.find(scan.ads.ad) < 0
        del promoted
        rows = chunk_rows(self.config, store.size(self.work))
        nulls = {split: self.write(scan, split, rows) for split in SPLITS}
        self.spec.save(self.out / MARKER)
        report = self.report(scan, nulls)
        report["ads_not_promoted"] = {"ads": int(absent.sum()), "rows": int(scan.ads.rows[absent].sum())}
        shutil.rmtree(self.work)
        (self.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def read_tables(self) -> None:
        """Each table is written and dropped before the next is read."""
        block = self._block_bytes()
        with self._stage("events") as done:
            events, geo = tables.read_events(self.files["events"], self.engine, block, self.buckets)
            store.save(self.work, "events", events)
            store.save(self.work, "geo", geo)
            done["rows"] = len(events.document) - 1
            del events, geo
        with self._stage("documents") as done:
            documents = tables.read_documents(self.files["documents_meta"], self.engine, block, self.buckets)
            store.save(self.work, "documents", documents)
            done["rows"] = len(documents.source) - 1
        with self._stage("promoted_content") as done:
            promoted = tables.read_promoted(self.files["promoted_content"], self.engine, block, documents)
            store.save(self.work, "promoted", promoted)
            done["rows"] = len(promoted.ad_id) - 1
            del documents, promoted
        for kind in layout.ATTRIBUTES:
            with self._stage(kind) as done:
                attributes = tables.read_attributes(self.files[f"documents_{kind}"], kind, self.engine, block)
                store.save(self.work, kind, attributes)
                done["rows"] = len(attributes.attribute)
                del attributes

    def scan_clicks(self) -> Scan:
        path, config = self.files["clicks_train"], self.config
        with self._stage("clicks") as done:
            tasks = (
                clicks.Task(block, i, self.work, config.seed, config.device)
                for i, block in enumerate(csv_io.blocks(path, layout.CLICKS, self._block_bytes()))
            )
            scan = Scan.merge(self.engine.map(clicks.scan, tasks))
            done["rows"] = scan.rows("train") + scan.rows("test")
            clicks.sort_by_display(scan, "test", self.work)
        if not done["rows"]:
            raise InputError(f"{path}: expected at least one row after the header")
        return scan

    def write(self, scan: Scan, split: str, rows: int) -> dict[str, int]:
        """Transforms the rows of a split into its shards; returns nulls by feature."""
        config, grouped = self.config, split == "test"
        common = {
            "work": self.work,
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
        )
        with self._stage(f"transform {split}") as done, writer:
            for columns, missing in self.engine.map(transform.run, transform.tasks(scan, split, rows, **common)):
                writer.append(columns)
                for name, count in missing.items():
                    nulls[name] = nulls.get(name, 0) + count
            done["rows"] = writer.rows
            writer.finish(
                statistics={"rows": scan.rows(split), "clicks": scan.clicks[split]}, provenance=self._provenance()
            )
        return nulls

    def report(self, scan: Scan, nulls: dict[str, dict[str, int]]) -> dict[str, Any]:
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
        peak = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "rows": sum(s["rows"] for s in splits.values()),
            **splits,
            "ads_not_promoted": {},
            "missing_files": [f"{name}.csv" for name, path in self.files.items() if path is None],
            "stages": self.stages,
            "peak_process_bytes": max(peak),
            **self._provenance(),
        }

    def _block_bytes(self) -> int:
        """Bytes of CSV a task: parsing needs several times as much, so a tight memory limit makes them smaller."""
        limit = self.config.memory_limit
        if limit is None:
            return csv_io.BLOCK_BYTES
        return max(1 << 16, min(csv_io.BLOCK_BYTES, limit // (32 * self.config.workers)))

    def _provenance(self) -> dict[str, Any]:
        """Nothing here depends on the machine's clock or paths: the same input gives the same manifest."""
        return {
            "flavour": self.config.flavour,
            "seed": self.config.seed,
            "statistics": "learned" if self.config.stats is None else "given",
            "inputs": {p.name: p.stat().st_size for p in self.files.values() if p is not None},
            "input_rows": {name: int(stage["rows"]) for name, stage in self.stages.items() if " " not in name},
            "versions": {
                "widedeep": widedeep.__version__,
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                "xxhash": xxhash.VERSION,
                "python": platform.python_version(),
            },
        }

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, float]]:
        """Times a stage; the block puts its number of `rows` into the yielded dict."""
        stage: dict[str, float] = {"rows": 0}
        start = time.perf_counter()
        yield stage
        stage["seconds"] = time.perf_counter() - start
        stage["rows_per_second"] = stage["rows"] / max(stage["seconds"], 1e-9)
        self.stages[name] = stage
        log.info(
            "%-18s %12d rows  %8.1f s  %11.0f rows/s", name, stage["rows"], stage["seconds"], stage["rows_per_second"]
        )
