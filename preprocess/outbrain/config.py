"""What a run of the Outbrain preprocessing is told."""

from dataclasses import dataclass
from pathlib import Path

from preprocess.config import DataSetConfig
from preprocess.outbrain.flavours import FLAVOURS
from preprocess.xp import DEVICES
from widedeep.errors import InputError

DEFAULT_CHUNK_ROWS = {"cpu": 1 << 16, "cuda": 1 << 20}  # on a GPU some 50 launches a chunk, whatever its rows


@dataclass(frozen=True)
class OutbrainConfig(DataSetConfig):
    """Settings, with those of `DataSetConfig`; `workers` None with device "cuda" is one a GPU, of threads one a core.

    Args:
        data_path: directory of the raw CSVs (plain, .gz or .zst).
        out: directory to write; an earlier data set there is replaced when the new one is complete.
        flavour: whose formulas; "nvtabular" or "spark".
        memory_limit: bytes that the run may use, or None; see `memory`.
        chunk_rows: click rows transformed at a time, or None: 65,536 ("cuda": 2^20), or what the memory limit allows.
            The output does not depend on it.
        multihot: three multi-hot features more, and the embedding dims of the Oct-2022 release.
        stats: directory of the `statistics` of an earlier run to apply instead of learning them, or None.
        seed: of the 80/20 split of displays.
        device: "cpu" (numpy) or "cuda" (cupy).
    """

    data_path: str | Path
    out: str | Path
    flavour: str = "nvtabular"
    memory_limit: int | None = None
    chunk_rows: int | None = None
    multihot: bool = False
    stats: str | Path | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        super().__post_init__()
        self._check_choices(flavour=FLAVOURS, device=DEVICES)
        self._check_counts("memory_limit", "chunk_rows")
        if self.multihot and FLAVOURS[self.flavour].multihot_spec is None:
            raise InputError(f"multihot: expected flavour 'nvtabular', for {self.flavour!r} has no multi-hot features")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, expected 0 to 2^63 - 1")
        if not Path(self.data_path).is_dir():
            raise InputError(f"{self.data_path}: expected a directory of raw Outbrain CSV files")
