"""Batches of a shard set: the same rows in the same order in every mode, and for any number of ranks together."""

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

import psutil
import torch
from torch import Tensor

from widedeep import affinity
from widedeep.config import ReaderMode
from widedeep.devices import exact_device
from widedeep.errors import InputError
from widedeep.readers.prefetch import prefetch_map, transfer
from widedeep.readers.rows import READ_ROWS, Layout, Rows, Slice
from widedeep.shards import ShardSet
from widedeep.shuffle import WINDOW_ROWS, EpochOrder

MODES = get_args(ReaderMode)
READ_THREADS = 8  # of a stream to a GPU at most: each holds a few chunks of READ_ROWS
# From a number of rows to where a batch of as many is wanted: ids, numeric, label. None: anywhere.
Places = Callable[[int], tuple[Tensor, Tensor, Tensor] | None]


class Batch(NamedTuple):
    """One rank's rows of a global batch.

    Attributes:
        ids: [B, K] int32, -1 = padding.
        numeric: [B, N] float32.
        label: [B] float32, 0 or 1.
        group: [B] int64 (the `map` channel), or None.
        first_row: position of row 0 within the global batch; dropout counters use it.
        global_rows: rows of the global batch; the loss is their mean.
    """

    ids: Tensor
    numeric: Tensor
    label: Tensor
    group: Tensor | None
    first_row: int
    global_rows: int


class Reader:
    """Epochs of batches of a shard set.

    The order of an epoch is a fixed function of (seed, epoch, window_rows), the same in every mode and for every world
    size; with shuffle=False it is the file's. Global batch s holds positions [s G, (s + 1) G) of it, the last one what
    is left; rank r of w takes the r-th of w nearly equal parts, which is empty where there are fewer rows than ranks.

    Args:
        shards: the rows.
        global_batch: G, rows of a batch over all ranks.
        mode: "device" keeps all rows on `device`; "pinned" keeps them in host memory and copies batches ahead;
            "stream" reads ahead from the files in bounded memory; "auto" is the first of these that fits.
        device: where batches are wanted.
        seed: of the order.
        shuffle: False for evaluation.
        rank, world: this process and the number of processes.
        window_rows: rows permuted together, and what "stream" touches at a time.
        spec: the feature spec that gives the columns and their order; None takes all, in the shards' order.
    Attributes:
        mode: the mode that "auto" became.
        resident: in modes "device" and "pinned" all rows as matrices, there or in host memory (loaded at first use).
    Raises:
        InputError: shards and spec differ, or an argument is out of range.
    """

    def __init__(
        self,
        shards: ShardSet,
        global_batch: int,
        *,
        mode: ReaderMode = "auto",
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        window_rows: int = WINDOW_ROWS,
        spec: Any = None,
    ):
        if global_batch < 1 or window_rows < 1 or not 0 <= rank < world:
            raise InputError(
                f"expected a batch and a window of at least 1 row and 0 <= rank < world, "
                f"not {global_batch}, {window_rows}, rank {rank} of {world}"
            )
        if mode not in MODES:
            raise InputError(f"reader mode {mode!r}: expected one of {', '.join(MODES)}")
        self.shards = shards
        self.global_batch = global_batch
        self.device = exact_device(device)
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"seed: expected 64 bits with a sign, got {seed}")
        self.seed = seed
        self.shuffle = shuffle
        self.window_rows = window_rows
        self._rank, self._world = rank, world
        self._layout = Layout(shards, spec)
        self.mode = _fitting_mode(self._layout.row_bytes * shards.rows, self.device) if mode == "auto" else mode
        self._loaded: Rows | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the last partial one counted."""
        return -(-self.shards.rows // self.global_batch)

    @property
    def resident(self) -> Rows | None:
        return None if self.mode == "stream" else self._load()

    def _load(self) -> Rows:
        if self._loaded is None:
            self._loaded = self._layout.load(self.device if self.mode == "device" else torch.device("cpu"))
        return self._loaded

    def epoch(self, epoch: int, start_step: int = 0, into: Places | None = None) -> Iterator[Batch]:
        """Batches of one epoch from `start_step` on. Threads behind the iterator end when it does, or is dropped.

        Batches are for reading: without shuffle, "device" and "pinned" give views of `resident` where they can.

        Args:
            into: `Step.places` of the step that takes the batches. In mode "device" they are then written where the
                step reads them, by one launch and without an allocation; a batch is valid until the next one is taken.
        """
        order = EpochOrder(self.shards.rows, self.seed, epoch, window_rows=self.window_rows) if self.shuffle else None
        slices = map(self.slice, range(start_step, self.steps_per_epoch))
        if self.mode == "device":
            pieces = self._selected(slices, order, into)
        elif self.mode == "pinned":
            pieces = transfer(self._selected(slices, order), self.device)
        else:
            pieces = self._streamed(slices, order)
        for piece, rows in pieces:
            yield Batch(*rows, piece.first_row, piece.global_rows)

    def slice(self, step: int) -> Slice:
        """The positions of the epoch's order that this rank takes in a step."""
        first = step * self.global_batch
        rows = min(self.global_batch, self.shards.rows - first)
        low, high = (rows * r // self._world for r in (self._rank, self._rank + 1))
        return Slice(first + low, first + high, low, rows)

    def _selected(
        self, slices: Iterator[Slice], order: EpochOrder | None, into: Places | None = None
    ) -> Iterator[tuple[Slice, Rows]]:
        rows = self._load()
        pinned = self.mode == "pinned" and self.device.type == "cuda"
        for piece in slices:
            count = piece.stop - piece.start
            places = into(count) if into else None
            if order is None and places is None:
                yield piece, rows.cut(piece.start, piece.stop)
                continue
            if places is None:
                batch = rows.empty(count, pinned)
            else:
                batch = Rows(*places, None if rows.group is None else rows.group.new_empty(count))
            rows.gather(order, piece.start, batch)
            yield piece, batch

    def _streamed(self, slices: Iterator[Slice], order: EpochOrder | None) -> Iterator[tuple[Slice, Rows]]:
        fetch = partial(_fetch, self._layout, order, self.device.type == "cuda")
        chunks = prefetch_map(fetch, _chunks(slices), _read_threads(self.device))
        batches = ((piece, rows) for chunk in chunks for piece, rows in chunk)
        if self.device.type == "cpu":
            return batches
        return transfer(batches, self.device)


def _chunks(slices: Iterator[Slice]) -> Iterator[list[Slice]]:
    """Several steps at once: one ordered sweep over the files for each list."""
    taken: list[Slice] = []
    rows = 0
    for piece in slices:
        taken.append(piece)
        rows += piece.stop - piece.start
        if rows >= READ_ROWS:
            yield taken
            taken, rows = [], 0
    if taken:
        yield taken


def _fetch(layout: Layout, order: EpochOrder | None, pinned: bool, slices: list[Slice]) -> list[tuple[Slice, Rows]]:
    rows, ends = layout.gather(order, slices, pinned), itertools.accumulate(s.stop - s.start for s in slices)
    return [(s, rows.cut(end - (s.stop - s.start), end)) for s, end in zip(slices, ends)]


def _read_threads(device: torch.device) -> int:
    """Threads that read from the files: on a CPU the cores are the model's; a GPU takes what several of them read."""
    if device.type == "cpu":
        return 1
    return min(READ_THREADS, max(1, affinity.share(_local_world()) - 1))


def _local_world() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _fitting_mode(size: int, device: torch.device) -> str:
    """The fastest mode whose `size` bytes leave the larger part of the memory to the model."""
    host = psutil.virtual_memory().available // _local_world()  # every process holds its own copy
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size <= free // 2:
            return "device"
        return "pinned" if size <= host // 2 else "stream"
    return "device" if size <= host // 2 else "stream"
