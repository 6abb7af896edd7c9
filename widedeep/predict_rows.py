"""Predictions of a checkpoint for rows that are in no data set, as they are encoded, with columns of their own beside
them."""

from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from widedeep.config import TrainConfig
from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.evaluate import open_model
from widedeep.feature_spec import FeatureSpec
from widedeep.predict import check_name, predicted, write
from widedeep.run import Run, tell

ADDED = ("prob", "logit")


def predict_rows(
    config: TrainConfig,
    comm: LocalComm,
    directory: Path,
    spec: FeatureSpec,
    batches: Iterable[tuple[np.ndarray, np.ndarray, pa.Table]],
    out: str | Path,
) -> int:
    """Writes the predictions of a checkpoint for encoded rows; returns their number.

    Columns: those that came with the rows, then prob float32 and logit float32. The file appears under its name when it
    is whole.

    Args:
        spec: of the ids and numbers.
        batches: ids [B, K] int32, -1 for padding; numeric [B, N] float32; and a table of B rows, or of no columns.
    Raises:
        InputError: as `predict_checkpoint`; there are several processes; the model was trained on other features; or a
            column that came with the rows is called as one that is added.
        RunError: as `predict_checkpoint`.
    """
    check_name(out := Path(out))
    if comm.world > 1:
        raise InputError(f"--rows: expected one process, got {comm.world}; what several can score is a data set")
    run = open_model(config, comm, directory, spec)
    check_features(spec, run.spec, directory)
    tables = (table(run, *batch) for batch in batches)
    first = next(tables)
    rows = write(out, first.schema, chain([first], tables))
    tell(comm, f"{out}: {rows} rows by {directory}")
    return rows


def table(run: Run, ids: np.ndarray, numeric: np.ndarray, kept: pa.Table) -> pa.Table:
    """The columns of one batch."""
    if taken := [name for name in ADDED if name in kept.column_names]:
        raise InputError(f"--keep {taken[0]}: expected another column: predictions have one of that name")
    B, device = len(ids), run.comm.device
    inputs = torch.from_numpy(ids).to(device), torch.from_numpy(numeric).to(device)
    logit = run.step.predict(Batch(*inputs, torch.zeros(B, device=device), None, 0, B))
    return pa.table(dict(zip([*kept.column_names, *ADDED], [*kept.columns, *predicted(logit)])))


def check_features(data: FeatureSpec, trained: FeatureSpec, model: Path) -> None:
    """Raises InputError where the columns that one spec names are not those of a model of the other."""
    found, expected = (
        [f"{f.name} ({f.cardinality} ids, {f.hotness} in a row)" for f in spec.categorical] + list(spec.numeric_names)
        for spec in (data, trained)
    )
    for ours, theirs in zip_longest(found, expected, fillvalue="no further feature"):
        if ours != theirs:
            raise InputError(f"{data.directory}: expected the features of {model}, with {theirs}, found {ours} there")
