"""Pass 2: the rows of a chunk as the model takes them."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from preprocess.tabular.columns import BadCell, Column, Lists, single
from preprocess.tabular.source import Chunk
from preprocess.tabular.spec import Feature
from widedeep.errors import InputError


class Encoded(NamedTuple):
    """rows: [n] ids, numbers, labels or groups; or [n, hotness] ids, padded with -1.   nulls: missing values of all
    source columns; of a cross, rows where one of its features has none.   cut: list elements beyond the hotness.
    missing: [n] bool, rows without a value, of a one-hot feature that is no cross."""

    rows: np.ndarray
    nulls: int
    cut: int = 0
    missing: np.ndarray | None = None

    @property
    def present(self) -> np.ndarray:
        """Which ids stand for a value, as the ids' shape: of a list all but its padding."""
        return self.rows >= 0 if self.missing is None else ~self.missing


def encode_all(features: Iterable[Feature], chunk: Chunk, numeric: str) -> dict[str, Encoded]:
    """Each feature by its name, as `encode` does it; crosses from the ids of the crossed features, which are among
    `features`."""
    features = list(features)
    encoded = {f.name: encode(f, chunk, numeric) for f in features if not f.crossed}
    for feature in features:
        if feature.crossed:
            parts = [encoded[name] for name in feature.crossed]
            missing = ~np.logical_and.reduce([part.present for part in parts])
            encoded[feature.name] = Encoded(feature.encoder.ids([part.rows for part in parts]), int(missing.sum()))
    return encoded


def encode(feature: Feature, chunk: Chunk, numeric: str) -> Encoded:
    """Any feature but a cross.

    Args:
        numeric: what numbers are stored as, float32 or float16.
    Raises:
        InputError: a value does not fit; names its place.
    """
    parts, nulls, cut = [], 0, 0
    for name in feature.columns:
        with chunk.blame(name):
            values = values_of(feature, chunk, name)
            missing = values.codes < 0
            nulls += int(missing.sum())
            if isinstance(values, Lists):
                ids, cut = values.padded(_element_ids(feature, values), feature.hotness)
                parts.append(ids)
            elif feature.hotness:
                parts.append(np.where(missing, -1, feature.encoder.ids(values)))
            elif feature.kind == "categorical":
                return Encoded(feature.encoder.ids(values), nulls, missing=missing)
            elif feature.kind == "numeric":
                return Encoded(feature.encoder.apply(values, numeric), nulls)
            else:
                return Encoded(feature.encoder.apply(values), nulls)
    if isinstance(values, Column):
        # One value a column: columns that the spec's hotness leaves over are padding.
        parts += [np.full(len(chunk.rows), -1)] * (feature.hotness - len(parts))
        parts = [np.stack(parts, axis=1)]
    return Encoded(parts[0][:, 0] if feature.hotness == 1 else parts[0], nulls, cut)


def values_of(feature: Feature, chunk: Chunk, name: str) -> Column | Lists:
    """One of the feature's source columns, cut into lists, masked, and without what counts as missing."""
    values = chunk.columns[name]
    if isinstance(values, Lists):
        if not feature.hotness or len(feature.columns) > 1:
            raise InputError(f"{chunk.of(name)}: expected one value a row for {feature.name}, found lists")
    elif feature.separator is not None:
        values = Lists.split(values, feature.separator)
    elif feature.mask:
        mask = feature.mask[feature.columns.index(name)]
        with chunk.blame(mask):
            values = values.where(np.nan_to_num(single(chunk.columns[mask]).numbers()) != 0)
    return values.without(feature.nulls)


def _element_ids(feature: Feature, lists: Lists) -> np.ndarray:
    """Ids of the elements; -1 for null ones."""
    try:
        return np.where(lists.elements.codes < 0, -1, feature.encoder.ids(lists.elements))
    except BadCell as error:
        error.row = lists.row_of(error.row)
        raise
