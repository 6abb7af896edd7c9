"""Directories of TFRecords to shards: records are read in the order of their files, and features get today's names."""

import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import inputs
from preprocess.config import DataSetConfig
from preprocess.engine import make
from preprocess.outbrain.layout import FEB_2021_NAMES as NAMES
from preprocess.stages import Stages, Watched
from preprocess.tfrecord import records
from widedeep import __version__, atomic
from widedeep.errors import InputError
from widedeep.feature_spec import MAPPINGS, FeatureSpec
from widedeep.shards import DATA_SET_OUTPUT, ShardWriter

FOLDERS = {"train": "train", "test": "eval"}


@dataclass(frozen=True)
class TFRecordConfig(DataSetConfig):
    """Settings, with those of `DataSetConfig`.

    Args:
        data_path: directory with the directories `train` and `eval` of files `part-*`.
        out: directory to write; an earlier data set there is replaced when the new one is complete.
    """

    data_path: str | Path
    out: str | Path


def run(config: TFRecordConfig) -> dict[str, Any]:
    """Write `config.out`: feature_spec.yaml (the Outbrain spec), train/, test/, report.json.

    Returns:
        The report: by split records, rows and positive rate; features that were left out; stages; seconds.
    Raises:
        InputError: a directory, a record or a value is not as expected, or a file changes meanwhile; names file and
            record.
        RunError: the disk is full, or a worker was lost.
    """
    started = time.perf_counter()
    spec = FeatureSpec.outbrain()
    files = {mapping: _files(Path(config.data_path) / folder) for mapping, folder in FOLDERS.items()}
    reads = [*chain.from_iterable(files.values())]
    report: dict[str, Any] = {}
    left_out: set[str] = set()
    stages = Stages()
    with (
        atomic.directory(Path(config.out), DATA_SET_OUTPUT, reads) as out,
        make(config.engine, config.workers, out, scheduler=config.scheduler) as engine,
        inputs.unchanged(reads),
    ):
        engine.check_sees([out, *reads])
        for mapping in MAPPINGS:
            count, positive = 0, 0
            total = sum(path.stat().st_size for path in files[mapping])
            writer = ShardWriter(
                out / mapping,
                spec,
                rows_per_shard=config.rows_per_shard,
                numeric=config.numeric,
                group=True,
                final=Path(config.out) / mapping,
            )
            with writer, stages.stage(mapping, total) as stage:
                reading = Watched(engine, stage, _rows, lambda span: span.stop - span.start)
                for place, columns, others in chain.from_iterable(
                    reading.map(partial(_read, spec=spec), chain.from_iterable(map(records.spans, files[mapping])))
                ):
                    left_out |= others
                    _append(writer, columns, place)
                    count, positive = count + 1, positive + int(columns[spec.label].sum())
                writer.finish(provenance=_provenance(config, files[mapping]))
            rate = positive / writer.rows if writer.rows else None
            report[mapping] = {"records": count, "rows": writer.rows, "positive_rate": rate}
        spec.save(out / "feature_spec.yaml")
        report |= {"left_out": sorted(left_out), "stages": stages.to_dict(), "seconds": time.perf_counter() - started}
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _files(directory: Path) -> list[Path]:
    files = sorted(path for path in directory.glob("part-*") if path.is_file())
    if not files:
        raise InputError(f"{directory}: expected TFRecord files part-*, found none")
    return files


def _read(span: records.Span, spec: FeatureSpec) -> list[tuple[str, dict[str, np.ndarray], set[str]]]:
    """Of each record its place, its columns, and the names of its features that the spec does not know."""
    return [
        (place, _columns(place, features, spec), features.keys() - NAMES.values())
        for place, features in records.read(span)
    ]


def _rows(parsed: list[tuple[str, dict[str, np.ndarray], set[str]]]) -> int:
    return sum(len(next(iter(columns.values()))) for _, columns, _ in parsed)


def _columns(place: str, features: dict[str, np.ndarray], spec: FeatureSpec) -> dict[str, np.ndarray]:
    """The columns of the spec, each checked: there, of the right type, and of one length in all."""
    rows = len(features.get(NAMES[spec.label], ()))
    integers = {*spec.names, spec.group}
    columns = {}
    for name in (*spec.names, *spec.numeric_names, spec.label, *([spec.group] if spec.group else [])):
        values = features.get(NAMES[name])
        if values is None:
            raise InputError(f"{place}: expected the feature {NAMES[name]}, found {', '.join(features)[:200]}")
        if name in integers and values.dtype.kind != "i":
            raise InputError(f"{place}: feature {NAMES[name]}: expected integers, found floats")
        if len(values) != rows:
            found = f"found {len(values)} and {rows}"
            raise InputError(f"{place}: features {NAMES[name]} and {NAMES[spec.label]}: expected one length, {found}")
        columns[name] = values
    return columns


def _append(writer: ShardWriter, columns: dict[str, np.ndarray], place: str) -> None:
    try:
        writer.append(columns)
    except InputError as error:
        raise InputError(f"{place}: {str(error).removeprefix(f'{writer.directory}: ')}") from error


def _provenance(config: TFRecordConfig, files: list[Path]) -> dict[str, Any]:
    program = f"widedeep {__version__} preprocess tfrecord"
    return {"program": program, "data_path": str(config.data_path), "files": [path.name for path in files]}
