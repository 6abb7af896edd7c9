"""Multi-hot features: the first topics, entities and categories of the event page, hashed.

Source: the Oct-2022 release, which keeps the first three of a document in the order of the file, whatever their
confidence. It hashes codes of a vocabulary; raw ids are hashed here, which needs no vocabulary and loses nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.csv_io import NULL_INT

HOTNESS = 3


@dataclass(frozen=True)
class Lists:
    """ids: [D + 1, 3] int16 or int32 buckets, -1 = padding. Rows are those of `Attributes` of the same file, the last
    one, of unknown documents, empty."""

    ids: Any

    @classmethod
    def build(cls, documents: np.ndarray, buckets: np.ndarray) -> "Lists":
        """documents: [n] int32 >= 0, in any order; buckets: [n] int32, one an entry of the file."""
        order = np.argsort(documents, kind="stable")
        start = np.unique(documents[order], return_index=True)[1]
        length = np.diff(np.append(start, len(order)))
        narrow = np.int16 if len(order) == 0 or buckets.max() <= np.iinfo(np.int16).max else np.int32
        ids = np.full((len(start) + 1, HOTNESS), NULL_INT, narrow)
        for i in range(HOTNESS):
            row = np.flatnonzero(length > i)
            ids[row, i] = buckets[order[start[row] + i]]
        return cls(ids)
