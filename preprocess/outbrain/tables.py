"""Reads events, promoted content and the document files into look-up tables."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import csv_io, hashing
from preprocess.csv_io import NULL_INT, NULL_TIME, Column, Strings
from preprocess.engine import Pool
from preprocess.outbrain import layout
from preprocess.outbrain.columns import Documents, Events, Geo, Promoted
from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.lists import Lists
from preprocess.outbrain.lookup import Lookup, first_duplicate, with_null
from preprocess.outbrain.similarity import Attributes
from widedeep.errors import InputError

_SLICE = 1 << 18  # rows


def read_table(path: Path, columns: Sequence[Column], engine: Pool, block_bytes: int) -> dict[str, Any]:
    """The whole file: {name: [n] array, or `Strings` over all blocks}."""
    parts = list(engine.map(partial(csv_io.read_block, columns=columns), csv_io.blocks(path, columns, block_bytes)))

    def joined(column: Column) -> Any:
        pieces = [part.pop(column.name) for part in parts]
        return csv_io.unify(pieces) if column.kind == "string" else np.concatenate([np.empty(0, column.dtype), *pieces])

    with ThreadPoolExecutor(engine.workers) as pool:
        return dict(zip((c.name for c in columns), pool.map(joined, columns)))


def sliced(function: Callable[..., np.ndarray], workers: int, *columns: np.ndarray) -> np.ndarray:
    """`function` of columns [n], a row of whose result depends on that row alone: in slices that a cache holds, by
    threads."""
    starts = range(0, max(len(columns[0]), 1), _SLICE)
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda start: function(*(column[start : start + _SLICE] for column in columns)), starts)
        return np.concatenate(list(parts))


def read_events(
    path: Path,
    engine: Pool,
    block_bytes: int,
    flavour: Flavour,
    buckets: dict[str, int],
    given: Any,
    seed: int,
) -> tuple[Events, Geo, dict[str, dict[str, int]]]:
    """buckets: feature name -> number of buckets; given: statistics to apply; seed: of the split of displays. The last
    result is for the statistics."""
    table = read_table(path, layout.EVENTS, engine, block_bytes)
    lookup = unique_lookup(path, layout.EVENTS, table["display_id"])
    flavour.clear_events(table)
    platform = sliced(lambda codes: (np.maximum(codes, 1) - 1).astype(np.uint8), engine.workers, table["platform"])
    geo, places = flavour.geo(table["geo_location"], given, buckets)
    is_train = partial(flavour.is_train, seed=seed)
    without = is_train(np.array([NULL_INT]), np.array([NULL_INT]))
    events = Events(
        lookup,
        with_null(table["document_id"], NULL_INT),
        with_null(table["timestamp"], NULL_INT),
        with_null(platform, 0),
        with_null(table["geo_location"].codes, NULL_INT),
        with_null(sliced(is_train, engine.workers, table["display_id"], table["timestamp"]), without[0]),
    )
    return events, geo, places


def read_documents(
    path: Path | None, engine: Pool, block_bytes: int, flavour: Flavour, buckets: dict[str, int]
) -> Documents:
    """documents_meta.csv, cleaned and with ids as the flavour says; no rows where there is no file.

    Raises:
        InputError: the file is malformed, or names a document twice.
    """
    if path is None:
        table: dict[str, Any] = {c.name: np.empty(0, c.dtype) for c in layout.META}
        lookup = Lookup.build(table["document_id"])
    else:
        table = read_table(path, layout.META, engine, block_bytes)
        lookup = unique_lookup(path, layout.META, table["document_id"])
    flavour.clean_documents(table)
    source, publisher = table["source_id"], table["publisher_id"]
    return Documents(
        lookup,
        with_null(source, NULL_INT),
        with_null(publisher, NULL_INT),
        with_null(flavour.ids(source, buckets["source_id"]), NULL_INT),
        with_null(flavour.ids(publisher, buckets["publisher_id"]), NULL_INT),
        with_null(table["publish_time"], NULL_TIME),
    )


def read_promoted(path: Path, engine: Pool, block_bytes: int, documents: Documents) -> Promoted:
    """promoted_content.csv, with what `documents` says of the landing pages.

    Raises:
        InputError: the file is malformed, or names an ad twice.
    """
    table = read_table(path, layout.PROMOTED, engine, block_bytes)
    lookup = unique_lookup(path, layout.PROMOTED, table["ad_id"])
    page = documents.lookup.find(table["document_id"])
    return Promoted(
        lookup,
        with_null(table["ad_id"], NULL_INT),
        with_null(table["document_id"], NULL_INT),
        with_null(table["campaign_id"], NULL_INT),
        with_null(table["advertiser_id"], NULL_INT),
        with_null(documents.source[page], NULL_INT),
        with_null(documents.publisher[page], NULL_INT),
        with_null(documents.published[page], NULL_TIME),
    )


def read_attributes(
    path: Path | None,
    kind: str,
    engine: Pool,
    block_bytes: int,
    idf: Callable[[np.ndarray, int], np.ndarray],
    buckets: int | None,
) -> tuple[Attributes, Lists | None]:
    """kind: one of `layout.ATTRIBUTES`; idf: see `Flavour`; buckets: of the multi-hot feature, if it is wanted.

    Without a file every similarity is 0 and every list is empty.
    """
    columns = layout.ATTRIBUTES[kind]
    if path is None:
        none = np.empty(0, np.int32)
        return Attributes.build(none, none, np.empty(0)), None if buckets is None else Lists.build(none, none)
    table = read_table(path, columns, engine, block_bytes)
    documents, attributes, confidences = (table[c.name] for c in columns)
    lists = None
    if isinstance(attributes, Strings):
        if buckets is not None:
            hashed = hashing.string_buckets(attributes.values.to_pylist(), buckets)
            lists = Lists.build(documents, hashed[attributes.codes])
        attributes = attributes.codes
    else:
        if buckets is not None:
            lists = Lists.build(documents, hashing.id_buckets(attributes, buckets))
        attributes = ranks(attributes)
    return Attributes.build(documents, attributes, confidences, idf, engine.workers), lists


def ranks(values: np.ndarray) -> np.ndarray:
    """[n] int32 >= 0 -> [n] int32: the place of each value among the distinct ones, ascending."""
    if not len(values) or int(values.max()) > 4 * len(values):
        return np.unique(values, return_inverse=True)[1].astype(np.int32)
    seen = np.zeros(int(values.max()) + 1, bool)
    seen[values] = True
    return (np.cumsum(seen, dtype=np.int32) - 1)[values]


def unique_lookup(path: Path, columns: Sequence[Column], keys: np.ndarray) -> Lookup:
    """A look-up by the file's key, its first column.

    Raises:
        InputError: a key stands twice, which would multiply rows of the join.
    """
    if (row := first_duplicate(keys)) is not None:
        line = csv_io.line_of(path, row)
        raise InputError(f"{path}, line {line}: {columns[0].name} {keys[row]} a second time, expected one row each")
    return Lookup.build(keys)
