"""The hidden layers of the GPU step, by either of two routes: cuBLASLt products with our passes around them (any GPU),
or products with everything fused into them (Hopper; half types and TF32).
"""

import logging

import torch
from torch import Tensor

from widedeep import ops
from widedeep.errors import RunError
from widedeep.ops import linear_sm90
from widedeep.ops.linear import bit_row_bytes
from widedeep.step import PRECISIONS
from widedeep.steps.padded import PaddedWeights

log = logging.getLogger(__name__)

# Largest difference between the two routes, relative to the largest value: two roundings of the half type; and the
# share of elements on whose mask they may differ, values that round to 0 in one of them.
AGREEMENT = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 4e-3}  # float32: with TF32 operands
MASK_AGREEMENT = 2e-3
REPEATS = 8  # runs whose bits must be those of the first


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
        for i, target in enumerate(self.transposed):
            target.copy_(self._layer(i)[0].t())

    def forward(self, i: int, x: Tensor, p: float, seed: int, step: Tensor, first_row: int, *, y: Tensor) -> None:
        weight, bias = self._layer(i)
        mask = self._mask(i, len(y)) if i < len(self.masks) else None
        linear_sm90.linear_sm90_out(x, weight, bias, p, seed, step, i, first_row, y=y, mask=mask)

    def dgrad(
        self, i: int, dz: Tensor, x: Tensor, p: float, *, dx: Tensor, dbias: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if i:
            mask = self._mask(i - 1, len(dz))
            linear_sm90.linear_sm90_dgrad_out(dz, self.transposed[i], mask, p, dx=dx, dbias=dbias)
        else:
            linear_sm90.linear_sm90_dgrad_out(
                dz, self.transposed[0], None, 0.0, dx=dx, dbias=dbias, found_inf=found_inf
            )

    def _mask(self, i: int, rows: int) -> Tensor:
        return self.masks[i][: linear_sm90.mask_bytes(rows, self.weights.widths[i + 1])]


def choose_layers(gemm: str, weights: PaddedWeights, precision: str, p: float, rows: int) -> Layers:
    """The route that `gemm` names; "auto" takes the Hopper products where they run and agree with the library's.

    Args:
        precision: of the step; "fp32" has the library's products alone.
        rows: of the batches to come: the two are compared on random data of that size.
    Raises:
        RunError: the Hopper products do not come to an end; this process can then no longer use the GPU.
    """
    device, dtype = weights.flat.device, PRECISIONS[precision]
    fits = precision != "fp32" and len(weights.widths) > 1 and linear_sm90.available(device)
    if gemm == "cublaslt" or not fits:
        return Layers(weights)
    if gemm == "auto":
        for I, O in sorted(set(zip(weights.widths, weights.widths[1:]))):
            if problem := _tested(max(rows, 1), I, O, dtype, p, device):
                log.warning("hidden layers: cuBLASLt, because the Hopper products disagree with it: %s", problem)
                return Layers(weights)
    return Sm90Layers(weights)


def _tested(*layer) -> str | None:
    try:
        return disagreement(*layer)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"the matrix products for Hopper GPUs failed their first run ({str(error).splitlines()[0]}); with the "
            "environment variable WIDEDEEP_SM90=0 the run goes without them."
        ) from error


def disagreement(B: int, I: int, O: int, dtype: torch.dtype, p: float, device: torch.device) -> str | None:
    """What differs between the two routes on a random layer [B, I] -> [B, O] and the gradients back through it, or
    between two runs of ours.
    """
    g = torch.Generator(device).manual_seed(B)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(scale)

    x, weight, bias, dz = random(B, I), random(O, I, scale=I**-0.5), random(O, scale=0.1), random(B, O)
    upper = random(O, O, scale=O**-0.5)  # the layer above: its input's gradient goes through the mask
    step, tolerance, where = torch.full((1,), 3, device=device), AGREEMENT[dtype], f"of [{B}, {I}] x [{O}, {I}]"
    dropout = (p, 11, step, 2, 5)
    want, got = random(B, O), random(B, O)
    mask = torch.empty(linear_sm90.mask_bytes(B, O), dtype=torch.uint8, device=device)
    ops.linear_relu_dropout_out(x, weight, bias, *dropout, y=want)
    linear_sm90.linear_sm90_out(x, weight, bias, *dropout, y=got, mask=mask)
    if ((want > 0) != (got > 0)).sum() > MASK_AGREEMENT * want.numel() + 8:
        return f"the mask {where}"
    if _relative(got, want) > tolerance:
        return f"the output {where}"
    sums = [torch.empty(O, device=device) for _ in range(2)]
    dx = [torch.empty_like(want) for _ in range(2)]
    # Both look through the same y, so that its rounding plays no part.
    ops.linear_dgrad_out(dz, upper, got, p, dx=dx[0], dbias=sums[0])
    linear_sm90.linear_sm90_dgrad_out(dz, upper.t().contiguous(), mask, p, dx=dx[1], dbias=sums[1])
    if _relative(dx[1], dx[0]) > tolerance:
        return f"the gradient {where}"
    noise = tolerance / 2 * B**0.5  # roundings of B terms of the order of 1; a tile left out makes ten times as much
    if not (sums[1] - sums[0]).abs().max() <= noise + tolerance * 4:
        return f"the bias gradient {where}"
    del dx
    return _input_gradient(dz, weight, tolerance, where) or _repeats(x, weight, bias, dropout, got, where)


def _input_gradient(dz: Tensor, weight: Tensor, tolerance: float, where: str) -> str | None:
    """As `disagreement`: the first layer's, which looks through no mask and says whether it is finite."""
    dx = [dz.new_empty(len(dz), weight.shape[1]) for _ in range(2)]
    found, weight_t = torch.zeros(1, device=dz.device), weight.t().contiguous()
    ops.linear_dgrad_out(dz, weight, None, 0.0, dx=dx[0], dbias=None)
    asked = None if dz.dtype == torch.float32 else found
    linear_sm90.linear_sm90_dgrad_out(dz, weight_t, None, 0.0, dx=dx[1], dbias=None, found_inf=asked)
    if _relative(dx[1], dx[0]) > tolerance:
        return f"the input's gradient {where}"
    if dz.dtype == torch.float32:  # of which nobody asks whether it is finite
        return None
    dz[-1, -1] = float("inf")
    after = torch.zeros(1, device=dz.device)
    linear_sm90.linear_sm90_dgrad_out(dz, weight_t, None, 0.0, dx=dx[1], dbias=None, found_inf=after)
    return None if found == 0 and after == 1 else f"whether the input's gradient is finite {where}"


def _repeats(x: Tensor, weight: Tensor, bias: Tensor, dropout: tuple, got: Tensor, where: str) -> str | None:
    """As `disagreement`: a race shows in bits that change from run to run."""
    again = torch.empty_like(got)
    for _ in range(REPEATS):
        linear_sm90.linear_sm90_out(x, weight, bias, *dropout, y=again, mask=None)
        if not torch.equal(again, got):
            return f"the output of two runs {where}"
    return None


def _relative(got: Tensor, want: Tensor) -> float:
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
    return error if error == error else float("inf")
