"""Dense weights as GPU kernels want them: sizes rounded up with zeros, in the type of the activations, and the deep
input's columns in an order in which a table's rows are read in whole packs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.share import is_table

ALIGNMENT = 64  # floats: each gradient starts on 256 bytes, what the fastest products want
PACK = 8  # columns: tables as wide as a multiple of it start at one
FIRST = "deep.layer.0.weight"  # the only weight that knows the order of the deep input


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def aligned_columns(spec: FeatureSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First column of each table, and the column of each numeric, in the order of the GPU step: tables that are whole
    packs wide, the widest first, then the other tables, then the numerics. One without columns has the place of a whole
    pack, for a kernel takes a row in packs only where its column allows it.
    """
    whole = sorted((f for f, dim in enumerate(spec.dims) if dim % PACK == 0), key=lambda f: -spec.dims[f])
    rest = [f for f, dim in enumerate(spec.dims) if dim % PACK]
    columns, at = [0] * len(spec.dims), 0
    for f in whole + rest:
        columns[f] = at
        at += spec.dims[f]
    return tuple(columns), tuple(range(at, at + len(spec.numeric)))


class PaddedWeights:
    """Copies and gradients of a model's dense weights.

    Hidden widths are rounded up to 8 and the deep input to `FeatureSpec.padded_width`. Padding is zero and stays so:
    a padded unit has weights and bias 0, so its output and its gradients are 0.

    The columns of the deep input have an order of their own here (`aligned_columns`), unless no hidden layer reads
    them. Copy and gradient of the first layer's weight follow it; the weight itself, its slots, `unpadded` and `grads`
    keep the model's.

    Args:
        dtype: of the activations.
    Attributes:
        widths: of the deep input and of every hidden layer, padded.
        masters: the model's float32 weights by name.  copies: padded copies of those that differ in size or type.
        flat: all gradients in one float32 buffer.  padded: its parts, by name.  grads: their rows that are no padding,
            which `rmsprop_dense_` takes; the first layer's, if its columns have moved, after `gather_first`.
        table_columns, numeric_columns: places in the deep input, as in `FeatureSpec`.
        columns: [deep width] int64, the column of the deep input in which each of the model's columns is; None: none
            has moved.
    """

    def __init__(self, model: WideDeep, dtype: torch.dtype, device: torch.device):
        hidden = [round_up(units, 8) for units in model.hidden] if model.has_deep else []
        self.widths = [model.layout.padded_width, *hidden]
        self.masters = {name: a for name, a in model.named_arrays().items() if not is_table(name)}
        shapes = {name: self._padded_shape(name, a) for name, a in self.masters.items()}
        self.copies = {}
        for name, a in self.masters.items():
            wanted = dtype if name.startswith("deep.layer.") else torch.float32
            if shapes[name] != tuple(a.shape) or wanted != torch.float32:
                self.copies[name] = torch.zeros(shapes[name], dtype=wanted, device=device)
        sizes = [round_up(math.prod(shape), ALIGNMENT) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), device=device)
        parts = zip(shapes.items(), self.flat.split(sizes))
        self.padded = {name: part[: math.prod(shape)].view(shape) for (name, shape), part in parts}
        self.grads = {name: self._rows(name, g) for name, g in self.padded.items()}
        self._order_columns(model.layout)

    def _order_columns(self, spec: FeatureSpec) -> None:
        self.table_columns, self.numeric_columns = spec.table_columns, spec.numeric_columns
        self.columns = self._first_copy = None
        if FIRST not in self.masters:
            return
        self.table_columns, self.numeric_columns = aligned_columns(spec)
        moved = _moved(spec, self.table_columns, self.numeric_columns)
        if moved == list(range(spec.deep_width)):
            return
        master, device = self.masters[FIRST], self.flat.device
        self.columns = torch.tensor(moved, dtype=torch.int64, device=device)
        self.grads[FIRST] = torch.zeros(master.shape, device=device)
        if FIRST not in self.copies:  # nothing to pad, and float32
            self.copies[FIRST] = torch.zeros_like(self.padded[FIRST])
        if (dtype := self.copies[FIRST].dtype) != master.dtype:
            self._first_copy = torch.zeros(master.shape, dtype=dtype, device=device)  # in the model's order

    def _padded_shape(self, name: str, a: Tensor) -> tuple[int, ...]:
        if name.startswith("deep.layer."):
            i = int(name.split(".")[2])
            return (self.widths[i + 1], self.widths[i]) if a.ndim == 2 else (self.widths[i + 1],)
        return (1, self.widths[-1]) if name == "deep.out.weight" else tuple(a.shape)

    def _rows(self, name: str, padded: Tensor) -> Tensor:
        return padded[: len(self.masters[name])]

    def neighbours(self, first: str, last: str) -> Tensor:
        """The gradients from one to another of `flat`, and the padding between them."""
        start, stop = (self.padded[name].storage_offset() for name in (first, last))
        return self.flat[start : stop + self.padded[last].numel()]

    def get(self, name: str) -> Tensor:
        """What the kernels read: the padded copy, or the weight itself."""
        return self.copies.get(name, self.masters[name])

    def refresh(self) -> None:
        """Copies the weights anew, after somebody else has written them."""
        for name, copy in self.copies.items():
            if name != FIRST or self.columns is None:
                self.unpadded(name, copy).copy_(self.masters[name])
                continue
            if self._first_copy is not None:
                self._first_copy.copy_(self.masters[name])
            self.scatter_first()

    def gather_first(self) -> None:
        """Brings the first layer's gradient to the model's order, before an update."""
        if self.columns is not None:
            torch.index_select(self._rows(FIRST, self.padded[FIRST]), 1, self.columns, out=self.grads[FIRST])

    def scatter_first(self) -> None:
        """Brings the first layer's updated weight to the order of the deep input."""
        if self.columns is not None:
            updated = self.masters[FIRST] if self._first_copy is None else self._first_copy
            self._rows(FIRST, self.copies[FIRST]).index_copy_(1, self.columns, updated)

    def unpadded(self, name: str, padded: Tensor) -> Tensor:
        """What a padded tensor holds at the weight's places, in its shape: a view of it where no column has moved."""
        a = self.masters[name]
        if name == FIRST and self.columns is not None:
            return padded[: len(a)].index_select(1, self.columns)
        return padded[: a.shape[0], : a.shape[1]] if a.ndim == 2 else padded[: a.shape[0]]

    def update_lists(self, with_copies: bool) -> tuple[list[str], list[Tensor]]:
        """Names of the deep weights whose update writes a copy, or writes none, and the copies' rows that are no
        padding. A first layer whose columns have moved is for `scatter_first` to copy.
        """
        copies = dict(self.copies)
        if self.columns is not None:
            del copies[FIRST]
            if self._first_copy is not None:
                copies[FIRST] = self._first_copy
        names = [n for n in self.masters if n.startswith("deep.") and (n in copies) == with_copies]
        return names, [self._rows(n, copies[n]) for n in names] if with_copies else []


def _moved(spec: FeatureSpec, tables: Sequence[int], numerics: Sequence[int]) -> list[int]:
    """Where each column of the model's deep input goes, given the new places of tables and numerics."""
    moved = list(range(spec.deep_width))
    for old, new, dim in zip(spec.table_columns, tables, spec.dims):
        moved[old : old + dim] = range(new, new + dim)
    for old, new in zip(spec.numeric_columns, numerics):
        moved[old] = new
    return moved
