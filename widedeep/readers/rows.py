"""From the columns of a shard set to the matrices of a batch."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from widedeep._load import assemble_rows, epoch_rows, has_cuda_kernels
from widedeep.errors import InputError
from widedeep.ops import gather_batch_out
from widedeep.shards import ShardSet
from widedeep.shuffle import EpochOrder

READ_ROWS = 1 << 18  # rows assembled at a time: tens of megabytes
LOADERS = min(8, os.cpu_count() or 1)  # threads of a load; more would wait for memory


class Slice(NamedTuple):
    """The part of one global batch that a rank takes: positions [start, stop) of the epoch's order."""

    start: int
    stop: int
    first_row: int
    global_rows: int


class Rows(NamedTuple):
    """Rows of a data set as matrices, row-major so that one row is one piece of memory.

    ids [rows, K] int32 (-1 = padding), numeric [rows, N] float32, label [rows] float32, group [rows] int64 or None.
    """

    ids: Tensor
    numeric: Tensor
    label: Tensor
    group: Tensor | None

    def map(self, function: Callable[[Tensor], Any]) -> "Rows":
        """Apply a function to each matrix that is there."""
        return Rows(*(None if tensor is None else function(tensor) for tensor in self))

    def cut(self, start: int, stop: int) -> "Rows":
        """Views of rows [start, stop)."""
        return self.map(lambda tensor: tensor[start:stop])

    def empty(self, count: int, pinned: bool = False) -> "Rows":
        """Room for `count` rows on the same device; pinned: in memory that a GPU reads by itself."""
        return self.map(lambda t: torch.empty((count, *t.shape[1:]), dtype=t.dtype, device=t.device, pin_memory=pinned))

    def gather(self, order: EpochOrder | None, start: int, out: "Rows") -> None:
        """Write the rows at positions start, ... of an epoch's order (None: as they are stored) into `out`."""
        settings = () if order is None else (order.block_rows, order.window_rows, order.seed, order.epoch)
        if self.label.is_cpu or has_cuda_kernels:
            gather_batch_out(self, settings, start, out=out)
            return
        stop = start + len(out.label)
        index = np.arange(start, stop) if order is None else order.rows_at(start, stop)
        index = torch.from_numpy(index).to(self.label.device)
        for source, target in zip(self, out):
            if target is not None:
                torch.index_select(source, 0, index, out=target)


class Layout:
    """Which columns of a shard set make up a batch, and in which order: a spec's, or else the shards' own."""

    def __init__(self, shards: ShardSet, spec: Any = None):
        columns = shards.columns.values()
        if spec is None:
            self._tables = [c.name for c in columns if c.kind == "categorical"]
            self._numeric = [c.name for c in columns if c.kind == "numeric"]
            self._label = next(c.name for c in columns if c.kind == "label")
        else:
            shards.check(spec)
            self._tables = [f.name for f in spec.categorical]
            self._numeric = [f.name for f in spec.numeric]
            self._label = spec.label
        self._group = next((c.name for c in columns if c.kind == "group"), None)
        self._hotness = [shards.columns[name].hotness for name in self._tables]
        self._shards = shards
        if not self._tables and not self._numeric:
            raise InputError(
                f"{shards.directory}: has neither categorical nor numeric columns; a model needs at least one"
            )

    @property
    def id_columns(self) -> int:
        return sum(self._hotness)

    @property
    def row_bytes(self) -> int:
        return 4 * (self.id_columns + len(self._numeric) + 1) + (8 if self._group else 0)

    def read(self, start: int, stop: int, pinned: bool = False) -> Rows:
        """Rows [start, stop) as they are stored; pinned: in memory that a GPU reads by itself."""
        return self._assemble(np.arange(start, stop), None, self._empty(stop - start, pinned))

    def gather(self, order: EpochOrder, pieces: Sequence[Slice], pinned: bool = False) -> Rows:
        """Rows at the positions of the pieces, in that order, one after the other."""
        ends = np.cumsum([piece.stop - piece.start for piece in pieces])
        rows = np.empty(ends[-1], np.int64)
        settings = (self._shards.rows, order.block_rows, order.window_rows, order.seed, order.epoch)
        for piece, end in zip(pieces, ends):
            epoch_rows(*settings, piece.start, rows[end - (piece.stop - piece.start) : end])
        slots = np.argsort(rows)  # ascending order touches each page of a file once
        return self._assemble(rows[slots], slots, self._empty(len(rows), pinned))

    def load(self, device: torch.device) -> Rows:
        """The whole data set on `device`, read by several threads: rows are made of columns at a core's pace."""
        total = self._shards.rows
        result = self._empty(total, device=device)

        def fill(start: int) -> None:
            stop = min(total, start + READ_ROWS)
            targets = result.cut(start, stop)
            if device.type == "cpu":
                self._assemble(np.arange(start, stop), None, targets)
                return
            for target, source in zip(targets, self.read(start, stop)):
                if target is not None:
                    target.copy_(source)

        with ThreadPoolExecutor(LOADERS) as pool:
            list(pool.map(fill, range(0, total, READ_ROWS)))  # the list: an exception of a thread is raised here
        return result

    def _empty(self, rows: int, pinned: bool = False, device: torch.device | str = "cpu") -> Rows:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, pin_memory=pinned, device=device)

        return Rows(
            empty(self.id_columns, dtype=torch.int32),
            empty(len(self._numeric), dtype=torch.float32),
            empty(dtype=torch.float32),
            empty(dtype=torch.int64) if self._group else None,
        )

    def _assemble(self, rows: np.ndarray, slots: np.ndarray | None, out: Rows) -> Rows:
        column = self._shards.column
        stored = ([column(name) for name in names] for names in (self._tables, self._numeric))
        group = column(self._group) if self._group else None
        ends = self._shards.ends.tolist()
        assemble_rows(*stored, column(self._label), group, ends, rows, slots, out.map(Tensor.numpy))
        return out
