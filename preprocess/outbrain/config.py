"""What a run of the Outbrain preprocessing is told."""

from dataclasses import dataclass
from pathlib import Path

from preprocess.engine import ENGINES
from preprocess.outbrain.flavours import FLAVOURS
from preprocess.xp import DEVICES
from widedeep.errors import InputError

NUMERIC_TYPES = ("float16", "float32")
DEFAULT_CHUNK_ROWS = {"cpu": 1 << 16, "cuda": 1 << 20}  # on a GPU some 50 launches a chunk, whatever its rows


@dataclass(frozen=True)
class OutbrainConfig:
    """Settings.

    Args:
        data_path: directory of the raw CSVs (plain, .gz or .zst).
        out: directory to write; an earlier data set there is replaced when the new one is complete.
        flavour: whose formulas; "nvtabular" or "spark".
        memory_limit: bytes that the run may use, or None; see `memory`.
        chunk_rows: click rows transformed at a time, or None: 65,536 ("cuda": 2^20), or what the memory limit allows.
        engine: "threads", "processes" or "dask". Output bytes depend neither on it, nor on workers, nor on chunk_rows.
        workers: of the engine; None: one a core; with "cuda" one a GPU, threads one a core.
        scheduler: address of a running dask cluster whose workers see the same files, with engine "dask".
        multihot: three multi-hot features more, and the embedding dims of the Oct-2022 release.
        stats: directory of the `statistics` of an earlier run to apply instead of learning them, or None.
        seed: of the 80/20 split of displays.
        numeric: storage type of the numeric features.
        rows_per_shard: rows of a shard file.
        device: "cpu" (numpy) or "cuda" (cupy).
    """

    data_path: str | Path
    out: str | Path
    flavour: str = "nvtabular"
    memory_limit: int | None = None
    chunk_rows: int | None = None
    engine: str = "threads"
    workers: int | None = None
    scheduler: str | None = None
    multihot: bool = False
    stats: str | Path | None = None
    seed: int = 0
    numeric: str = "float32"
    rows_per_shard: int = 1 << 22
    device: str = "cpu"

    def __post_init__(self):
        choices = {"flavour": FLAVOURS, "numeric": NUMERIC_TYPES, "device": DEVICES, "engine": ENGINES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
        if self.multihot and FLAVOURS[self.flavour].multihot_spec is None:
            raise InputError(f"multihot: expected flavour 'nvtabular', for {self.flavour!r} has no multi-hot features")
        for name in ("memory_limit", "chunk_rows", "workers", "rows_per_shard"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, expected 0 to 2^63 - 1")
        if not Path(self.data_path).is_dir():
            raise InputError(f"{self.data_path}: expected a directory of raw Outbrain CSV files")
