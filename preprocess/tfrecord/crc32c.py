"""CRC-32C (Castagnoli), the checksum of TFRecords, in numpy.

A CRC is linear: the register after A followed by B is the register of A moved over len(B) zero bytes, xor that of B
from a zero register. So lanes of `LANE` bytes run side by side, and are merged pairwise with tables that move a
register over LANE * 2^k bytes. Leading zero bytes leave a zero register zero, so the data may be padded in front.
"""

from functools import cache

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected
LANE = 256
MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes) -> int:
    """The CRC-32C of `data`, 0xE3069283 for b"123456789"."""
    if len(data) < 4:
        register = 0xFFFFFFFF
        for byte in data:
            register = int(_table()[(register ^ byte) & 0xFF]) ^ (register >> 8)
        return register ^ 0xFFFFFFFF
    lanes = 1 << (-(-len(data) // LANE) - 1).bit_length()
    padded = np.zeros(lanes * LANE, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    start = len(padded) - len(data)
    padded[start : start + 4] ^= 0xFF  # the register starts as ones
    registers = np.zeros(lanes, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(lanes, LANE).T):
        registers = _table()[(registers ^ column) & 0xFF] ^ (registers >> 8)
    level = 0
    while len(registers) > 1:
        registers = _moved(registers[0::2], _mover(level)) ^ registers[1::2]
        level += 1
    return int(registers[0]) ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """As TFRecords store it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


@cache
def _table() -> np.ndarray:
    """[256] uint32: the register after one byte, from a zero register."""
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ (table & 1) * np.uint32(POLYNOMIAL)
    return table


@cache
def _mover(level: int) -> np.ndarray:
    """[4, 256] uint32: what each byte of a register becomes after LANE * 2^level zero bytes."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if level:
        bits = _moved(_moved(bits, _mover(level - 1)), _mover(level - 1))
    else:
        for _ in range(LANE):
            bits = _table()[bits & 0xFF] ^ (bits >> 8)
    tables = np.zeros((4, 256), np.uint32)
    values = np.arange(256)
    for bit in range(8):
        tables[:, (values >> bit) & 1 == 1] ^= bits.reshape(4, 8)[:, bit, None]
    return tables


def _moved(registers: np.ndarray, mover: np.ndarray) -> np.ndarray:
    low, second = mover[0][registers & 0xFF], mover[1][(registers >> 8) & 0xFF]
    return low ^ second ^ mover[2][(registers >> 16) & 0xFF] ^ mover[3][registers >> 24]
