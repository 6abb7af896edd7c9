"""What `transform` in a feature spec may say, and the arithmetic behind it: learned on train rows, saved, applied.

Every encoder has `learn(values, chosen, rows)` for pass 1, `state()` and `load(state)` for the statistics file, and an
apply function for pass 2. Statistics do not depend on how the rows were cut into chunks.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import xxhash

from preprocess import hashing
from preprocess.tabular.columns import BadCell, Column

SAMPLE_ROWS = 1 << 18  # values a quantile is taken from; exact for fewer rows
Values = frozenset[str | int | float]
WORDS = frozenset(["true", "false", "yes", "no"])  # labels that mean the same in capitals
LARGEST = 1e150  # to learn from: a larger number is a mistake, beside which all others would be standardised to one
UNIT = 1126  # 2^-UNIT is the last of 53 bits of the smallest number there is
EXACT_ROWS = 1 << 16
EXPECTED, STRANGE = 100, 0.01  # known values, and the share of them that is so low that a warning is due


class Hash:
    """xxh3_64(UTF-8 text, seed) mod cardinality; a missing value has the bucket of `hashing.null_bucket`."""

    learns = False

    def __init__(self, cardinality: int, seed: int):
        self.cardinality = cardinality
        self._seed = seed
        self._null = hashing.null_bucket(cardinality, seed)

    def ids(self, column: Column) -> np.ndarray:
        buckets = hashing.string_buckets(column.texts, self.cardinality, self._seed)
        return column.take(buckets.astype(np.int64), self._null)


def are_strange(known: int, expected: float) -> bool:
    """Whether a vocabulary knows hardly any of the values that it was expected to know: they are spelled otherwise."""
    return expected >= EXPECTED and known < STRANGE * expected


class Vocabulary:
    """Values by falling count, from id 1 (equal counts by their text); id 0 for missing, rare and unseen ones."""

    learns = True

    def __init__(self, min_count: int, cardinality: int | None):
        self._min_count = min_count
        self._fixed = cardinality
        self._counts: Counter[str] = Counter()
        self._ids: dict[str, int] = {}

    @property
    def cardinality(self) -> int:
        return self._fixed or len(self._ids) + 1

    def learn(self, column: Column, chosen: np.ndarray, rows: np.ndarray) -> None:
        counts = column.counts(chosen)
        for code in np.flatnonzero(counts).tolist():
            self._counts[column.texts[code]] += int(counts[code])

    def finish(self) -> None:
        kept = [(-n, text) for text, n in self._counts.items() if n >= self._min_count]
        kept = sorted(kept)[: None if self._fixed is None else self._fixed - 1]
        self._ids = {text: i for i, (_, text) in enumerate(kept, 1)}

    def state(self) -> dict:
        return {"values": list(self._ids)}

    def load(self, state: dict) -> None:
        self._ids = {text: i for i, text in enumerate(state["values"], 1)}

    def ids(self, column: Column) -> np.ndarray:
        return column.take(np.array([self._ids.get(text, 0) for text in column.texts], np.int64), 0)


class Buckets:
    """Id 1 + the number of edges <= x, so that bucket i is [edge i - 1, edge i); id 0 for a missing value."""

    def __init__(self, edges: list[float] | None, quantiles: int, cardinality: int | None):
        self.learns = edges is None
        self._fixed = cardinality
        self._edges = np.array([] if edges is None else edges, np.float64)
        self._quantiles = quantiles
        self._sample = Sample()

    @property
    def cardinality(self) -> int:
        return self._fixed or len(self._edges) + 2

    def learn(self, column: Column, chosen: np.ndarray, rows: np.ndarray) -> None:
        self._sample.add(column.numbers(), chosen, rows)

    def finish(self) -> None:
        values = self._sample.values()
        # A cardinality given in the spec leaves room for this many edges.
        quantiles = self._quantiles if self._fixed is None else min(self._quantiles, self._fixed - 1)
        levels = np.arange(1, quantiles) / quantiles
        edges = np.unique(np.quantile(values, levels, method="inverted_cdf")) if values.size else np.empty(0)
        # An edge at the smallest value has nothing below it.
        self._edges = edges[edges > values.min()] if values.size else edges

    def state(self) -> dict:
        return {"edges": self._edges.tolist()}

    def load(self, state: dict) -> None:
        self._edges = np.array(state["edges"], np.float64)

    def ids(self, column: Column) -> np.ndarray:
        numbers = column.numbers()
        return np.where(np.isnan(numbers), 0, 1 + np.searchsorted(self._edges, numbers, side="right"))


class Ids:
    """The column holds ids already, in [0, cardinality); -1 and a missing value are padding."""

    learns = False

    def __init__(self, cardinality: int):
        self.cardinality = cardinality

    def ids(self, column: Column) -> np.ndarray:
        high = self.cardinality - 1
        return column.integers(-1, high, -1, f"an id of 0 to {high}")


class Label:
    """1 for the positive values, 0 for the negative ones, or for all others where none are given; without positive
    values, the column holds 0 and 1.

    positive, negative: texts, and numbers, which mean every spelling of them; so do the texts of `WORDS`.
    is_strict: whether a value that is neither is refused where there are negative ones; else `others` counts them, and
    `other` is the first.
    """

    learns = False

    def __init__(self, positive: Values | None, negative: Values = frozenset()):
        self.positive, self.negative = positive, negative
        self.is_strict, self.others, self.other = True, 0, ""

    def apply(self, column: Column) -> np.ndarray:
        """[n] uint8."""
        column.refuse_nulls("a label")
        if self.positive is None:
            return column.integers(0, 1, None, "a label of 0 or 1").astype(np.uint8)
        texts = column.texts
        positive = np.array([stands_in(self.positive, text) for text in texts], np.uint8)
        if self.negative:
            strange = [not one and not stands_in(self.negative, text) for one, text in zip(positive, texts)]
            if (rows := column.take(np.array(strange, bool), False)).any():
                row = int(rows.argmax())
                found = texts[column.codes[row]]
                if self.is_strict:
                    given = ", ".join(map(repr, sorted({*map(str, self.positive | self.negative)})))
                    raise BadCell(row, f"a label of the spec ({given})", found)
                self.others, self.other = self.others + int(rows.sum()), self.other or found
        return column.take(positive, 0)


def stands_in(values: Values, text: str) -> bool:
    """Whether a label is among the values of a spec."""
    if text in values or number_of(text) in values:
        return True
    word = word_of(text)
    return word is not None and any(word_of(value) == word for value in values if isinstance(value, str))


def word_of(text: str) -> str | None:
    """The one of `WORDS` that a text is, whatever its capitals; programs write them differently."""
    word = text.strip().lower()
    return word if word in WORDS else None


def number_of(text: str) -> int | float | None:
    """The finite number that a text is."""
    # Python takes more than the numbers of other columns are: 1_0, and the digits of other scripts.
    if "_" in text or not text.strip().isascii():
        return None
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if kind is int or math.isfinite(number) else None
    return None


class Group:
    """The column's integers, or with `hashed` the xxh3-64 of its texts without the sign bit."""

    learns = False

    def __init__(self, hashed: bool, seed: int):
        self._hashed, self._seed = hashed, seed

    def apply(self, column: Column) -> np.ndarray:
        """[n] int64."""
        if not self._hashed:
            return column.integers(-(2**63), 2**63 - 1, None, "an integer, or `hash` in its transform")
        column.refuse_nulls("a group")
        digests = [xxhash.xxh3_64_intdigest(text.encode(), self._seed) >> 1 for text in column.texts]
        return column.take(np.array(digests, np.int64), 0)


class Number:
    """fill, then clip, log and standardise, in that order.

    log is sign(x) ln(1 + |x|). standardise subtracts the mean and divides by the standard deviation (of the population)
    of what comes before it; a constant column becomes 0.
    """

    def __init__(self, fill: float | str | None, clip: tuple[float, float] | None, log: bool, standardise: bool):
        self._fill_rule = fill
        self._fill = None if isinstance(fill, str) else fill
        self._clip, self._log, self._standardise = clip, log, standardise
        self.learns = standardise or isinstance(fill, str)
        self._sample = Sample()
        self._nulls = 0
        self._raw, self._shaped = Moments(), Moments()
        self._mean, self._deviation = 0.0, 1.0

    def learn(self, column: Column, chosen: np.ndarray, rows: np.ndarray) -> None:
        numbers = self._checked(column)
        held = np.flatnonzero(chosen & ~np.isnan(numbers))
        present = numbers[held]
        self._nulls += int(chosen.sum()) - len(present)
        learned = [(self._raw, present)] if self._fill_rule == "mean" else []
        learned += [(self._shaped, self._shape(present))] if self._standardise else []
        for moments, values in learned:
            if (beyond := np.abs(values) > LARGEST).any():
                first = int(beyond.argmax())
                raise BadCell(int(held[first]), f"a number from {-LARGEST:g} to {LARGEST:g}", present[first])
            moments.add(values)
        if self._fill_rule == "median":
            self._sample.add(numbers, chosen, rows)

    def finish(self) -> None:
        if isinstance(self._fill_rule, str):
            values = self._sample.values()
            median = float(np.quantile(values, 0.5, method="inverted_cdf")) if values.size else 0.0
            self._fill = self._raw.mean() if self._fill_rule == "mean" else median
        if self._standardise:
            if self._nulls:
                self._shaped.add(self._shape(np.array([self._fill])), self._nulls)
            self._mean, self._deviation = self._shaped.mean(), self._shaped.deviation() or 1.0

    def state(self) -> dict:
        return {"fill": self._fill, "mean": self._mean, "deviation": self._deviation}

    def load(self, state: dict) -> None:
        self._fill, self._mean, self._deviation = state["fill"], state["mean"], state["deviation"]

    def apply(self, column: Column, stored: str) -> np.ndarray:
        """[n] of the type they are stored in, rounded to float32 on the way. Raises BadCell for what is beyond it."""
        numbers = self._checked(column)
        if self._fill is not None:
            numbers = np.where(np.isnan(numbers), self._fill, numbers)
        with np.errstate(over="ignore"):
            scaled = (self._shape(numbers) - self._mean) / self._deviation
            values = scaled.astype(np.float32).astype(stored, copy=False)
        if (beyond := ~np.isfinite(values)).any():
            row = int(beyond.argmax())
            when = " when standardised" if self._standardise else ""
            raise BadCell(row, f"a number that fits {stored}{when}", numbers[row])
        return values

    def _checked(self, column: Column) -> np.ndarray:
        numbers = column.numbers()
        if self._fill_rule is None and (missing := np.isnan(numbers)).any():
            raise BadCell(int(missing.argmax()), "a number, or a `fill` in its transform", None)
        return numbers

    def _shape(self, x: np.ndarray) -> np.ndarray:
        if self._clip is not None:
            x = np.clip(x, *self._clip)
        return np.sign(x) * np.log1p(np.abs(x)) if self._log else x


class Moments:
    """Mean and standard deviation, from exact sums and rounded once, so that chunking leaves no trace."""

    def __init__(self):
        # Integers: of values in units of 2^-UNIT, of squares in units of its square.
        self._count, self._sum, self._squares = 0, 0, 0

    def add(self, values: np.ndarray, times: int = 1) -> None:
        """Take in finite values, each `times` times."""
        self._count += len(values) * times
        for start in range(0, len(values), EXACT_ROWS):
            total, squares = _exact_sums(values[start : start + EXACT_ROWS])
            self._sum += total * times
            self._squares += squares * times

    def mean(self) -> float:
        return self._sum / (self._count << UNIT) if self._count else 0.0

    def deviation(self) -> float:
        """0 for a constant."""
        spread = self._count * self._squares - self._sum**2
        return math.isqrt(spread) / (self._count << UNIT) if self._count else 0.0


def _exact_sums(values: np.ndarray) -> tuple[int, int]:
    """What at most EXACT_ROWS finite values and their squares add up to, in the units of `Moments`."""
    fractions, exponents = np.frexp(values)
    places = exponents + (UNIT - 53)  # of the lowest of 53 bits, from 0
    whole = np.ldexp(fractions, 53).astype(np.int64)
    a, b, c = (limb.astype(np.float64) for limb in (whole >> 36, whole >> 18 & 0x3FFFF, whole & 0x3FFFF))
    total = _shifted(places, 1, (c, b, a))
    return total, _shifted(places, 2, (c * c, 2 * b * c, 2 * a * c + b * b, 2 * a * b, a * a))


def _shifted(places: np.ndarray, power: int, limbs: Sequence[np.ndarray]) -> int:
    """The sum of limbs[i] * 2^(18 i + power * place) over rows and i. Limbs are integers below 2^37, so that EXACT_ROWS
    of them add up exactly in float64."""
    result = 0
    for i, limb in enumerate(limbs):
        sums = np.bincount(places, limb)
        result += sum(int(sums[place]) << (18 * i + power * place) for place in np.flatnonzero(sums).tolist())
    return result


class Sample:
    """The values of the SAMPLE_ROWS rows whose hashes are smallest: a uniform sample that chunking does not change."""

    def __init__(self):
        self._hashes, self._values = np.empty(0, np.uint64), np.empty(0)

    def add(self, values: np.ndarray, chosen: np.ndarray, rows: np.ndarray) -> None:
        chosen = chosen & ~np.isnan(values)
        self._hashes = np.concatenate([self._hashes, hashing.hash_ids(rows[chosen])])
        self._values = np.concatenate([self._values, values[chosen]])
        if len(self._hashes) > SAMPLE_ROWS:
            kept = np.argpartition(self._hashes, SAMPLE_ROWS)[:SAMPLE_ROWS]
            self._hashes, self._values = self._hashes[kept], self._values[kept]

    def values(self) -> np.ndarray:
        return self._values
