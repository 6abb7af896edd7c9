"""Hidden layers on Hopper GPUs with everything fused into the product: bias, ReLU, dropout, the mask and the bias
gradient.

The same results as widedeep.ops.linear to rounding; the operands of a product in float32 are rounded to TF32. A mask
keeps one bit for each element of y (kept and positive), in an order that only linear_sm90_dgrad_out of the same shape
reads.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep import _load

_ops = torch.ops.widedeep

LINKS = 8  # layers in one call at most


def available(device: torch.device) -> bool:
    """Whether the kernels of this file run on the device: compute capability 9.0, the CUDA library loaded, and not
    WIDEDEEP_SM90=0 in the environment, which leaves them out."""
    if device.type != "cuda" or not _load.has_cuda_kernels or os.environ.get("WIDEDEEP_SM90") == "0":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def mask_bytes(rows: int, columns: int) -> int:
    """Size of a mask for an activation [rows, columns]: whole tiles of 256 x 256, one bit an element."""
    return -(-rows // 256) * -(-columns // 256) * 256 * 32


def linear_sm90_out(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    p: float,
    seed: int,
    step: Tensor,
    layer: int,
    first_row: int,
    rounds_ahead: int = 2,
    *,
    y: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> None:
    """Write y[i] = dropout(relu(x weights[i]^T + biases[i])), where x is y[i - 1] from the second layer on, and the
    masks of what was kept. One launch, in which a layer's tiles begin as soon as the rows that they read are there; the
    bits are those of a call for each layer.

    Args:
        x:       [B, K], float32, float16 or bfloat16, contiguous, as all that follow.
        weights: 1 to LINKS of [N, K], each N the K of the next, all multiples of 8.
        biases:  [N] for each.
        p, seed, step, first_row: as in widedeep.ops.linear.linear_relu_dropout, which keeps the same elements.
        layer:   the number of the first layer, as there; the others follow.
        rounds_ahead: tiles that every multiprocessor works on between what a layer writes and what the next one reads
            of it, from 1 on: with fewer it lies in the L2 cache still, with more nobody waits. The bits are the same.
        y:       [B, N] for each, overwritten; x and all of them apart in memory.
        masks:   [mask_bytes(B, N)] uint8 for each of the first layers, overwritten; of the others none is kept.
    Raises:
        RuntimeError: wrong shape, dtype, device, stride or alignment (16 bytes); x and y share memory; p or layer out
            of range; a GPU other than compute capability 9.0.
    """
    dropout = (p, seed, step, layer, first_row)
    _ops.linear_sm90_out.default(x, weights, biases, *dropout, rounds_ahead, y=y, masks=masks)


def linear_sm90_dgrad_out(
    dz: Tensor,
    weights_t: Sequence[Tensor],
    masks: Sequence[Tensor],
    p: float,
    rounds_ahead: int = 2,
    *,
    dx: Sequence[Tensor],
    dbias: Sequence[Tensor],
    found_inf: Tensor | None = None,
) -> None:
    """Write dx[i] = dz weight, where dz is dx[i - 1] from the second layer on, masked and scaled by what dropout and
    ReLU of the layer below kept, and its column sums. One launch, as linear_sm90_out.

    Args:
        dz:        [B, K] float32, float16 or bfloat16.
        weights_t: 1 to LINKS of [N, K], the transposed weights, the last layer's first.
        masks:     for each of the first ones the mask that linear_sm90_out wrote with y [B, N]; others: plain products.
        p:         dropout of the masks' layers, in [0, 1).
        rounds_ahead: as linear_sm90_out.
        dx:        [B, N] for each, overwritten; dz and all of them apart in memory.
        dbias:     [N] float32 for each of the first ones, all with a mask, overwritten with the column sums of the
            rounded dx. In half types four rows at a time are first added in that type, so a dx above a quarter of its
            range gives infinite sums.
        found_inf: one float32, set to 1 when an element of a dx without a mask (a half dtype) is not finite.
    Raises:
        RuntimeError: as linear_sm90_out; a dbias without mask; found_inf where every dx has a mask.
    """
    outputs = {"dx": dx, "dbias": dbias, "found_inf": found_inf}
    _ops.linear_sm90_dgrad_out.default(dz, weights_t, masks, p, rounds_ahead, **outputs)


for _name in ("linear_sm90_out", "linear_sm90_dgrad_out"):
    torch.library.register_fake(f"widedeep::{_name}", lambda *args, **kwargs: None)
