"""The arrays of the fused step: allocated once, grown when a larger batch comes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep.model import WideDeep
from widedeep.share import is_table


class Activations:
    """Inputs of every layer and gradients of layer inputs, of up to `capacity` rows; views of B rows are contiguous.

    Attributes:
        apart: whether the gradients of all layers are kept at once, that of the last output in the output's own place;
            else two buffers take turns, which needs less memory. Only for models with hidden layers.
        wide_logit, logit, dlogit: [capacity] float32.  loss: [1].  unused_bias: [W], for an output that nobody reads.
    """

    def __init__(self, width: int, hidden: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.widths = (width, *hidden)
        self.dtype = dtype
        self.device = device
        self.loss = torch.zeros(1, device=device)
        self.unused_bias = torch.zeros(width, device=device)
        self.apart = False
        self.capacity = -1
        self.grow(0)

    def grow(self, rows: int) -> None:
        """Makes room for `rows`; what the buffers held is lost."""
        if rows <= self.capacity:
            return
        self.capacity = rows
        self.inputs = [torch.empty(rows, width, dtype=self.dtype, device=self.device) for width in self.widths]
        self._make_gradients()
        self.wide_logit, self.logit, self.dlogit = (torch.empty(rows, device=self.device) for _ in range(3))

    def keep_apart(self, apart: bool) -> None:
        """Sets `apart`; what the gradients held is lost where it changes."""
        if apart != self.apart:
            self.apart = apart
            self._make_gradients()

    def _make_gradients(self) -> None:
        self.gradients: list[Tensor] = []  # drops the old ones first, so that the new ones can have their memory
        # Going back, layer i reads one gradient and writes the other.
        sizes = self.widths[:-1] if self.apart else [max(self.widths)] * 2
        device = self.device
        self.gradients = [torch.empty(self.capacity * n, dtype=self.dtype, device=device) for n in sizes]

    def rows(self, B: int) -> tuple[Tensor, list[Tensor]]:
        """The deep input [B, W] and every hidden layer's output [B, H]."""
        self.grow(B)
        x, *hidden = (a[:B] for a in self.inputs)
        return x, hidden

    def gradient(self, i: int, B: int) -> Tensor:
        """The gradient of layer i's input (i = L: of the last output), [B, width]; valid until that of i - 2 is asked
        for, with `apart` for good.
        """
        if self.apart and i == len(self.widths) - 1:
            return self.inputs[i][:B]
        return self.gradients[i % len(self.gradients)][: B * self.widths[i]].view(B, self.widths[i])


class DenseGradients:
    """Gradients of all dense weights in one flat float32 buffer, so that ranks sum them in one collective.

    Attributes:
        flat: all of them.  named: views by name of the weight, of its shape.
    """

    def __init__(self, model: WideDeep):
        dense = {name: a for name, a in model.named_arrays().items() if not is_table(name)}
        sizes = [a.numel() for a in dense.values()]
        self.flat = torch.zeros(sum(sizes), device=next(iter(model.parameters())).device)
        parts = self.flat.split(sizes) if sizes else ()
        self.named = {name: part.view_as(a) for (name, a), part in zip(dense.items(), parts)}


def share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
