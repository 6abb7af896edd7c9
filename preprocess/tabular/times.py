"""Points in time as numbers that can be compared: numbers as they are, dates and instants as microseconds."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocess.tabular.columns import BadCell, Column

# A date without a zone says nothing about its place among instants, so the kinds are never compared.
KINDS = {
    "number": "a number",
    "date": "a time without a zone such as 2016-06-14, 2016-06-14 12:00:00 or 2016-06-14T12:00:00.000",
    "instant": "a time with a zone such as 2016-06-14T12:00:00Z or 2016-06-14T12:00:00.000+02:00",
}
ANY = "a time such as 2016-06-14, 2016-06-14 12:00:00 or 2016-06-14T12:00:00.000Z, or a number"
_TYPES = {"date": pa.timestamp("us"), "instant": pa.timestamp("us", "UTC")}
# Microseconds are what float64 holds exactly; arrow refuses digits that it would drop.
_FINER = (r"^(.*:[0-9]{2}\.[0-9]{6})[0-9]+", r"\1")


def kind_of_first(column: Column) -> str:
    """The kind of the first row, which has a value: one of `KINDS`. Raises BadCell if it is none of them."""
    if kind := _stored_kind(column.values.type):
        return kind
    first = Column(np.zeros(1, np.int32), column.values.take(pa.array(column.codes[:1])))
    for kind in KINDS:
        try:
            read(first, kind)
        except BadCell:
            continue
        return kind
    raise BadCell(0, ANY, first.texts[0])


def read(column: Column, kind: str) -> np.ndarray:
    """[n] float64, for a column without nulls. Raises BadCell for a row of another kind."""
    if kind == "number":
        return column.numbers()
    if stored := _stored_kind(column.values.type):
        if stored != kind:
            raise BadCell(0, f"{KINDS[kind]}, as in the rows before", column.texts[column.codes[0]])
        dates = pc.cast(column.values, _TYPES[kind], safe=False)
        return column.take(_microseconds(dates), np.nan)
    texts = pc.replace_substring_regex(pa.array(column.texts, pa.string()), *_FINER)
    try:
        return column.take(_microseconds(pc.cast(texts, _TYPES[kind])), np.nan)
    except pa.ArrowInvalid:
        bad = np.array([not _fits(text, kind) for text in texts])
        row = int(column.take(bad, False).argmax())
        raise BadCell(row, f"{KINDS[kind]}, as in the rows before", column.texts[column.codes[row]]) from None


def _stored_kind(stored: pa.DataType) -> str | None:
    """The kind of a column whose type says it; None for texts and numbers."""
    if pa.types.is_timestamp(stored):
        return "instant" if stored.tz else "date"
    return "date" if pa.types.is_date(stored) else None


def _microseconds(dates: pa.Array) -> np.ndarray:
    return dates.cast(pa.int64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _fits(text: pa.Scalar, kind: str) -> bool:
    try:
        text.cast(_TYPES[kind])
    except pa.ArrowInvalid:
        return False
    return True
