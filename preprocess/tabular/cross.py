"""Feature crosses: a categorical feature whose ids stand for combinations of other features' ids.

With the id i of each crossed feature, in the order of the spec, and its cardinality n:

    exact     (i1 * n2 + i2) * n3 + i3 and so on: every combination has an id of its own
    hashed    `hashing.tuple_buckets` of (i1, i2, i3)

A cross is exact where all combinations fit: without a cardinality, or with one of at least n1 * n2 * n3. So the spec of
a finished data set, in which every feature has its cardinality, makes the same ids. Padding (-1) of any crossed feature
is padding of the cross.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preprocess import hashing
from widedeep.errors import InputError

# A row for every combination, occurring or not: beyond this the wide part alone (a weight and two slots of its
# optimizer) takes more than 192 MiB, which should be asked for by a cardinality.
LIMIT = 1 << 24


class Cross:
    """Ids of combinations, of features that have been encoded. It learns nothing beyond what the crossed ones do.

    Args:
        field: names the cross in messages.
        encoders: those of the crossed features, by name and in order.
        cardinality: as the spec has it; None: one id for each combination.
        seed: of the hash.
    Raises:
        InputError: there are more than LIMIT combinations and no cardinality. `cardinality` raises it too, since some
            sizes are known only after pass 1.
    """

    learns = False

    def __init__(self, field: str, encoders: Mapping[str, Any], cardinality: int | None, seed: int):
        self._field, self._encoders, self._fixed, self._seed = field, dict(encoders), cardinality, seed
        self._check([e.cardinality for e in encoders.values() if not e.learns])

    @property
    def cardinality(self) -> int:
        sizes = self._sizes()
        self._check(sizes)
        return self._fixed or math.prod(sizes)

    def state(self) -> dict:
        """What the ids depend on beyond the spec, to be compared by --stats."""
        hashed_to = self._buckets()
        return {"sizes": dict(zip(self._encoders, self._sizes()))} if hashed_to is None else {"hashed_to": hashed_to}

    def ids(self, crossed: Sequence[np.ndarray]) -> np.ndarray:
        """The ids [n] of each crossed feature, -1 for padding -> [n] int64, -1 for padding."""
        if (buckets := self._buckets()) is None:
            ids = crossed[0].astype(np.int64)
            for more, size in zip(crossed[1:], self._sizes()[1:]):
                ids = ids * size + more
        else:
            ids = hashing.tuple_buckets(crossed, buckets, self._seed).astype(np.int64)
        for part in crossed:
            ids[part < 0] = -1
        return ids

    def _buckets(self) -> int | None:
        """What combinations are hashed into; None where each has an id of its own."""
        return None if self._fixed is None or math.prod(self._sizes()) <= self._fixed else self._fixed

    def _sizes(self) -> list[int]:
        return [encoder.cardinality for encoder in self._encoders.values()]

    def _check(self, sizes: list[int]) -> None:
        if self._fixed is None and math.prod(sizes) > LIMIT:
            told = f"{' x '.join(map(str, sizes))} combinations are more than {LIMIT}"
            raise InputError(f"{self._field}.cardinality: expected one, by which combinations are hashed: {told}")
