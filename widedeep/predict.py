"""Predictions of a checkpoint, row by row in the order of the data, to a Parquet or CSV file."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor

from widedeep import atomic
from widedeep.config import TrainConfig
from widedeep.data import Reader
from widedeep.dist import LocalComm
from widedeep.errors import InputError, RunError
from widedeep.evaluate import open_scored, scored
from widedeep.run import Run, tell
from widedeep.shard_manifest import is_labelled, name_of

WRITERS = {".parquet": pyarrow.parquet.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}


def predict_checkpoint(config: TrainConfig, comm: LocalComm, directory: Path, split: str, out: str | Path) -> int:
    """Writes the predictions of a checkpoint for a split; returns the number of rows.

    Columns: label int8 where the data has labels, prob float32, logit float32 and, where it has groups, the group
    int64 under its own name. The file appears under its name when it is whole; of several processes the first one
    writes.

    Raises:
        InputError: `out` ends in neither .parquet nor .csv, or cannot be written.
        RunError: the disk is full, or a logit is not finite.
    """
    check_name(out := Path(out))
    run, reader = open_scored(config, comm, directory, split)
    columns = schema(reader)
    batches = tables(run, reader, columns)
    rows = write(out, columns, batches) if comm.rank == 0 else sum(len(table) for table in batches)
    tell(comm, f"{out}: {rows} rows by {directory}")
    return rows


def check_name(out: Path) -> None:
    """Raises InputError where a file of that name cannot be written."""
    if out.suffix not in WRITERS:
        raise InputError(f"{out}: expected a name that ends in .parquet or .csv")


def write(out: Path, columns: pa.Schema, batches: Iterator[pa.Table]) -> int:
    """Writes tables one after the other to a temporary file, then renames it; returns the number of rows.

    Raises:
        InputError: `out` cannot be written, or is a CSV file and a column holds bytes that are no text.
        RunError: the disk is full.
    """
    rows = 0
    with (
        atomic.write_errors(out),
        atomic.file(out) as partial,
        open(partial, "wb") as file,  # pyarrow would pass over an error of its own file's close
        WRITERS[out.suffix](file, columns) as writer,
    ):
        for table in batches:
            try:
                writer.write_table(table)
            except pa.ArrowInvalid as error:
                told = f"expected no bytes but texts, for a CSV file ({error}); a .parquet file takes them"
                raise InputError(f"{out}: {told}") from error
            rows += len(table)
    return rows


def schema(reader: Reader) -> pa.Schema:
    """Raises InputError where the column of the groups has the name of another."""
    columns = {"label": pa.int8(), "prob": pa.float32(), "logit": pa.float32()}
    group = name_of("group", reader.shards.columns)
    if group in columns:
        raise InputError(f"{reader.shards.directory}: the groups are called {group!r}, as a column of predictions is")
    if not is_labelled(reader.shards.manifest):
        del columns["label"]
    return pa.schema(columns | ({group: pa.int64()} if group else {}))


def tables(run: Run, reader: Reader, columns: pa.Schema) -> Iterator[pa.Table]:
    """One table for each batch."""
    for logit, label, group in scored(run, reader):
        values = [*predicted(logit), *([] if group is None else [pa.array(group.cpu().numpy())])]
        if "label" in columns.names:
            values = [pa.array(label.to(torch.int8).cpu().numpy()), *values]
        yield pa.Table.from_arrays(values, schema=columns)


def predicted(logit: Tensor) -> tuple[pa.Array, pa.Array]:
    """Columns prob and logit of a batch. Raises RunError where a logit is not finite."""
    if bad := int((~logit.isfinite()).sum()):
        raise RunError(f"prediction: {bad} of {len(logit)} logits are not finite: the model has diverged")
    return pa.array(torch.sigmoid(logit).cpu().numpy()), pa.array(logit.cpu().numpy())
