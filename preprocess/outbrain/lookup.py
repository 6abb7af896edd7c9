"""From a key to the row of a table."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from preprocess import kernels
from preprocess.csv_io import MAX_ID
from widedeep.errors import InputError

# A direct-address array may have this many slots a key, plus a few megabytes for tiny tables of large ids.
_SLOTS_A_KEY, _FREE_SLOTS = 8, 1 << 20


@dataclass(frozen=True)
class Lookup:
    """Row numbers by key, direct-address where keys are dense (`keys` is empty), else by binary search.

    Args:
        keys: [n] int32 ascending, or [0].
        slots: direct: [largest key + 2] int32, row of each key or -1, the last slot -1; else [n] int32, row of keys[i].
    """

    keys: Any
    slots: Any

    @classmethod
    def build(cls, keys: np.ndarray) -> "Lookup":
        """keys: [n] int, each >= 0 and distinct (see `first_duplicate`); row i is that of keys[i]."""
        largest = int(keys.max()) if len(keys) else -1
        if largest + 2 <= _SLOTS_A_KEY * len(keys) + _FREE_SLOTS:
            slots = np.full(largest + 2, -1, np.int32)
            slots[keys] = np.arange(len(keys), dtype=np.int32)
            return cls(np.empty(0, np.int32), slots)
        order = np.argsort(keys, kind="stable")
        return cls(keys[order].astype(np.int32), order.astype(np.int32))

    def find(self, keys: Any, xp: ModuleType = np) -> Any:
        """[n] int, -1 for null -> [n] row, -1 where the key is null or unknown; int32 on a GPU, else intp, to which
        every indexing would convert it.

        Columns carry one more element than rows, the null, so that `column[row]` needs no test for -1.
        """
        if xp is not np:
            return kernels.find(keys, self.keys, self.slots, xp)
        if len(self.keys) == 0:
            return np.take(self.slots, np.minimum(keys, len(self.slots) - 1)).astype(np.intp)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.slots[at], np.intp(-1))


def first_duplicate(keys: np.ndarray) -> int | None:
    """The first row whose key stands in an earlier row; None if all are distinct."""
    if len(keys) < 2 or (keys[1:] > keys[:-1]).all():
        return None
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    repeats = order[1:][ordered[1:] == ordered[:-1]]
    return int(repeats.min()) if len(repeats) else None


def fresh_publishers(publisher: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Ids that no publisher has: the largest + 1 + place, [n] int >= 0 -> [n] int32.

    Raises:
        InputError: there are no ids left above the largest.
    """
    largest, room = int(publisher.max()), MAX_ID - 1 - int(place.max())
    if largest > room:
        raise InputError(
            f"documents_meta.csv: column publisher_id: expected at most {room}, so that there are ids for the documents"
            f" without a publisher, found {largest}"
        )
    return (largest + 1 + place).astype(np.int32)


def with_null(column: np.ndarray, null: int) -> np.ndarray:
    """[n] -> [n + 1]: the null stands last, where row -1 finds it."""
    return np.append(column, column.dtype.type(null))
