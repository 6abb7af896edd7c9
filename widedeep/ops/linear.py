"""Hidden layers: y = dropout(relu(x weight^T + bias)) and its gradients, each one product with the rest fused into it.

Dropout is not stored: the keep bit of (seed, step, layer, first_row + row, column) comes from a counter
(docs/architecture.md, "Dropout"), and y > 0 tells the gradient what was kept: it looks at y again, or at one bit for
each of its elements, which the forward pass leaves when asked (`bit_row_bytes`). On a CPU the products are our own: any
sizes, the same bits for any number of threads, float32 inside whatever the storage. Where the CPU multiplies bfloat16,
that type goes through torch's products, then our passes (`widedeep._load.bf16_products`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep import _load  # noqa: F401  registers torch.ops.widedeep

_ops = torch.ops.widedeep


def linear_relu_dropout(
    x: Tensor, weight: Tensor, bias: Tensor, p: float, seed: int, step: Tensor, layer: int, first_row: int = 0
) -> Tensor:
    """Return dropout(relu(x weight^T + bias)); differentiable in x, weight and bias, once.

    Args:
        x:         [B, I] float32, float16 or bfloat16, contiguous.
        weight:    [O, I] in x's dtype, contiguous.
        bias:      [O] in x's dtype or float32.
        p:         probability of dropping an element, in [0, 1), rounded to a multiple of 1/32768; 0: no dropout.
        seed:      64 bits that choose the run's masks.
        step:      one int64 on x's device; read when the op runs, so that a captured CUDA graph draws new masks.
        layer:     index of the layer, in [0, 256).
        first_row: position of row 0 within the global batch.
    Returns:
        [B, O] in x's dtype, new tensor.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; p or layer out of range.
    """
    return _ops.linear_relu_dropout.default(x, weight, bias, p, seed, step, layer, first_row)


def bit_row_bytes(columns: int) -> int:
    """Bytes of a row of bits, one for each of `columns` elements: whole 32-bit words, zeros past the last column.
    Column n is bit n % 8 of byte n // 8.
    """
    return -(-columns // 32) * 4


def linear_relu_dropout_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: int,
    step: Tensor,
    layer: int,
    first_row: int,
    *,
    y: Tensor,
    bits: Tensor | None = None,
) -> None:
    """Write linear_relu_dropout into y. Not differentiable.

    Args:
        x, weight, bias, p, seed, step, layer, first_row: as for linear_relu_dropout.
        y:    [B, O] in x's dtype, overwritten; must not overlap x.
        bits: [B, bit_row_bytes(O)] uint8, overwritten with whether y > 0; None: not wanted.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; p or layer out of range.
    """
    _ops.linear_relu_dropout_out.default(x, weight, bias, p, seed, step, layer, first_row, y=y, bits=bits)


def linear_dgrad_out(
    dz: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    p: float,
    *,
    dx: Tensor,
    dbias: Tensor | None,
    bits: Tensor | None = None,
) -> None:
    """Write the gradient of a layer's input: dx = dz weight, seen through the layer below when its output is given.

    Args:
        dz:     [B, O] float32, float16 or bfloat16, contiguous: gradient of the layer's product x weight^T + bias.
        weight: [O, I] in dz's dtype.
        mask:   [B, I] in dz's dtype: the layer's input, where it is itself the output of relu and dropout. dx is then
                multiplied by 32768 / (32768 - round(32768 p)) where mask > 0 and set to 0 elsewhere: the gradient of
                the lower layer's product.
        p:      the lower layer's dropout, in [0, 1).
        dx:     [B, I] in dz's dtype, overwritten; must not overlap dz.
        dbias:  [I] float32 or None, overwritten with the column sums of dx.
        bits:   [B, bit_row_bytes(I)] uint8 or None: instead of a mask, the bits that linear_relu_dropout_out wrote for
                the layer's input.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; p out of range; both a mask and bits.
    """
    _ops.linear_dgrad_out.default(dz, weight, mask, p, dx=dx, dbias=dbias, bits=bits)


def linear_wgrad_out(dz: Tensor, x: Tensor, *, dweight: Tensor) -> None:
    """Write the gradient of a layer's weight: dweight = dz^T x.

    Args:
        dz, x:   [B, O] and [B, I], of one dtype (float32, float16 or bfloat16), contiguous.
        dweight: [O, I] float32, overwritten.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride.
    """
    _ops.linear_wgrad_out.default(dz, x, dweight=dweight)


def allow_tf32_(like: Tensor, allow: bool) -> None:
    """Say whether float32 products of the `linear_*` ops on GPUs round their operands to TF32: for the whole process,
    until it is said otherwise; at first they do not.

    Args:
        like: any tensor on a GPU.
    Raises:
        RuntimeError: `like` is on a CPU, which has no TF32.
    """
    _ops.allow_tf32_.default(like, allow)


def transpose_out(matrices: Sequence[Tensor], *, out: Sequence[Tensor]) -> None:
    """Write transposed copies: out[i] = matrices[i]^T, all of them in one launch on a GPU.

    Args:
        matrices: at least one, [rows, columns], of one dtype (float32, float16 or bfloat16), contiguous.
        out:      as many, [columns, rows], overwritten; must not overlap the matrices.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; lists of different lengths; on a GPU a view that does not
            start at a multiple of 16 bytes.
    """
    _ops.transpose_out.default(matrices, out=out)


@torch.library.register_fake("widedeep::linear_relu_dropout")
def _(x, weight, bias, p, seed, step, layer, first_row):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("widedeep::linear_relu_dropout_backward")
def _(dy, y, x, weight, p):
    return (
        torch.empty_like(x),
        weight.new_empty(weight.shape, dtype=torch.float32),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )


for _name in ("linear_relu_dropout_out", "linear_dgrad_out", "linear_wgrad_out", "allow_tf32_", "transpose_out"):
    torch.library.register_fake(f"widedeep::{_name}", lambda *args, **kwargs: None)


def _save(ctx, inputs, output):
    x, weight, bias, p = inputs[:4]
    ctx.save_for_backward(x, weight, output)
    ctx.p = p
    ctx.bias_dtype = bias.dtype


def _backward(ctx, dy):
    x, weight, y = ctx.saved_tensors
    dx, dweight, dbias = _ops.linear_relu_dropout_backward.default(dy.contiguous(), y, x, weight, ctx.p)
    return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None, None, None, None


def _twice(ctx, *gradients):
    raise RuntimeError("linear_relu_dropout has no second derivative")


torch.library.register_autograd("widedeep::linear_relu_dropout", _backward, setup_context=_save)
torch.library.register_autograd("widedeep::linear_relu_dropout_backward", _twice)
