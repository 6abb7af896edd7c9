"""From the columns of a shard set to the matrices of a batch."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from widedeep import affinity
from widedeep._load import assemble_rows, epoch_rows, has_cuda_kernels
from widedeep.errors import InputError
from widedeep.ops import gather_batch_out
from widedeep.shard_manifest import label_of, name_of
from widedeep.shards import ShardSet
from widedeep.shuffle import EpochOrder

READ_ROWS = 1 << 18  # rows assembled at a time: tens of megabytes
LOADERS = 8  # threads of a load at most; more would wait for memory


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
        return Rows._make(None if tensor is None else function(tensor) for tensor in self)

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
        rows = np.arange(start, stop) if order is None else order.rows_at(start, stop)
        index = torch.from_numpy(rows).to(self.label.device)
        for source, target in zip(self, out):
            if source is not None and target is not None:
                torch.index_select(source, 0, index, out=target)


class Layout:
    """Which columns of a shard set make up a batch, and in which order: a spec's, or else the shards' own."""

    def __init__(self, shards: ShardSet, spec: Any):
        columns = shards.columns.values()
        if spec is None:
            tables = [c.name for c in columns if c.kind == "categorical"]
            self._numeric = [c.name for c in columns if c.kind == "numeric"]
            label = label_of(shards.directory, shards.columns)
        else:
            shards.check(spec)
            tables = [f.name for f in spec.categorical]
            self._numeric = [f.name for f in spec.numeric]
            label = spec.label
        self._group = name_of("group", shards.columns)
        self._hotness = [shards.columns[name].hotness for name in tables]
        self._shards = shards
        ids, numerics = ([shards.column(name) for name in names] for names in (tables, self._numeric))
        group = shards.column(self._group) if self._group else None
        self._stored = (ids, numerics, shards.column(label), group, shards.ends.tolist())
        if not tables and not self._numeric:
            raise InputError(
                f"{shards.directory}: has neither categorical nor numeric columns; a model needs at least one"
            )

    @property
    def id_columns(self) -> int:
        return sum(self._hotness)

    @property
    def row_bytes(self) -> int:
        return 4 * (self.id_columns + len(self._numeric) + 1) + (8 if self._group else 0)

    def gather(self, order: EpochOrder | None, pieces: Sequence[Slice], pinned: bool = False) -> Rows:
        """Rows at the positions of the pieces of an epoch's order (None: as they are stored), one after the other.

        pinned: in memory that a GPU reads by itself.
        """
        rows, end = np.empty(sum(piece.stop - piece.start for piece in pieces), np.int64), 0
        for piece in pieces:
            begin, end = end, end + piece.stop - piece.start
            if order is None:
                rows[begin:end] = np.arange(piece.start, piece.stop)
            else:
                settings = (self._shards.rows, order.block_rows, order.window_rows, order.seed, order.epoch)
                epoch_rows(*settings, piece.start, rows[begin:end])
        # Ascending order touches each page of a file once.
        slots = None if order is None else np.argsort(rows)
        out = self._empty(len(rows), pinned)
        self._assemble(rows if slots is None else rows[slots], slots, out)
        return out

    def load(self, device: torch.device) -> Rows:
        """The whole data set on `device`, read by several threads: rows are made of columns at a core's pace."""
        total = self._shards.rows
        result = self._empty(total, device=device)
        if device.type == "cuda":  # what used that memory before was queued here, and the threads' streams do not wait
            torch.cuda.current_stream(device).synchronize()

        def fill(start: int) -> None:
            target = result.cut(start, min(total, start + READ_ROWS))
            count = len(target.label)
            host = target if device.type == "cpu" else self._empty(count)
            self._assemble(np.arange(start, start + count), None, host)
            if host is not target:
                for there, here in zip(target, host):
                    if there is not None and here is not None:
                        there.copy_(here)

        with ThreadPoolExecutor(min(LOADERS, affinity.cores())) as pool:
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

    def _assemble(self, rows: np.ndarray, slots: np.ndarray | None, out: Rows) -> None:
        assemble_rows(*self._stored, rows, slots, [None if tensor is None else tensor.numpy() for tensor in out])
