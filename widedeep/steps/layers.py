"""The hidden layers of the GPU step, by either of two routes: cuBLASLt products with our passes around them (any GPU),
or products with everything fused into them (Hopper; half types and TF32).
"""

import torch
from torch import Tensor

from widedeep import ops
from widedeep.ops import linear_sm90
from widedeep.ops.linear import bit_row_bytes
from widedeep.steps.padded import PaddedWeights


class Layers:
    """cuBLASLt. `p`, `seed`, `step`, `first_row`: as in widedeep.ops.linear. With dropout, our pass over the product
    leaves a mask of one bit an element for the gradient; without, the library's own epilogue leaves none.
    """

    name = "cublaslt"

    def __init__(self, weights: PaddedWeights):
        self.weights = weights
        self.masks: list[Tensor] = []  # of the outputs of all layers but the last, which the head looks through

    def grow(self, rows: int) -> None:
        """Makes room for batches of `rows`."""
        shapes = [(rows, bit_row_bytes(width)) for width in self.weights.widths[1:-1]]
        self.masks = [torch.empty(shape, dtype=torch.uint8, device=self.weights.flat.device) for shape in shapes]

    def refresh(self) -> None:
        """Called after every change of the weights' copies."""

    def forward(self, i: int, x: Tensor, p: float, seed: int, step: Tensor, first_row: int, *, y: Tensor) -> None:
        weight, bias = self._layer(i)
        bits = self._bits(i, len(y), p)
        ops.linear_relu_dropout_out(x, weight, bias, p, seed, step, i, first_row, y=y, bits=bits)

    def predict(self, i: int, x: Tensor, step: Tensor, *, y: Tensor) -> None:
        """Without dropout; the library's own bias and relu cost nearly nothing there."""
        weight, bias = self._layer(i)
        ops.linear_relu_dropout_out(x, weight, bias, 0.0, 0, step, i, 0, y=y)

    def dgrad(
        self, i: int, dz: Tensor, x: Tensor, p: float, *, dx: Tensor, dbias: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Of the input x of layer i, seen through the layer below unless i is 0. Layer 0 says in `found_inf` whether
        its dx is not finite.
        """
        bits = self._bits(i - 1, len(dz), p) if i else None
        mask = x if i and bits is None else None
        ops.linear_dgrad_out(dz, self._layer(i)[0], mask, p if i else 0.0, dx=dx, dbias=dbias, bits=bits)
        if not i and found_inf is not None:
            ops.check_finite_([dx], found_inf)

    def _bits(self, i: int, rows: int, p: float) -> Tensor | None:
        return self.masks[i][:rows] if p and i < len(self.masks) else None

    def _layer(self, i: int) -> tuple[Tensor, Tensor]:
        return self.weights.get(f"deep.layer.{i}.weight"), self.weights.get(f"deep.layer.{i}.bias")


class Sm90Layers(Layers):
    """Our Hopper products: a mask of one bit an element goes from the forward pass to the gradient, which reads a
    transposed copy of the weight.
    """

    name = "sm90"

    def __init__(self, weights: PaddedWeights):
        super().__init__(weights)
        count = len(weights.widths) - 1
        self.transposed = [torch.empty_like(self._layer(i)[0].t().contiguous()) for i in range(count)]
        self.refresh()

    def grow(self, rows: int) -> None:
        device = self.weights.flat.device
        sizes = [linear_sm90.mask_bytes(rows, width) for width in self.weights.widths[1:-1]]
        self.masks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]

    def refresh(self) -> None:
        ops.transpose_out([self._layer(i)[0] for i in range(len(self.transposed))], out=self.transposed)

    def forward(self, i: int, x: Tensor, p: float, seed: int, step: Tensor, first_row: int, *, y: Tensor) -> None:
        weight, bias = self._layer(i)
        mask = self._mask(i, len(y)) if i < len(self.masks) else None
        linear_sm90.linear_sm90_out(x, weight, bias, p, seed, step, i, first_row, y=y, mask=mask)

    def dgrad(
        self, i: int, dz: Tensor, x: Tensor, p: float, *, dx: Tensor, dbias: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if i:
            mask, outputs = self._mask(i - 1, len(dz)), {"dx": dx, "dbias": dbias, "found_inf": None}
        else:
            mask, p, outputs = None, 0.0, {"dx": dx, "dbias": dbias, "found_inf": found_inf}
        linear_sm90.linear_sm90_dgrad_out(dz, self.transposed[i], mask, p, **outputs)

    def _mask(self, i: int, rows: int) -> Tensor:
        return self.masks[i][: linear_sm90.mask_bytes(rows, self.weights.widths[i + 1])]
