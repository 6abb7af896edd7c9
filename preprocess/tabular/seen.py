"""What a sample of rows holds of one column, as far as a proposal asks."""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from preprocess.tabular.columns import BadCell, Column, Lists

# No value, where all other texts are numbers; in small letters.
NULL_WORDS = frozenset(["", "na", "n/a", "nan", "null", "none", "?", "-"])
NULL_WORDS |= {sign + word for sign in ("", "+", "-") for word in ("inf", "infinity")}
SEPARATORS = "|;"
_INTEGER = re.compile(r"-?[0-9]{1,19}")


@dataclass
class Seen:
    """The values of a column with their counts, and what they are alike.

    Attributes:
        fault: why the values cannot be read; empty if they can.
        counts: rows by text; for lists elements by text.
        rows: all of them; `nulls` of them have no value.
        words: the part of `counts` that means no value if the column is one of numbers.
        are_numbers: whether all texts but `words` are numbers; `are_whole` whether these have no fractions.
        low, total, high: of the numbers.
        lengths: lists by length; empty for a column of one value a row.
    """

    fault: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    nulls: int = 0
    words: Counter[str] = field(default_factory=Counter)
    are_numbers: bool = True
    are_whole: bool = True
    low: float = np.inf
    total: float = 0.0
    high: float = -np.inf
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, values: Column | Lists) -> None:
        """Take in the column of a chunk."""
        self.rows += len(values)
        self.nulls += int((values.codes < 0).sum())
        if isinstance(values, Lists):
            self.lengths.update(values.lengths[values.codes[values.codes >= 0]].tolist())
            values = values.chosen_elements(np.ones(len(values), bool))
        counts = values.counts(np.ones(len(values), bool))
        try:
            texts = values.texts
        except BadCell as error:
            self.fault = str(error)
            return
        for code in np.flatnonzero(counts).tolist():
            self.counts[texts[code]] += int(counts[code])
            if self.are_numbers and texts[code].strip().lower() in NULL_WORDS:
                self.words[texts[code]] += int(counts[code])
        if self.are_numbers:
            self._measure(values.without(frozenset(self.words)))

    def _measure(self, values: Column) -> None:
        try:
            numbers = values.numbers()
        except BadCell:
            self.are_numbers = False
            return
        numbers = numbers[~np.isnan(numbers)]
        if len(numbers):
            self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
            self.total += float(numbers.sum())
            self.are_whole = self.are_whole and bool((numbers == np.trunc(numbers)).all())

    @property
    def numbers(self) -> int:
        """Distinct numbers; 0 for a column of texts."""
        return len(self.counts) - len(self.words) if self.are_numbers else 0

    @property
    def number_rows(self) -> int:
        """Rows that hold a number, if it is a column of numbers."""
        return self.rows - self.nulls - self.words.total()

    @property
    def numbers_the_rows(self) -> bool:
        """Whether the values are consecutive integers, each there once."""
        return self.are_whole and 0 < self.numbers == self.rows == self.high - self.low + 1

    @property
    def are_int64(self) -> bool:
        """Whether every value is an integer of 64 bits, written as one."""
        return all(_INTEGER.fullmatch(text.strip()) and -(2**63) <= int(text) < 2**63 for text in self.counts)

    @property
    def separator(self) -> str | None:
        """A character that splits at least three values in ten."""
        for separator in SEPARATORS:
            if sum(separator in text for text in self.counts) > 0.3 * max(1, len(self.counts)):
                return separator
        return None
