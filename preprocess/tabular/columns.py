"""A column of a chunk, dictionary-encoded whatever its source: work is done once per distinct value."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_REFUSED = (pa.ArrowInvalid, pa.ArrowNotImplementedError)
_ZEROS_OF_FRACTION = r"(?:(\.[0-9]*[1-9])|\.)0+($|[^0-9])"  # before the zone, if there is one
_DIGITS_OF_UUID = [place for place in range(36) if place not in (8, 13, 18, 23)]  # between are hyphens


class BadCell(ValueError):
    """A value that does not fit; `row` counts from the chunk's first, `found` is None where there is no value."""

    def __init__(self, row: int, expected: str, found: Any):
        super().__init__(f"expected {expected}, found {'no value' if found is None else repr(str(found)[:60])}")
        self.row = row


@dataclass
class Column:
    """values[codes[i]] is row i, code -1 is null. codes [n] int32; values a pyarrow array without nulls."""

    codes: np.ndarray
    values: pa.Array

    @classmethod
    def of(cls, array: pa.Array | pa.ChunkedArray) -> "Column":
        """From any scalar arrow array. NaN is null."""
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if is_uuid(array.type):
            array = _texts_of_uuids(array)
        if pa.types.is_dictionary(array.type):
            kind = array.type.value_type
            if array.dictionary.null_count or pa.types.is_floating(kind) or pa.types.is_null(kind):
                array = array.dictionary_decode()
        if pa.types.is_float16(array.type):
            array = array.cast(pa.float64())  # with halves pyarrow computes from version 26 on alone
        if pa.types.is_floating(array.type):
            array = pc.if_else(pc.is_nan(array), None, array)
        if pa.types.is_null(array.type):
            array = array.cast(pa.string())
        if not pa.types.is_dictionary(array.type):
            array = array.dictionary_encode()
        indices = array.indices.cast(pa.int32())  # polars' are unsigned
        codes, values = indices.fill_null(-1).to_numpy(zero_copy_only=False), array.dictionary
        if str(values.type) == "string_view":  # as polars writes texts; some of pyarrow's functions do not know it
            values = values.cast(pa.string())
        return cls(codes, values)

    def __len__(self) -> int:
        return len(self.codes)

    def without(self, nulls: frozenset[str]) -> "Column":
        """The same column with these texts taken as null."""
        if not nulls:
            return self
        is_null = np.array([text in nulls for text in self.texts] + [True])
        return Column(np.where(is_null[self.codes], -1, self.codes).astype(np.int32), self.values)

    def where(self, present: np.ndarray) -> "Column":
        """The same column with null where a bool mask is False."""
        return Column(np.where(present, self.codes, -1).astype(np.int32), self.values)

    def take(self, per_value: np.ndarray, null: Any) -> np.ndarray:
        """Expand one result per distinct value to one per row; `null` for nulls."""
        return np.concatenate([per_value, np.array([null], per_value.dtype)])[self.codes]

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """How many of the rows chosen by a bool mask hold each distinct value."""
        return np.bincount(self.codes[chosen & (self.codes >= 0)], minlength=len(self.values))

    @cached_property
    def texts(self) -> list[str]:
        """The distinct values as text, the same whatever unit or scale they have: whole floats and decimals as integers
        (a null makes floats of a file's integers), decimals and times without the zeros that end a fraction.

        Raises BadCell for bytes that are no text.
        """
        try:
            texts = self.values.cast(pa.string())
        except pa.ArrowInvalid:
            code = next(code for code in range(len(self.values)) if not self._fits(code, pa.string()))
            raise self._bad(code, "UTF-8 text") from None
        if pa.types.is_floating(self.values.type):
            numbers = self.values.to_numpy(zero_copy_only=False).astype(np.float64)
            whole = (numbers == np.trunc(numbers)) & (np.abs(numbers) < 2**53)
            integers = pa.array(np.where(whole, numbers, 0).astype(np.int64))
            texts = pc.if_else(pa.array(whole), integers.cast(pa.string()), texts)
        if pa.types.is_decimal(self.values.type):
            plain = [format(value, "f") for value in self.values.to_pylist()]  # arrow writes some as 1E-10
            return [text.rstrip("0").rstrip(".") if "." in text else text for text in plain]
        if pa.types.is_temporal(self.values.type):
            texts = pc.replace_substring_regex(texts, _ZEROS_OF_FRACTION, r"\1\2")
        return texts.to_pylist()

    def numbers(self) -> np.ndarray:
        """[n] float64, NaN for null. Raises BadCell for what is no finite number; blanks around one are ignored."""
        values = self._cast(pa.float64(), "a number")
        if not np.isfinite(values).all() and (used := ~np.isfinite(values) & self._is_used()).any():
            raise self._bad(int(used.argmax()), "a finite number")
        return self.take(values, np.nan)

    def integers(self, low: int, high: int, null: int | None, expected: str) -> np.ndarray:
        """[n] int64 in [low, high]; `null` for nulls, which are refused when it is None. Raises BadCell."""
        values = self._cast(pa.int64(), expected)
        outside = (values < low) | (values > high)
        if outside.any() and (used := outside & self._is_used()).any():
            raise self._bad(int(used.argmax()), expected)
        if null is None:
            self.refuse_nulls(expected)
        return self.take(values, 0 if null is None else null)

    def refuse_nulls(self, expected: str) -> None:
        """Raises BadCell for the first null."""
        if (missing := self.codes < 0).any():
            raise BadCell(int(missing.argmax()), expected, None)

    def _is_used(self) -> np.ndarray:
        return self.counts(self.codes >= 0) > 0

    def _cast(self, kind: pa.DataType, expected: str) -> np.ndarray:
        try:
            return _convert(self.values, kind)
        except _REFUSED:
            # Values that no row holds, such as texts taken as null, may be anything.
            used = np.flatnonzero(self._is_used())
        result = np.zeros(len(self.values), kind.to_pandas_dtype())
        if not len(used):  # some types are not converted even without values
            return result
        try:
            result[used] = _convert(self.values.take(pa.array(used)), kind)
        except _REFUSED:
            raise self._bad(next(code for code in used.tolist() if not self._fits(code, kind)), expected) from None
        return result

    def _fits(self, code: int, kind: pa.DataType) -> bool:
        try:
            _convert(self.values.slice(code, 1), kind)
        except _REFUSED:
            return False
        return True

    def _bad(self, code: int, expected: str) -> BadCell:
        return BadCell(int((self.codes == code).argmax()), expected, self.values[code].as_py())


def is_uuid(kind: pa.DataType) -> bool:
    """Whether a type is that of uuids, as DuckDB and Python's `uuid.UUID` have them."""
    return getattr(kind, "extension_name", None) == "arrow.uuid"


def _texts_of_uuids(array: pa.Array) -> pa.DictionaryArray:
    """[n] uuids -> [n] texts of 32 hexadecimal digits, 8-4-4-4-12 of them between hyphens."""
    coded = array.storage.dictionary_encode()
    octets = b"".join(coded.dictionary.to_pylist())
    n = len(coded.dictionary)
    written = np.full((n, 36), ord("-"), np.uint8)
    written[:, _DIGITS_OF_UUID] = np.frombuffer(octets.hex().encode(), np.uint8).reshape(n, 32)
    ends = np.arange(0, 36 * n + 1, 36, dtype=np.int64)
    texts = pa.LargeStringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(written))
    return pa.DictionaryArray.from_arrays(coded.indices, texts)


def _convert(values: pa.Array, kind: pa.DataType) -> np.ndarray:
    # Views are among the texts, which older pyarrow does not know.
    if "string" in str(values.type) or "binary" in str(values.type):
        values = pc.utf8_trim_whitespace(values.cast(pa.string()))
    # An integer above 2^53 is rounded.
    safe = not (pa.types.is_integer(values.type) and pa.types.is_floating(kind))
    return values.cast(kind, safe=safe).to_numpy(zero_copy_only=False)


@dataclass
class Lists:
    """A multi-hot column: row i holds list codes[i] (-1: none), and `lengths` [lists] cut `elements` into lists."""

    codes: np.ndarray
    lengths: np.ndarray
    elements: Column

    @classmethod
    def of(cls, array: pa.Array | pa.ChunkedArray) -> "Lists":
        """From an arrow list array."""
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        return cls(np.arange(len(array), dtype=np.int32), lengths, Column.of(array.flatten()))

    @classmethod
    def split(cls, column: Column, separator: str) -> "Lists":
        """From delimited text, in brackets or not; empty pieces and the spaces around pieces are dropped."""
        texts = [text[1:-1] if text[:1] + text[-1:] == "[]" else text for text in column.texts]
        pieces = [[p for piece in text.split(separator) if (p := piece.strip())] for text in texts]
        lengths = np.array([len(p) for p in pieces], np.int64)
        flat = pa.array([p for piece in pieces for p in piece], pa.string())
        return cls(column.codes, lengths, Column.of(flat))

    def __len__(self) -> int:
        return len(self.codes)

    def without(self, nulls: frozenset[str]) -> "Lists":
        return Lists(self.codes, self.lengths, self.elements.without(nulls))

    def chosen_elements(self, chosen: np.ndarray) -> Column:
        """The elements of the rows chosen by a bool mask, a list as often as rows hold it."""
        codes = self.codes[chosen & (self.codes >= 0)]
        lengths = self.lengths[codes]
        starts = np.cumsum(self.lengths) - self.lengths
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Column(self.elements.codes[np.repeat(starts[codes], lengths) + within], self.elements.values)

    def padded(self, per_element: np.ndarray, hotness: int) -> tuple[np.ndarray, int]:
        """ids [n, hotness], -1 behind a list's end, and how many elements of longer lists were cut off."""
        lists = np.repeat(np.arange(len(self.lengths)), self.lengths)
        place = np.arange(len(lists)) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        matrix = np.full((len(self.lengths) + 1, hotness), -1, np.int64)
        fits = place < hotness
        matrix[lists[fits], place[fits]] = per_element[fits]
        excess = np.concatenate([np.maximum(self.lengths - hotness, 0), [0]])
        return matrix[self.codes], int(excess[self.codes].sum())

    def row_of(self, element: int) -> int:
        """The first row that holds an element given by its place."""
        wanted = int(np.searchsorted(np.cumsum(self.lengths), element, side="right"))
        return int((self.codes == wanted).argmax())


def single(values: Column | Lists) -> Column:
    """A column of one value a row. Raises BadCell for lists."""
    if isinstance(values, Lists):
        raise BadCell(0, "one value a row", "lists")
    return values
