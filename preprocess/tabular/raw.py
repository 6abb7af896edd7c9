"""Rows of raw files as the inputs of a model, with columns of theirs to go beside its predictions."""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from preprocess import inputs
from preprocess.engine import Engine
from preprocess.tabular import source
from preprocess.tabular.columns import single
from preprocess.tabular.config import TabularConfig
from preprocess.tabular.encoder import Encoder
from preprocess.tabular.source import Chunk
from preprocess.tabular.transforms import are_strange
from widedeep.errors import InputError

log = logging.getLogger(__name__)


class RawBatch(NamedTuple):
    """ids: [B, K] int32, -1 for padding.   numeric: [B, N] float32.   kept: B rows of the columns that are kept."""

    ids: np.ndarray
    numeric: np.ndarray
    kept: pa.Table

    def piece(self, start: int, stop: int | None) -> "RawBatch":
        """The rows from `start` to before `stop`, without a copy."""
        rows = slice(start, stop)
        return RawBatch(self.ids[rows], self.numeric[rows], self.kept[rows])


def raw_batches(
    encoder: Encoder, paths: Sequence[str], keep: Sequence[str], rows: int, engine: Engine
) -> Iterator[RawBatch]:
    """The rows of files in their order as `encoder` makes them, `rows` at a time, at the end what is left.

    Args:
        paths: files and directories as `preprocess tabular` takes them; they may lack the label and the group.
        keep: columns of the files: of CSV files the texts as they stand, of others values of the file's type. NaN, and
            in CSV an empty field and `\\N`, are nulls.
    Raises:
        InputError: a file is missing or malformed, lacks a column or changes meanwhile; a value does not fit; a kept
            column holds lists, or not the same type in all files; there are no rows.

    A warning at the end names a vocabulary that holds hardly any of the values.
    """
    columns = list(dict.fromkeys([*encoder.columns, *keep]))
    parts: list[RawBatch] = []
    schema, total, known = None, 0, {name: np.zeros(2, np.int64) for name in encoder.vocabularies}
    files = inputs.files_of(paths)
    with inputs.unchanged(files):
        for chunk in source.chunks(files, columns, engine, TabularConfig.chunk_bytes, csv=encoder.csv_of):
            kept = _kept(chunk, keep)
            schema = schema or kept.schema
            kept = _alike(chunk, kept, schema)
            encoded = encoder.encode(chunk)
            for name, counts in known.items():
                counts += np.count_nonzero(encoded[name].rows > 0), np.count_nonzero(encoded[name].present)
            parts.append(RawBatch(*encoder.join(encoded, len(chunk.rows)), kept))
            total += len(chunk.rows)
            if sum(len(part.ids) for part in parts) >= rows:
                joined = _join(parts)
                whole = len(joined.ids) // rows * rows
                yield from (joined.piece(start, start + rows) for start in range(0, whole, rows))
                parts = [joined.piece(whole, None)]
        if not total:
            raise InputError(f"{files[0]}: expected rows, and there are none")
        if len((rest := _join(parts)).ids):
            yield rest
    for name, counts in known.items():
        hits, values = counts.tolist()
        if are_strange(hits, values):
            told = "%s: %d of %d values occur among those learned from train rows; is the spelling the same?"
            log.warning(told, name, hits, values)


def _kept(chunk: Chunk, keep: Sequence[str]) -> pa.Table:
    arrays = {}
    for name in keep:
        with chunk.blame(name):
            column = single(chunk.columns[name])
        arrays[name] = column.values.take(pa.array(column.codes, mask=column.codes < 0))
    return pa.table(arrays)


def _alike(chunk: Chunk, kept: pa.Table, first: pa.Schema) -> pa.Table:
    """With the types of the first file. Texts may have others, as pandas and polars write them, but nothing else."""
    for place, field in enumerate(first):
        kind = kept.schema.field(place).type
        if kind == field.type:
            continue
        if not (_are_texts(kind) and _are_texts(field.type)):
            told = f"expected {field.type}, as in the first file, found {kind}"
            raise InputError(f"{chunk.of(field.name)}: {told}")
        kept = kept.set_column(place, field, kept.column(place).cast(field.type))
    return kept


def _are_texts(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _join(parts: Sequence[RawBatch]) -> RawBatch:
    if len(parts) == 1:
        return parts[0]
    ids, numeric, kept = zip(*parts)
    return RawBatch(np.concatenate(ids), np.concatenate(numeric), pa.concat_tables(kept))
