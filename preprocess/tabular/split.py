"""Which rows are test rows: a rule of the row's place, group or time, the same in every pass."""

import re
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from preprocess import hashing
from preprocess.tabular.columns import BadCell, Column, Lists, single
from preprocess.tabular.transforms import Sample
from widedeep.errors import InputError

FORMS = "random:SHARE, last:ROWS, last:SHARE, group:SHARE, time:COLUMN:SHARE or time:COLUMN:FIRST"


class Split:
    """A rule. `column` is the source column it looks at; those that `surveys` see all rows once before the first pass.

    survey(rows, columns)                rows [n] int64 are row numbers over all inputs, columns those of a chunk
    is_test(rows, columns) -> [n] bool   raises BadCell
    """

    column: str | None = None
    surveys = False

    def survey(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> None:
        raise TypeError(f"{type(self).__name__} needs no survey")


class Random(Split):
    def __init__(self, share: float, seed: int):
        self._share, self._seed = share, seed

    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        return hashing.is_selected(rows, self._share, self._seed)


class Group(Split):
    def __init__(self, share: float, seed: int, column: str):
        self._share, self._seed, self.column = share, seed, column

    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        group = single(columns[self.column])
        digests = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in group.texts], np.uint64)
        return group.take(hashing.is_selected(digests.view(np.int64), self._share, self._seed), False)


class Last(Split):
    """The rows at the end: a number of them, or a share."""

    surveys = True

    def __init__(self, amount: float):
        self._amount, self._total = amount, 0

    def survey(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> None:
        self._total += len(rows)

    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        test = int(self._amount) if self._amount >= 1 else round(self._total * self._amount)
        if test >= self._total:
            raise InputError(f"split: expected fewer than the {self._total} rows there are, got last:{test}")
        return rows >= self._total - test


class Time(Split):
    """The rows from a time on: `first`, or the time from which a share of the rows lies.

    Times are numbers, or dates with or without a time of day (ISO 8601, without a zone); one kind in all rows. The time
    of a share is exact up to 262,144 rows, else of the sample that `transforms.Sample` draws.
    """

    def __init__(self, column: str, share: float | None, first: str | None):
        self.column, self._share = column, share
        self.surveys = share is not None
        self._sample = Sample()
        self._kind: str | None = None
        self._first: float | None = None
        self._given: str | None = None  # `first`, until a row has shown that it is of the rows' kind
        if first is not None:
            try:
                self._first = float(self._times(Column.of(pa.array([first])))[0])
            except BadCell as error:
                raise InputError(f"split: time:{column}: {error}") from error
            self._given = first

    def survey(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> None:
        self._sample.add(self._times(columns[self.column]), np.ones(len(rows), bool), rows)

    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        if self._first is None:
            times = np.sort(self._sample.values())
            self._first = float(times[-max(round(len(times) * self._share), 1)])
            if self._first == times[0]:
                raise InputError(
                    f"split: column {self.column}: expected rows before the test rows, found one time only"
                )
        return self._times(columns[self.column]) >= self._first

    def _times(self, values: Column | Lists) -> np.ndarray:
        """[n] float64: numbers as they are, dates as microseconds."""
        column = single(values)
        if (column.codes < 0).any():
            raise BadCell(int((column.codes < 0).argmax()), "a time", None)
        if self._given is not None and len(column):
            self._check_given(column)
        if self._kind is None:
            self._kind = "number" if _is_number(column) else "date"
        if self._kind == "number":
            return column.numbers()
        return column.take(_dates(column), np.nan)

    def _check_given(self, column: Column) -> None:
        """Raise InputError if the first row's time is of the other kind: then the flag is wrong and not the row."""
        first = Column.of(column.values.take(pa.array(column.codes[:1])))
        other, is_other = ("date", _is_date) if self._kind == "number" else ("number", _is_number)
        if is_other(first):
            expected = f"a {other} as in the rows ({first.texts[0]!r})"
            raise InputError(f"split: time:{self.column}: expected {expected}, got {self._given!r}")
        self._given = None


def parse(text: str, seed: int, group: str | None) -> Split:
    """The rule of a text such as "random:0.2"; group: the source column of the groups.

    Raises:
        InputError: the text has none of the forms, or a share is not between 0 and 1.
    """
    kind, _, rest = text.partition(":")
    if kind == "time":
        column, _, first = rest.partition(":")
        if not column or not first:
            raise InputError(f"split: expected {FORMS}, got {text!r}")
        is_share = re.fullmatch(r"0?\.\d+", first) is not None and float(first) > 0
        return Time(column, float(first), None) if is_share else Time(column, None, first)
    if kind not in ("random", "last", "group") or not re.fullmatch(r"\d+|\d*\.\d+", rest):
        raise InputError(f"split: expected {FORMS}, got {text!r}")
    amount = float(rest)
    if not 0 < amount < 1 and (kind != "last" or amount < 1):
        raise InputError(f"split: expected a share between 0 and 1, got {text!r}")
    if kind == "group":
        return Group(amount, seed, group)
    return Last(amount) if kind == "last" else Random(amount, seed)


def _is_number(column: Column) -> bool:
    if pa.types.is_temporal(column.values.type):
        return False
    try:
        column.numbers()
    except BadCell:
        return False
    return True


def _is_date(column: Column) -> bool:
    try:
        _dates(column)
    except BadCell:
        return False
    return True


def _dates(column: Column) -> np.ndarray:
    """[distinct values] float64."""
    expected = "a time such as 2016-06-14 or 2016-06-14 12:00:00, as in the rows before"
    kind = pa.timestamp("us")
    values = column.values if pa.types.is_temporal(column.values.type) else column.values.cast(pa.string())
    try:
        dates = pc.cast(values, kind, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        dates = [_date(text, kind) for text in column.texts]
        if None in dates:
            code = dates.index(None)
            raise BadCell(int((column.codes == code).argmax()), expected, column.texts[code]) from None
        return np.array(dates, np.float64)
    return dates.cast(pa.int64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _date(text: str, kind: pa.DataType) -> int | None:
    try:
        return pa.scalar(text).cast(kind).value
    except pa.ArrowInvalid:
        return None
