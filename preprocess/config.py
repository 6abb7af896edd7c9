"""What every run that writes a data set is told."""

from collections.abc import Iterable
from dataclasses import dataclass

from preprocess.engine import ENGINES
from widedeep.errors import InputError

NUMERIC_TYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """Settings of the output and of the engine. The output bytes depend neither on the engine nor on its workers.

    Args:
        numeric: storage type of the numeric features, "float32" or "float16".
        rows_per_shard: rows of a shard file.
        engine: what works on the chunks: "threads", "processes" or "dask".
        workers: of the engine; None for one a core.
        scheduler: with engine "dask", the address of a running cluster, whose workers see the same files.
    """

    numeric: str = "float32"
    rows_per_shard: int = 1 << 22
    engine: str = "threads"
    workers: int | None = None
    scheduler: str | None = None

    def __post_init__(self):
        self._check_choices(numeric=NUMERIC_TYPES, engine=ENGINES)
        self._check_counts("rows_per_shard", "workers")

    def _check_choices(self, **choices: Iterable[str]) -> None:
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
