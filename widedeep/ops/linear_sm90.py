"""Hidden layers on Hopper GPUs with everything fused into the product: bias, ReLU, dropout, the mask and the bias
gradient.

The same results as widedeep.ops.linear to rounding; the operands of a product in float32 are rounded to TF32. A mask
keeps one bit for each element of y (kept and positive), in an order that only linear_sm90_dgrad_out of the same shape
reads.
"""

import os

import torch
from torch import Tensor

import widedeep._load

_ops = torch.ops.widedeep


def available(device: torch.device) -> bool:
    """Whether the kernels of this file run on the device: compute capability 9.0, the CUDA library loaded, and not
    WIDEDEEP_SM90=0 in the environment, which leaves them out."""
    if device.type != "cuda" or not widedeep._load.has_cuda_kernels or os.environ.get("WIDEDEEP_SM90") == "0":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def mask_bytes(rows: int, columns: int) -> int:
    """Size of a mask for an activation [rows, columns]: whole tiles of 256 x 256, one bit an element."""
    return -(-rows // 256) * -(-columns // 256) * 256 * 32


def linear_sm90_out(
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
    mask: Tensor | None,
) -> None:
    """Write y = dropout(relu(x weight^T + bias)) and the mask of what was kept.

    Args:
        x, weight, bias: [B, I], [O, I], [O], one of float32, float16, bfloat16, contiguous, I and O multiples of 8.
        p, seed, step, layer, first_row: as in widedeep.ops.linear.linear_relu_dropout.
        y:    [B, O], overwritten.
        mask: [mask_bytes(B, O)] uint8, overwritten; None: not kept.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; a GPU other than compute capability 9.0.
    """
    _ops.linear_sm90_out.default(x, weight, bias, p, seed, step, layer, first_row, y=y, mask=mask)


def linear_sm90_dgrad_out(
    dz: Tensor,
    weight_t: Tensor,
    mask: Tensor | None,
    p: float,
    *,
    dx: Tensor,
    dbias: Tensor | None,
    found_inf: Tensor | None = None,
) -> None:
    """Write dx = dz weight, masked and scaled by what dropout and ReLU of the layer below kept, and its column sums.

    Args:
        dz:       [B, O] float32, float16 or bfloat16.
        weight_t: [I, O], the transposed weight.
        mask:     the mask that linear_sm90_out wrote with y [B, I]; None: the plain product.
        p:        dropout of the layer below, in [0, 1).
        dx:       [B, I], overwritten.
        dbias:    [I] float32, overwritten with the column sums of dx as rounded, or None.
        found_inf: one float32, set to 1 when an element of dx (a half dtype) is not finite; without a mask.
    Raises:
        RuntimeError: as linear_sm90_out; a mask and found_inf.
    """
    _ops.linear_sm90_dgrad_out.default(dz, weight_t, mask, p, dx=dx, dbias=dbias, found_inf=found_inf)


for _name in ("linear_sm90_out", "linear_sm90_dgrad_out", "allow_tf32_"):
    torch.library.register_fake(f"widedeep::{_name}", lambda *args, **kwargs: None)
