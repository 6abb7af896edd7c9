"""What a run of the tabular preprocessing is told."""

from dataclasses import dataclass, field
from pathlib import Path

from preprocess.config import DataSetConfig
from widedeep.errors import InputError


@dataclass(frozen=True)
class TabularConfig(DataSetConfig):
    """Settings, with those of `DataSetConfig`.

    Args:
        spec: feature spec with transforms (see `preprocess.tabular.spec`).
        out: directory to write; an earlier data set there is replaced when the new one is complete.
        inputs: CSV or TSV (plain, .gz, .zst; with a header unless the spec names the columns), Parquet (.parquet, .pq)
            or Arrow files (.arrow, .feather, .ipc), in any mixture, or directories of such; empty takes the `train`
            files of the spec.
        test: files of the test set, likewise; empty takes the spec's, unless `split` makes the test set from `inputs`.
        split: "random:0.2" (a share of the rows), "last:1000" or "last:0.2" (rows at the end), "group:0.2" (a share of
            the groups, whole ones), "time:COLUMN:0.2" (the share of the rows with the latest times) or
            "time:COLUMN:2016-06-26" (rows from that time on), or "none" (all rows are for training); None with `test`
            files.
        stats: directory of the `statistics` of an earlier run to apply instead of learning them. Then test files alone
            may lack the label and the group: they can be scored.
        seed: of random and group splits.
        chunk_bytes: bytes of CSV worked on at a time. The output does not depend on it.
    """

    spec: str | Path
    out: str | Path
    inputs: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    split: str | None = None
    stats: str | Path | None = None
    seed: int = 0
    chunk_bytes: int = 16 << 20

    def __post_init__(self):
        super().__post_init__()
        self._check_counts("chunk_bytes")
        if self.split is not None and self.test:
            raise InputError("expected either a split or test files, got both")
        if self.split is not None and not self.inputs:
            raise InputError("split: expected input files to split, got none")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, expected 0 to 2^63 - 1")
