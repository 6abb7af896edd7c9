"""Which rows are test rows: a rule of the row's place, group or time, the same in every pass."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import xxhash

from preprocess import hashing
from preprocess.tabular import times
from preprocess.tabular.columns import BadCell, Column, Lists, single
from preprocess.tabular.transforms import Sample
from widedeep.errors import InputError

FORMS = "random:SHARE, last:ROWS, last:SHARE, group:SHARE, time:COLUMN:SHARE, time:COLUMN:FIRST or none"


class Split(ABC):
    """A rule. `column` is the source column it looks at; those that `surveys` see all rows once before the first pass.

    rows [n] int64 are row numbers over all inputs, columns those of a chunk.
    """

    column: str | None = None
    surveys = False

    def survey(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> None:  # noqa: B027 (most need none)
        """Takes note of rows before the first pass."""

    @abstractmethod
    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        """[n] bool. Raises BadCell."""


class AllTrain(Split):
    """None is a test row."""

    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        return np.zeros(len(rows), bool)


class Random(Split):
    def __init__(self, share: float, seed: int):
        self._share, self._seed = share, seed

    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        return hashing.is_selected(rows, self._share, self._seed)


class Group(Split):
    column: str

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

    Times are numbers, or dates of ISO 8601 with or without a time of day, or the same with a zone, which are compared
    as instants; one kind (see `times`) in all rows and in `first`. The time of a share is exact up to 262,144 rows,
    else of the sample that `transforms.Sample` draws.
    """

    column: str

    def __init__(self, column: str, share: float | None, first: str | None):
        self.column = column
        self.surveys = share is not None
        self._share = share or 0.0  # where there is no `first`
        self._sample = Sample()
        self._kind: str | None = None
        self._first: float | None = None
        self._given: str | None = None  # `first`, until a row has shown that it is of the rows' kind
        if first is not None:
            given = Column.of(pa.array([first]))
            try:
                self._kind = times.kind_of_first(given)
                self._first = float(times.read(given, self._kind)[0])
            except BadCell as error:
                raise InputError(f"split: time:{column}: {error}") from error
            self._given = first

    def survey(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> None:
        self._sample.add(self._times(columns[self.column]), np.ones(len(rows), bool), rows)

    def is_test(self, rows: np.ndarray, columns: Mapping[str, Column | Lists]) -> np.ndarray:
        if self._first is None:
            found = np.sort(self._sample.values())
            self._first = float(found[-max(round(len(found) * self._share), 1)])
            if self._first == found[0]:
                raise InputError(
                    f"split: column {self.column}: expected rows before the test rows, found one time only"
                )
        return self._times(columns[self.column]) >= self._first

    def _times(self, values: Column | Lists) -> np.ndarray:
        """[n] float64: numbers as they are, dates as microseconds."""
        column = single(values)
        column.refuse_nulls("a time")
        return times.read(column, self._settled(column)) if len(column) else np.empty(0)

    def _settled(self, column: Column) -> str:
        """The kind of the first row of all. Raises InputError if it is not that of `first`: the flag is wrong, not the
        row."""
        if self._kind is not None and self._given is None:
            return self._kind
        kind = times.kind_of_first(column)
        if self._given is not None and kind != self._kind:
            expected = f"{times.KINDS[kind]}, as in the rows ({column.texts[column.codes[0]]!r})"
            raise InputError(f"split: time:{self.column}: expected {expected}, got {self._given!r}")
        self._kind, self._given = kind, None
        return kind


def parse(text: str, seed: int, group: str | None) -> Split:
    """The rule of a text such as "random:0.2"; group: the source column of the groups.

    Raises:
        InputError: the text has none of the forms, or a share is not between 0 and 1.
    """
    if text == "none":
        return AllTrain()
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
    is_rows = kind == "last" and rest.isdigit() and amount >= 1
    if not 0 < amount < 1 and not is_rows:
        rows = " or a whole number of rows" if kind == "last" else ""
        raise InputError(f"split: expected a share between 0 and 1{rows}, got {text!r}")
    if kind == "group":
        assert group is not None  # without groups there is no such split
        return Group(amount, seed, group)
    return Last(amount) if kind == "last" else Random(amount, seed)
