"""What fits into `memory_limit`. Upper bounds, measured on 30 million rows (numpy 2.4, pyarrow 26, glibc, x86-64).

A run holds at most
    while reading:       process + workers x (worker + 8 x block) + tables being built (bytes of a CSV x a factor, one
                         at a time)
    while transforming:  process + workers x worker + tables + (1 + writers) x rows_per_shard x 100
                         + (2 workers + 1) x chunk rows x 300 (with multi-hot features 116 and 350)
where process = 128 MiB; worker = 0 for threads, `Engine.worker_bytes` for processes, on whatever machine; tables are
pages of files, which all workers of a machine share and the system may drop and reread; writers: see there.
Sorting test rows that do not ascend by display takes 26 bytes each on top of the process.
"""

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from preprocess import csv_io
from preprocess.engine import Engine
from preprocess.outbrain.config import DEFAULT_CHUNK_ROWS, OutbrainConfig
from widedeep.errors import InputError

PROCESS = 128 << 20
BLOCK_FACTOR = 8
BUILD_FACTOR = {
    "events": 1.75,
    "promoted_content": 3.0,
    "documents_meta": 3.0,
    "documents_categories": 9.0,
    "documents_topics": 5.0,
    "documents_entities": 4.0,
}
EXPANSION = 5  # decompressed bytes a compressed byte
SHARD_ROW, CHUNK_ROW = 100, 300
MULTIHOT_SHARD_ROW, MULTIHOT_CHUNK_ROW = 16, 50  # on top of them
MIN_BLOCK, MIN_CHUNK_ROWS = 1 << 18, 4096
FEWER, FEWER_OR_SMALLER = "fewer workers need less", "fewer workers or a smaller rows_per_shard need less"
_M_ARENA_MAX = -8  # of malloc.h


def block_bytes(config: OutbrainConfig, files: Mapping[str, Path], engine: Engine) -> int:
    """Bytes of CSV parsed at a time.

    Args:
        files: by name of the raw file, those that are there.
    Raises:
        InputError: the limit leaves no room to read the largest table, or to write shards whatever the tables take.
    """
    if config.memory_limit is None:
        return csv_io.BLOCK_BYTES
    build = max((_build_bytes(n, p) for n, p in files.items() if n != "clicks_train"), default=0)
    fixed = PROCESS + engine.workers * engine.worker_bytes + build
    each = BLOCK_FACTOR * engine.workers
    limit = config.memory_limit
    if (reading := fixed + MIN_BLOCK * each) > limit:
        limit = _whole(reading)
    if (need := _least_to_write(config, limit, 0, engine)) > config.memory_limit:
        raise _too_small(config.memory_limit, need, FEWER if need == limit else FEWER_OR_SMALLER)
    return min(csv_io.BLOCK_BYTES, (config.memory_limit - fixed) // each)


def writers(config: OutbrainConfig, engine: Engine) -> int:
    """Threads that write shards: one, and one more for every four workers, four at most. Their parts may take a
    sixteenth of the memory limit each.
    """
    wanted = min(1 + engine.workers // 4, 4)
    if config.memory_limit is None:
        return wanted
    return min(wanted, config.memory_limit // (16 * config.rows_per_shard * _shard_row(config)))


def chunk_rows(config: OutbrainConfig, table_bytes: int, engine: Engine) -> int:
    """Click rows transformed at a time.

    Raises:
        InputError: fewer than 4096 rows would fit.
    """
    wanted = config.chunk_rows or DEFAULT_CHUNK_ROWS[config.device]
    if config.memory_limit is None:
        return wanted
    if (need := _least_to_write(config, config.memory_limit, table_bytes, engine)) > config.memory_limit:
        raise _too_small(config.memory_limit, need, FEWER_OR_SMALLER)
    fixed, each = _to_write(config, table_bytes, engine)
    return min(wanted, (config.memory_limit - fixed) // each)


def _to_write(config: OutbrainConfig, table_bytes: int, engine: Engine) -> tuple[int, int]:
    """Bytes that the transforms take, and more of them for every row of a chunk."""
    chunk_row = CHUNK_ROW + (MULTIHOT_CHUNK_ROW if config.multihot else 0)
    shards = (1 + writers(config, engine)) * config.rows_per_shard * _shard_row(config)
    fixed = PROCESS + engine.workers * engine.worker_bytes + table_bytes + shards
    return fixed, (2 * engine.workers + 1) * chunk_row


def _least_to_write(config: OutbrainConfig, limit: int, table_bytes: int, engine: Engine) -> int:
    """`limit` if the transforms fit into it, else the least above it that they do, in whole MiB. A higher one may give
    more writers, which take more."""
    fixed, each = _to_write(replace(config, memory_limit=limit), table_bytes, engine)
    if (need := fixed + MIN_CHUNK_ROWS * each) <= limit:
        return limit
    return _least_to_write(config, _whole(need), table_bytes, engine)


def _shard_row(config: OutbrainConfig) -> int:
    return SHARD_ROW + (MULTIHOT_SHARD_ROW if config.multihot else 0)


def keep_one_heap() -> None:
    """Makes pyarrow, and threads that start afterwards, take memory from one heap, for the rest of this process. Else
    each thread keeps what it freed in heaps of its own: 638 MiB with eight threads and 790 with sixteen that were
    allowed 520, now 335 at most. Worker processes do a task at a time and keep within `Engine.worker_bytes` without.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, 1)
        pa.set_memory_pool(pa.system_memory_pool())


def give_back() -> None:
    """Returns memory that is free to the system. Else what a stage left with malloc would count in the next: 200 MiB of
    1,127 in a run that was allowed 952."""
    pa.default_memory_pool().release_unused()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """None on another C library, which has neither these calls nor these heaps."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def _build_bytes(name: str, path: Path) -> int:
    size = path.stat().st_size * (1 if path.suffix == ".csv" else EXPANSION)
    return int(size * BUILD_FACTOR[name])


def _too_small(limit: int, need: int, advice: str) -> InputError:
    return InputError(
        f"memory_limit is {limit / 2**20:.0f} MiB, expected at least {need >> 20} MiB for this data set; {advice}"
    )


def _whole(count: int) -> int:
    """Bytes rounded up to MiB, so that what a message says is enough."""
    return -(-count >> 20) << 20
