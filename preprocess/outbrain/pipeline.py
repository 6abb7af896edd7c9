"""The run: tables, pass 1, statistics, pass 2, and the report."""

import dataclasses
import json
import logging
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

import widedeep
from preprocess import csv_io
from preprocess.engine import LocalEngine
from preprocess.outbrain import clicks, layout, memory, store, tables, transform
from preprocess.outbrain.ads import Ads
from preprocess.outbrain.clicks import SPLITS, Scan
from preprocess.outbrain.config import OutbrainConfig
from preprocess.outbrain.statistics import Statistics
from preprocess.stages import Stage, Stages
from widedeep import atomic
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardWriter

log = logging.getLogger(__name__)

REQUIRED = ("clicks_train", "events", "promoted_content")
OPTIONAL = ("documents_meta", *(f"documents_{kind}" for kind in layout.ATTRIBUTES))
MARKER = "feature_spec.yaml"


def run(config: OutbrainConfig) -> dict[str, Any]:
    """Writes `config.out`: feature_spec.yaml, train/, test/, statistics/, report.json.

    train keeps the input order (readers shuffle); test ascends by display_id, rows of a display in input order. Every
    click row lands in exactly one of them. The directory appears only when all of it is written.

    Returns:
        The report: rows, displays and click rate by split, nulls by feature, seconds and rows/s by stage, peak memory.
    Raises:
        InputError: a file is missing or malformed, or the memory limit is too small.
        RunError: the disk is full.
    """
    store.load.cache_clear()
    try:
        with atomic.directory(Path(config.out), MARKER) as out, LocalEngine(config.workers) as engine:
            return _Run(config, out, engine).all()
    finally:
        store.load.cache_clear()


class _Run:
    """One run: the paths, and what the stages leave for the report."""

    def __init__(self, config: OutbrainConfig, out: Path, engine: LocalEngine):
        self.config, self.out, self.engine = config, out, engine
        self.work = out / "work"
        self.work.mkdir()
        spec = FeatureSpec.outbrain("outbrain-multihot" if config.multihot else "outbrain")
        self.spec = dataclasses.replace(spec, metadata={"flavour": config.flavour})
        self.buckets = dict(zip(self.spec.names, self.spec.cardinalities))
        self.stages = Stages()
        self.files = {name: csv_io.find(config.data_path, name) for name in (*REQUIRED, *OPTIONAL)}
        for name, path in self.files.items():
            if path is None and name in REQUIRED:
                raise InputError(f"{Path(config.data_path) / name}.csv: the file is missing")
            if path is None:
                log.warning("%s.csv is missing: what it would give is null", Path(config.data_path) / name)
        self.block_bytes = memory.block_bytes(config, self.files)
        self.given = None if config.stats is None else Statistics.load(config.stats)

    def all(self) -> dict[str, Any]:
        self.read_tables()
        scan = self.scan_clicks()
        promoted = store.load(self.work, "promoted", tables.Promoted, "cpu")
        statistics = self.given or Statistics.learn(scan.ads, scan.ages, promoted)
        store.save(self.work, "ads", Ads.build(scan.ads.ad, promoted, statistics, self.buckets))
        store.save(self.work, "ages", transform.Ages.build(statistics))
        statistics.save(self.out / "statistics")
        absent = promoted.lookup.find(scan.ads.ad) < 0
        rows = memory.chunk_rows(self.config, store.size(self.work))
        nulls = {split: self.write(scan, split, rows) for split in SPLITS}
        self.spec.save(self.out / MARKER)
        report = self.report(scan, nulls, absent)
        shutil.rmtree(self.work)
        (self.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def read_tables(self) -> None:
        """Each table is written and dropped before the next is read."""
        block = self.block_bytes
        with self.stages.stage("events") as done:
            events, geo = tables.read_events(self.files["events"], self.engine, block, self.buckets)
            store.save(self.work, "events", events)
            store.save(self.work, "geo", geo)
            done.advance(len(events.document) - 1)
            del events, geo
        with self.stages.stage("documents") as done:
            documents = tables.read_documents(self.files["documents_meta"], self.engine, block, self.buckets)
            store.save(self.work, "documents", documents)
            done.advance(len(documents.source) - 1)
        with self.stages.stage("promoted_content") as done:
            promoted = tables.read_promoted(self.files["promoted_content"], self.engine, block, documents)
            store.save(self.work, "promoted", promoted)
            done.advance(len(promoted.ad_id) - 1)
            del documents, promoted
        for kind in layout.ATTRIBUTES:
            with self.stages.stage(kind) as done:
                buckets = self.buckets.get(layout.LISTS[kind])
                path = self.files[f"documents_{kind}"]
                attributes, lists = tables.read_attributes(path, kind, self.engine, block, buckets)
                store.save(self.work, kind, attributes)
                if lists is not None:
                    store.save(self.work, layout.LISTS[kind], lists)
                done.advance(len(attributes.attribute))
                del attributes, lists

    def scan_clicks(self) -> Scan:
        path, config = self.files["clicks_train"], self.config
        with self.stages.stage("clicks") as done:
            tasks = (
                clicks.Task(block, i, self.work, config.seed, config.device)
                for i, block in enumerate(csv_io.blocks(path, layout.CLICKS, self.block_bytes))
            )
            scan = Scan.merge(self._count(self.engine.map(clicks.scan, tasks), done))
            clicks.sort_by_display(scan, "test", self.work)
        if not done.rows:
            raise InputError(f"{path}: expected at least one row after the header")
        return scan

    @staticmethod
    def _count(scans: Iterator[Scan], stage: Stage) -> Iterator[Scan]:
        for scan in scans:
            stage.advance(sum(scan.rows(split) for split in SPLITS))
            yield scan

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
        with self.stages.stage(f"transform {split}", scan.rows(split)) as done, writer:
            for columns, missing in self.engine.map(transform.run, transform.tasks(scan, split, rows, **common)):
                writer.append(columns)
                done.advance(len(columns["clicked"]))
                for name, count in missing.items():
                    nulls[name] = nulls.get(name, 0) + count
            writer.finish(
                statistics={"rows": scan.rows(split), "clicks": scan.clicks[split]}, provenance=self._provenance()
            )
        return nulls

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
        return {
            "rows": sum(s["rows"] for s in splits.values()),
            **splits,
            "ads_not_promoted": {"ads": int(absent.sum()), "rows": int(scan.ads.rows[absent].sum())},
            "missing_files": [f"{name}.csv" for name, path in self.files.items() if path is None],
            "stages": self.stages.to_dict(),
            "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **self._provenance(),
        }

    def _provenance(self) -> dict[str, Any]:
        """Nothing here depends on the machine's clock or paths: the same input gives the same manifest."""
        return {
            "flavour": self.config.flavour,
            "seed": self.config.seed,
            "statistics": "learned" if self.config.stats is None else "given",
            "inputs": {p.name: p.stat().st_size for p in self.files.values() if p is not None},
            "input_rows": {name: stage.rows for name, stage in self.stages.done.items() if " " not in name},
            "versions": {
                "widedeep": widedeep.__version__,
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                "xxhash": xxhash.VERSION,
                "python": platform.python_version(),
            },
        }
