"""TFRecord files of tf.train.Example records, read without TensorFlow; both checksums of each record are checked.

A record is: uint64 length, masked CRC-32C of these 8 bytes, the data, masked CRC-32C of the data; little-endian. The
data is a protocol buffer: Example{1: Features{1: map of name to Feature}}, Feature{2: floats or 3: int64s, packed}.
"""

import contextlib
import dataclasses
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from preprocess.tfrecord.crc32c import masked
from widedeep.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class _BadRecord(ValueError):
    """The record is not what its format says."""


@dataclass(frozen=True)
class Span:
    """Records in a row, the first at byte `start`: the `number`-th of the file, counted from 1."""

    path: Path
    number: int
    start: int
    stop: int


def spans(path: Path, span_bytes: int = 4 << 20) -> Iterator[Span]:
    """Cuts a file into spans of about `span_bytes`, by the lengths of its records. What lies behind a length that
    cannot be right belongs to the last span, where `read` will find it.

    Raises:
        InputError: the file cannot be read.
    """
    with _reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        span, number, start = Span(path, 1, 0, size), 1, 0
        while start < size:
            if start - span.start >= span_bytes:
                yield dataclasses.replace(span, stop=start)
                span = Span(path, number, start, size)
            file.seek(start)
            head = file.read(12)
            if len(head) < 12 or masked(head[:8]) != struct.unpack("<I", head[8:])[0]:
                break
            number, start = number + 1, start + 16 + struct.unpack("<Q", head[:8])[0]
        if span.start < size:
            yield span


def read(span: Span) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(place for messages, {feature: [n] float32 or int64}) of each record. Features of bytes are left out.

    Raises:
        InputError: the file cannot be read, is cut off, or a record is damaged; names file, record and byte.
    """
    with _reading(span.path) as file:
        size = os.fstat(file.fileno()).st_size
        number, start = span.number, span.start
        file.seek(start)
        while start < span.stop:
            place = f"{span.path}, record {number} (byte {start})"
            data = _data(file, size - start, place)
            try:
                yield place, _example(data)
            except _BadRecord as error:
                raise InputError(f"{place}: expected a tf.train.Example: {error}") from error
            number, start = number + 1, start + 16 + len(data)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _data(file, left: int, place: str) -> bytes:
    head = file.read(12)
    if len(head) < 12:
        raise InputError(f"{place}: the file ends inside the record")
    length, crc = struct.unpack("<QI", head)
    if masked(head[:8]) != crc:
        raise InputError(f"{place}: expected a TFRecord, but the checksum of its length does not fit")
    if length + 16 > left:
        raise InputError(f"{place}: the file ends inside the record: it has {length + 16} bytes, {left} are left")
    data = file.read(length)
    tail = file.read(4)
    if len(data) < length or len(tail) < 4:
        raise InputError(f"{place}: the file ends inside the record")
    if masked(data) != struct.unpack("<I", tail)[0]:
        raise InputError(f"{place}: damaged: the checksum of its data does not fit")
    return data


def _example(data: bytes) -> dict[str, np.ndarray]:
    features = {}
    for body in _messages(data, 1):
        for entry in _messages(body, 1):
            names, values = _messages(entry, 1), _messages(entry, 2)
            try:
                name = names[-1].decode("utf-8") if names else ""
            except UnicodeDecodeError as error:
                raise _BadRecord("the name of a feature is not UTF-8") from error
            if values and (array := _feature(values[-1])) is not None:
                features[name] = array
    return features


def _feature(data: bytes) -> np.ndarray | None:
    """The values of a Feature; None for bytes and for an empty one."""
    if floats := _messages(data, 2):
        return _floats(floats[-1])
    if integers := _messages(data, 3):
        return _integers(integers[-1])
    return None


def _floats(data: bytes) -> np.ndarray:
    packed = b"".join(value for number, _, value in _fields(data) if number == 1)
    if len(packed) % 4:
        raise _BadRecord("a list of floats is cut off")
    return np.frombuffer(packed, "<f4")


def _integers(data: bytes) -> np.ndarray:
    """Packed varints, or one field each: 7 bits a byte, the lowest first, until a byte below 128."""
    packed = np.frombuffer(b"".join(value for number, _, value in _fields(data) if number == 1), np.uint8)
    if not packed.size:
        return np.empty(0, np.int64)
    ends = np.flatnonzero(packed < 128)
    if not ends.size or ends[-1] != len(packed) - 1:
        raise _BadRecord("a list of integers is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise _BadRecord("an integer has more than 10 bytes")
    place = np.arange(len(packed)) - np.repeat(starts, lengths)
    bits = (packed & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)


def _messages(data: bytes, wanted: int) -> list[bytes]:
    return [value for number, wire, value in _fields(data) if number == wanted and wire == BYTES]


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(field number, wire type, raw bytes) of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            _, stop = _varint(data, at)
        elif wire == BYTES:
            length, at = _varint(data, at)
            stop = at + length
        elif wire in (FIXED64, FIXED32):
            stop = at + (8 if wire == FIXED64 else 4)
        else:
            raise _BadRecord(f"unknown wire type {wire}")
        if stop > len(data):
            raise _BadRecord("a field ends behind its message")
        yield number, wire, data[at:stop]
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The value, and where the next field starts."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _BadRecord("a number is cut off")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise _BadRecord("a number has more than 10 bytes")
