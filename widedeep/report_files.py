"""The files of a run's results directory, as its report wants them."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from widedeep.errors import InputError
from widedeep.logs import EVALUATION_FILE, METRICS_FILE
from widedeep.report_checks import ARGUMENTS, DATA, DLLL_LINE, EVALUATION, RECORD, Fields, checked

DLLL = "DLLL "


@dataclass
class RunFiles:
    """What was found in a results directory. Records are in the order of steps, one for each step."""

    name: str
    training: list[dict[str, Any]] = field(default_factory=list)  # {"step", "seconds", "loss", ...}
    # {"step", "epoch", "seconds", "loss_val", ...}; "epoch" only of a training, not of evaluations alone
    validation: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read(directory: Path) -> RunFiles:
    """Read what there is of metrics.jsonl (or the log), evaluation, baselines, data_summary and args, all .json.

    Raises:
        InputError: there are neither logs nor an evaluation, or a file is damaged.
    """
    files = RunFiles(name=directory.resolve().name)
    files.arguments = _read_object(directory / "args.json", ARGUMENTS, files.missing)
    records = _read_records(directory, files)
    of_training = [record for record in records if len(record["step"]) == 2]  # step, of how many
    files.training = _by_step(of_training, "loss")
    epochs = _with_epochs(of_training, files.arguments.get("num_epochs"))
    files.validation = epochs or _by_step(records, "loss_val")  # of evaluations alone
    files.evaluation = _read_object(directory / EVALUATION_FILE, EVALUATION, files.missing)
    files.data = _read_object(directory / "data_summary.json", DATA, files.missing)
    files.baselines = _read_object(directory / "baselines.json", {}, [])
    if not records and not files.evaluation:
        what = f"expected a run's results, {METRICS_FILE} or {EVALUATION_FILE}, and"
        found = f"{METRICS_FILE} holds no record yet" if (directory / METRICS_FILE).is_file() else "found neither"
        raise InputError(f"{directory}: {what} {found}")
    return files


def _read_object(path: Path, fields: Fields, missing: list[str]) -> dict[str, Any]:
    """A JSON object; {} for a file that is not there, whose name goes to `missing`."""
    if not path.is_file():
        missing.append(path.name)
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return checked(value, fields, str(path))


def _read_records(directory: Path, files: RunFiles) -> list[dict[str, Any]]:
    """Records with a step, as metrics.jsonl has them; from the DLLL log where that file is not there."""
    table, log = directory / METRICS_FILE, directory / str(files.arguments.get("log_filename", "log.json"))
    path = table if table.is_file() else log
    if not path.is_file():
        files.missing.append(f"{METRICS_FILE} and {log.name}")
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected lines of JSON in UTF-8: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        record = _parse(line) if path == table else _parse_dlll(line, where)
        if _has_step(record):
            records.append(checked(record, RECORD, where))
    return records


def _has_step(record: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Neither a summary nor arguments."""
    return bool(record and isinstance(record.get("step"), list) and record["step"])


def _parse(line: str) -> dict[str, Any] | None:
    """None for the torn line of a killed run."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parse_dlll(line: str, where: str) -> dict[str, Any] | None:
    """The record as metrics.jsonl has it; None for other lines."""
    record = _parse(line.removeprefix(DLLL))
    if not record or record.get("type") != "LOG":
        return None
    data, seconds = record.get("data"), checked(record, DLLL_LINE, where).get("elapsedtime", 0)
    return {"step": record.get("step"), "seconds": seconds} | (data if isinstance(data, dict) else {})


def _with_epochs(records: list[dict[str, Any]], epochs: int | None) -> list[dict[str, Any]]:
    """The evaluations of a training, with `epoch`; None where it cannot be told.

    epochs: of the run. A log may begin in its middle, and totals differ after a resumption with other epochs.
    """
    steps = _steps_per_epoch(records, epochs)
    return [
        record | {"epoch": round(record["step"] / steps) if steps else None} for record in _by_step(records, "loss_val")
    ]


def _steps_per_epoch(records: list[dict[str, Any]], epochs: int | None) -> float | None:
    """By the evaluations, of which each ends an epoch; where there is only one, by the total of the last record."""
    of_learning = [record["step"] for record in records if "loss" in record or "loss_val" in record]  # no benchmarks
    ends = {record["step"][0] for record in records if "loss_val" in record}
    if len(ends) > 1:
        return math.gcd(*ends)
    return of_learning[-1][1] / epochs if of_learning and epochs else None


def _by_step(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Records that have `name`, in the order of steps; of a step that a resumed run repeated, the later record."""
    found = {
        record["step"][0]: record | {"step": record["step"][0]} for record in records if record.get(name) is not None
    }
    return [found[step] for step in sorted(found)]
