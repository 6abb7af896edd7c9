"""Which rows are test rows: a rule of the row's place or group, the same in every pass."""

import re
from dataclasses import dataclass

import numpy as np
import xxhash

from preprocess import hashing
from preprocess.tabular.columns import Column
from widedeep.errors import InputError

KINDS = ("random", "last", "group")


@dataclass(frozen=True)
class Split:
    """`kind` and amount: a share in (0, 1), or for "last" also a number of rows."""

    kind: str
    amount: float
    seed: int

    @classmethod
    def parse(cls, text: str, seed: int) -> "Split":
        """From "random:0.2", "last:1000", "last:0.2" or "group:0.2"."""
        match = re.fullmatch(r"(\w+):(\d+|\d*\.\d+)", text)
        if not match or match[1] not in KINDS:
            raise InputError(f"split: expected random:SHARE, last:ROWS, last:SHARE or group:SHARE, got {text!r}")
        amount = float(match[2])
        if not 0 < amount < 1 and (match[1] != "last" or amount < 1):
            raise InputError(f"split: expected a share between 0 and 1, got {text!r}")
        return cls(match[1], amount, seed)

    def first_test_row(self, total: int) -> int:
        """Of a "last" split of `total` rows. InputError when nothing would be left to train on."""
        test = int(self.amount) if self.amount >= 1 else round(total * self.amount)
        if test >= total:
            raise InputError(f"split: expected fewer than the {total} rows there are, got last:{test}")
        return total - test

    def is_test(self, rows: np.ndarray, group: Column | None, total: int | None) -> np.ndarray:
        """[n] bool; rows [n] int64 are row numbers over all inputs."""
        if self.kind == "last":
            return rows >= self.first_test_row(total)
        if self.kind == "random":
            return hashing.is_selected(rows, self.amount, self.seed)
        digests = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in group.texts], np.uint64)
        return group.take(hashing.is_selected(digests.view(np.int64), self.amount, self.seed), False)
