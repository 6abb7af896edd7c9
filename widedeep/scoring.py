"""Metrics of a file of predictions: CSV or Parquet in, a table or one JSON object out."""

import csv
import io
import json as jsonlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from widedeep.errors import InputError
from widedeep.metrics import score_rows
from widedeep.metrics_calibration import normalized_entropy
from widedeep.outputs import metric_text, metrics_note, plain

# Keras clips float32 probabilities to [1e-7, 1 - 1e-7] and adds 1e-7 inside each logarithm (BinaryCrossentropy). These
# are the smallest arguments of log(p) and log(1 - p) that come of it: a bound on a row's loss, and nothing else.
LEAST_P = float(np.float32(1e-7)) + 1e-7
LEAST_1_MINUS_P = 1 - float(np.float32(1 - 1e-7)) + 1e-7
# A column without any value has the type null; its first row is then at fault, not its type.
IS_NUMERIC = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null)
OF_GROUPS = ("groups", "multi_click_groups", "map", "map_all", "gauc")
NO_GROUPS = "MAP and group AUC need --group, the column of what is ranked together"


class Predictions(NamedTuple):
    prob: Tensor  # [B] float64, in [0, 1]
    label: Tensor  # [B] uint8, 0 or 1
    group: Tensor | None  # [B] int64: equal where the file's group column is


def run(
    predictions: str | Path, label: str, score: str, group: str | None = None, k: int = 12, json: bool = False
) -> int:
    """Print the metrics of a predictions file; the exit code.

    Args:
        predictions: a .csv (or .csv.gz, .csv.zst) or .parquet file.
        label, score, group: names of its columns: clicked or not, probability of a click, what is ranked together.
        k: ranks that count in MAP.
        json: print one JSON object instead of a table.
    Raises:
        InputError: the file cannot be read, lacks a column, or holds a value that does not fit.
    """
    if k < 1:
        raise InputError(f"--k: expected a whole number above 0, got {k}")
    result = metrics_of(read_predictions(Path(predictions), label, score, group), k)
    print(jsonlib.dumps(plain(result)) if json else _as_text(result, k))
    return 0


def metrics_of(rows: Predictions, k: int) -> dict[str, float | int | None]:
    """`rows`, `groups`, `multi_click_groups`, `click_rate`, `mean_probability`, `logloss`, `normalized_entropy`,
    `accuracy`, `auc`, `auc_200`, `auc_8000`, `map`, `map_all` and `gauc`, as the command prints them.

    Ranking and the exact AUC use the probabilities as they are in the file (ties in MAP go by the order of rows);
    thresholds are compared with their float32 values. Without groups what is of groups is None. `map` counts the first
    click of a group, as the original does, `map_all` every one.
    """
    result = score_rows(rows.prob, rows.prob, rows.label, rows.group, k)
    grouped, loss = rows.group is not None, log_loss(rows.prob, rows.label)
    return {
        "rows": result["rows"],
        "groups": result["groups"] if grouped else None,
        "multi_click_groups": result["multi_click_groups"] if grouped else None,
        "click_rate": result["click_rate"],
        "mean_probability": result["mean_probability"],
        "logloss": loss,
        "normalized_entropy": normalized_entropy(loss, result["click_rate"]),
        "accuracy": result["binary_accuracy"],
        "auc": result["auc"],
        "auc_200": result["auc_200"],
        "auc_8000": result["auc_8000"],
        "map": result["map"] if grouped else None,
        "map_all": result["map_all"] if grouped else None,
        "gauc": result["gauc"] if grouped else None,
    }


def log_loss(prob: Tensor, label: Tensor) -> float:
    """Mean of -log(p) of clicks and -log(1 - p) of other rows, in nats; a row adds at most 15.4, as in Keras."""
    likelihood = torch.where(label > 0, prob.clamp(min=LEAST_P), (1 - prob).clamp(min=LEAST_1_MINUS_P))
    return -likelihood.log().mean().item()


def read_predictions(path: Path, label: str, score: str, group: str | None = None) -> Predictions:
    """Read the named columns of a CSV file with a header line, or of a Parquet file, and check every value.

    Raises:
        InputError: names the file, the column and the row.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a CSV or Parquet file, and there is none")
    names = [name for name in dict.fromkeys((label, score, group)) if name is not None]
    table = _read_parquet(path, names) if _is_parquet(path) else _read_csv(path, names, {*names} - {label, score})
    if table.num_rows == 0:
        raise InputError(f"{path}: expected rows of predictions, and there are none")
    column = {name: _Column(table[name], name, path) for name in names}
    prob, clicked = column[score].numbers(), column[label].numbers()
    column[score].check((prob >= 0) & (prob <= 1), prob, "a probability in [0, 1]")
    column[label].check((clicked == 0) | (clicked == 1), clicked, "a label of 0 or 1")
    groups = None if group is None else torch.from_numpy(column[group].codes())
    return Predictions(torch.from_numpy(prob), torch.from_numpy(clicked.astype(np.uint8)), groups)


class _Column:
    """One column of the file, and the words for what is wrong with it."""

    def __init__(self, values: pa.ChunkedArray, name: str, path: Path):
        self.values, self.name, self.path = values, name, path

    def numbers(self) -> np.ndarray:
        """[B] float64; InputError at the first value that is missing or no number."""
        kind = self.values.type
        if pa.types.is_dictionary(kind):
            self.values = self.values.cast(kind.value_type)
        if str(self.values.type) == "string_view":
            self.values = self.values.cast(pa.string())
        if pa.types.is_string(self.values.type) or pa.types.is_large_string(self.values.type):
            self.values = _parse(self.values, self._fail)
        kind = self.values.type
        if not any(is_kind(kind) for is_kind in IS_NUMERIC):
            raise InputError(f"{self.path}: column {self.name!r}: expected numbers, got the type {kind}")
        if self.values.null_count:
            self._fail(int(np.argmax(self.values.is_null().to_numpy())), "a number", "no value")
        return self.values.cast(pa.float64()).to_numpy().copy()

    def codes(self) -> np.ndarray:
        """[B] int64: the integers themselves, or a number for each distinct text."""
        if self.values.null_count:
            self._fail(int(np.argmax(self.values.is_null().to_numpy())), "a group id", "no value")
        if pa.types.is_integer(self.values.type):
            return self.values.to_numpy().astype(np.int64)
        if pa.types.is_nested(self.values.type):
            raise InputError(f"{self.path}: column {self.name!r}: expected group ids, got the type {self.values.type}")
        coded = pc.dictionary_encode(self.values.combine_chunks())
        return coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)

    def check(self, is_right: np.ndarray, values: np.ndarray, wanted: str) -> None:
        """InputError at the first row that is not right."""
        if not is_right.all():
            row = int(np.argmin(is_right))
            self._fail(row, wanted, f"{values[row]:.9g}")

    def _fail(self, row: int, wanted: str, got: str) -> None:
        where = f"row {row + 1}" if _is_parquet(self.path) else f"line {_line_of_row(self.path, row)}"
        raise InputError(f"{self.path}: {where}, column {self.name!r}: expected {wanted}, got {got}")


def _parse(values: pa.ChunkedArray, fail) -> pa.ChunkedArray:
    """Text as float64; `fail(row, wanted, got)` at the first that is no number."""
    values = pc.utf8_trim_whitespace(values)
    try:
        return pc.cast(values, pa.float64())
    except pa.ArrowInvalid:
        for row, text in enumerate(values):
            try:
                text.cast(pa.float64())
            except pa.ArrowInvalid:
                fail(row, "a number", repr(text.as_py()))
        raise


def _read_parquet(path: Path, names: list[str]) -> pa.Table:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_names(path, names, file.schema_arrow.names)
            return file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file: {_first_line(error)}") from error


def _read_csv(path: Path, names: list[str], texts: set[str]) -> pa.Table:
    """texts: columns that are not numbers, whatever they look like: long ids would be rounded."""
    from pyarrow import csv as pa_csv

    try:
        with _open(path) as file:
            header = file.readline()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not header.strip():
        raise InputError(f"{path}: expected a header line with the names of columns, and the file is empty")
    try:
        # Threads of the reader may still be starting when a refusal ends the process, which then aborts.
        alone = pa_csv.ReadOptions(use_threads=False)
        columns = pa_csv.read_csv(pa.py_buffer(header.rstrip(b"\r\n") + b"\n"), alone).column_names
        _check_names(path, names, columns)
        try:
            return _parse_csv(path, names, dict.fromkeys(texts, pa.string()))
        except pa.ArrowInvalid as error:
            if "conversion error" not in str(error):
                raise
        # A later block of the file breaks the type that the first one promised (0 and 1, then 0.5): no promise, then.
        return _parse_csv(path, names, dict.fromkeys(names, pa.string()))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line 1: expected a header line in UTF-8") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except pa.ArrowInvalid as error:
        text = re.sub(
            r"CSV parse error: (?:Row #(\d+): )?", lambda m: f"line {m[1]}: " if m[1] else "", _first_line(error)
        )
        raise InputError(f"{path}: {text}") from error


def _parse_csv(path: Path, names: list[str], types: dict[str, pa.DataType]) -> pa.Table:
    """One thread: only then does an error name its line."""
    from pyarrow import csv as pa_csv

    # Only an empty field is no value: a group may be called NA.
    convert = pa_csv.ConvertOptions(
        include_columns=names, column_types=types, null_values=[""], strings_can_be_null=True
    )
    return pa_csv.read_csv(
        path,
        pa_csv.ReadOptions(use_threads=False),
        pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=convert,
    )


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read: {_first_line(error)}")


def _open(path: Path) -> io.BufferedReader:
    """The bytes of a text file; of a compressed one (.gz, .zst, .bz2) those that it holds."""
    return io.BufferedReader(pa.input_stream(str(path)))


def _is_parquet(path: Path) -> bool:
    return path.suffix in (".parquet", ".pq")


def _line_of_row(path: Path, row: int) -> int:
    """Line (from 1) of a CSV file where data row `row` (from 0) begins: the header and empty lines are no rows."""
    with io.TextIOWrapper(_open(path), encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file)
        line, rows = 1, -1
        for record in reader:
            rows += bool(record)
            if rows > row:
                break
            line = reader.line_num + 1
    return line


def _check_names(path: Path, names: list[str], columns: list[str]) -> None:
    for name in names:
        if columns.count(name) != 1:
            found = "it stands there twice" if name in columns else f"there are only {', '.join(columns)}"
            raise InputError(f"{path}: expected one column {name!r}; {found}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _as_text(result: dict[str, float | int | None], k: int) -> str:
    """A table for people, and below it why a metric is missing or undefined."""
    from rich.console import Console
    from rich.table import Table

    names = {
        "rows": "rows",
        "groups": "groups",
        "multi_click_groups": "groups of several clicks",
        "click_rate": "click rate",
        "mean_probability": "mean probability",
        "logloss": "log loss",
        "normalized_entropy": "normalized entropy",
        "accuracy": "accuracy",
        "auc": "AUC",
        "auc_200": "AUC, 200 thresholds",
        "auc_8000": "AUC, 8000 thresholds",
        "map": f"MAP@{k}, the first click of each group",
        "map_all": f"MAP@{k}, all clicks",
        "gauc": "group AUC",
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, value in result.items():
        table.add_row(names[key], metric_text(value, "," if isinstance(value, int) else ".9f"))
    console = Console(width=60)
    with console.capture() as captured:
        console.print(table)
    grouped = result["groups"] is not None
    notes = metrics_note(value for key, value in result.items() if grouped or key not in OF_GROUPS)
    return "\n".join([captured.get().rstrip("\n"), *([] if grouped else [NO_GROUPS]), *notes])
