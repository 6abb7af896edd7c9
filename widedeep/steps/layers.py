"""The hidden layers of the GPU step, by one of three routes: cuBLASLt products with our passes around them (any GPU),
or products with everything fused into them (Hopper; half types and TF32), a launch for each or one for all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from widedeep import ops
from widedeep.ops import linear_sm90
from widedeep.ops.linear import bit_row_bytes
from widedeep.steps.padded import PaddedWeights


class Dropout(NamedTuple):
    """As in widedeep.ops.linear; layers are counted from 0."""

    p: float
    seed: int
    step: Tensor
    first_row: int


class Layers:
    """cuBLASLt. With dropout, our pass over the product leaves a mask of one bit an element for the gradient; without,
    the library's own epilogue leaves none.

    Attributes:
        name: as in `base.GEMMS`.
        bits: of `trial.ROUTES`; what has the same gives the same bits.
        together: whether `dgrad` is called once for all layers, else once for each.
    """

    name = bits = "cublaslt"
    together = False

    def __init__(self, weights: PaddedWeights):
        self.weights = weights
        self.count = len(weights.widths) - 1
        self.masks: list[Tensor] = []  # of the outputs of all layers but the last, which the head looks through

    def grow(self, rows: int) -> None:
        """Makes room for batches of `rows`."""
        shapes = [(rows, bit_row_bytes(width)) for width in self.weights.widths[1:-1]]
        self.masks = [torch.empty(shape, dtype=torch.uint8, device=self.weights.flat.device) for shape in shapes]

    def refresh(self) -> None:
        """Called after every change of the weights' copies."""

    def forward(self, x: Tensor, dropout: Dropout, *, hidden: Sequence[Tensor]) -> None:
        """All layers: `hidden` are their outputs, and from the second on their inputs."""
        p, seed, step, first_row = dropout
        for i, y in enumerate(hidden):
            weight, bias = self._layer(i)
            bits = self._bits(i, len(y), p)
            ops.linear_relu_dropout_out(x, weight, bias, p, seed, step, i, first_row, y=y, bits=bits)
            x = y

    def predict(self, x: Tensor, step: Tensor, *, hidden: Sequence[Tensor]) -> None:
        """Without dropout; the library's own bias and relu cost nearly nothing there."""
        for i, y in enumerate(hidden):
            weight, bias = self._layer(i)
            ops.linear_relu_dropout_out(x, weight, bias, 0.0, 0, step, i, 0, y=y)
            x = y

    def dgrad(
        self,
        layers: Sequence[int],
        dz: Tensor,
        inputs: Sequence[Tensor],
        p: float,
        *,
        dx: Sequence[Tensor],
        dbias: Sequence[Tensor],
        found_inf: Tensor | None,
    ) -> None:
        """The gradients of the inputs of `layers`, each the one below the one before, from dz, that of the first's
        output. Layer i > 0 is seen through the layer below, whose bias gradient it sums up. Layer 0 says in `found_inf`
        whether its dx is not finite.

        Args:
            inputs: of all layers.  dx, dbias: of `layers`; layer 0 has no dbias.
        """
        for n, i in enumerate(layers):
            bits = self._bits(i - 1, len(dz), p) if i else None
            mask = inputs[i] if i and bits is None else None
            sums = dbias[n] if i else None
            ops.linear_dgrad_out(dz, self._layer(i)[0], mask, p if i else 0.0, dx=dx[n], dbias=sums, bits=bits)
            if not i and found_inf is not None:
                ops.check_finite_([dx[n]], found_inf)
            dz = dx[n]

    def _bits(self, i: int, rows: int, p: float) -> Tensor | None:
        return self.masks[i][:rows] if p and i < len(self.masks) else None

    def _layer(self, i: int) -> tuple[Tensor, Tensor]:
        return self.weights.get(f"deep.layer.{i}.weight"), self.weights.get(f"deep.layer.{i}.bias")


class Sm90Layers(Layers):
    """Our Hopper products: a mask of one bit an element goes from the forward pass to the gradient, which reads a
    transposed copy of the weight.
    """

    name = bits = "sm90"

    def __init__(self, weights: PaddedWeights):
        super().__init__(weights)
        self.transposed = [w.new_empty(w.shape[::-1]) for w, _ in map(self._layer, range(self.count))]
        self.refresh()

    def grow(self, rows: int) -> None:
        device = self.weights.flat.device
        sizes = [linear_sm90.mask_bytes(rows, width) for width in self.weights.widths[1:-1]]
        self.masks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]

    def refresh(self) -> None:
        ops.transpose_out([self._layer(i)[0] for i in range(self.count)], out=self.transposed)

    def forward(self, x: Tensor, dropout: Dropout, *, hidden: Sequence[Tensor]) -> None:
        for i, y in enumerate(hidden):
            self.launch(i, x, dropout, hidden=[y])
            x = y

    def launch(self, first: int, x: Tensor, dropout: Dropout, *, hidden: Sequence[Tensor]) -> None:
        """Layers `first` and following, as many as there are outputs in `hidden`, in one launch."""
        some = slice(first, first + len(hidden))
        weights, biases = zip(*map(self._layer, range(self.count)[some]))
        p, seed, step, first_row = dropout
        masks = self._masks(len(x))[some]
        linear_sm90.linear_sm90_out(x, weights, biases, p, seed, step, first, first_row, y=hidden, masks=masks)

    def dgrad(
        self,
        layers: Sequence[int],
        dz: Tensor,
        inputs: Sequence[Tensor],
        p: float,
        *,
        dx: Sequence[Tensor],
        dbias: Sequence[Tensor],
        found_inf: Tensor | None,
    ) -> None:
        weights = [self.transposed[i] for i in layers]
        masks = [self._masks(len(dz))[i - 1] for i in layers if i]
        found_inf = None if layers[-1] else found_inf
        linear_sm90.linear_sm90_dgrad_out(dz, weights, masks, p, dx=dx, dbias=dbias, found_inf=found_inf)

    def _masks(self, rows: int) -> list[Tensor]:
        """Those of a batch of `rows`."""
        sizes = (linear_sm90.mask_bytes(rows, width) for width in self.weights.widths[1:-1])
        return [mask[:size] for mask, size in zip(self.masks, sizes)]


class Sm90Chain(Sm90Layers):
    """The same products, all layers in one launch each way; up to `linear_sm90.LINKS` layers."""

    name = "sm90-chain"
    together = True

    def forward(self, x: Tensor, dropout: Dropout, *, hidden: Sequence[Tensor]) -> None:
        self.launch(0, x, dropout, hidden=hidden)
