"""What a feature spec is made of: its features, and the files that hold them."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from widedeep.errors import InputError

MAPPINGS = ("train", "test")
STATISTICS = "statistics"  # in a data set, the directory of what preprocessing learned
CHUNK_TYPES = ("csv", "parquet", "shards")
COMBINERS = ("sum", "mean")
MAX_CARDINALITY = 2**31 - 1  # ids are int32 in a batch


@dataclass(frozen=True)
class CategoricalFeature:
    """A feature with one table: `hotness` ids a row, each in [0, cardinality), or -1 where a list is shorter.

    A feature of dim 0 takes part in the wide part only: it has a weight for each id, and a table without columns.

    Raises:
        InputError: cardinality or hotness is no integer of at least 1, or dim none of at least 0.
    """

    name: str
    cardinality: int
    dim: int
    hotness: int = 1
    combiner: str = "sum"
    transform: Any = None
    multi_hot: bool = False
    dtype: str | None = None

    def __post_init__(self):
        for size, low in (("cardinality", 1), ("dim", 0), ("hotness", 1)):
            value = getattr(self, size)
            if not isinstance(value, Integral) or value < low:
                raise InputError(f"feature {self.name!r}: {size}: expected an integer >= {low}, got {value!r}")
            object.__setattr__(self, size, int(value))  # of NumPy's integers, which neither YAML nor torch takes


@dataclass(frozen=True)
class NumericFeature:
    """One float column."""

    name: str
    transform: Any = None
    dtype: str | None = None


@dataclass(frozen=True)
class SourceChunk:
    """Files that hold some columns of every row of a mapping; `files` are relative to the spec's directory."""

    type: str
    features: tuple[str, ...]
    files: tuple[str, ...]


def default_dim(cardinality: int) -> int:
    """Dim of a feature that states none: 16 below 32 rows, 64 below 50,000, else 128 (the original's on Outbrain)."""
    if cardinality < 32:
        return 16
    return 64 if cardinality < 50_000 else 128
