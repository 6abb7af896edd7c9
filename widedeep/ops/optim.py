"""Optimizer updates, in place.

The rules of one element stand in csrc/core/rmsprop.h and csrc/core/ftrl.h. Every `lr`, `step`, `grad_scale` and
`found_inf` that is a tensor has one element and lives on the weights' device, so that a captured CUDA graph reads the
value of the day. Gradients are divided by `grad_scale` (the loss scale they were multiplied by); with `found_inf` != 0
nothing is written. All updates give the same bits for any number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep import _load  # noqa: F401  registers torch.ops.widedeep

_ops = torch.ops.widedeep


def rmsprop_dense_(
    weights: Sequence[Tensor],
    rms: Sequence[Tensor],
    grads: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: Tensor,
    rho: float,
    eps: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update dense parameters by RMSprop: rms = rho rms + (1 - rho) g^2; w = w - lr g / (sqrt(rms) + eps).

    Args:
        weights: float32 tensors of any shape, contiguous; updated.
        rms:     mean squares, of the weights' shapes, float32; updated.
        grads:   gradients with as many elements, float32, float16 or bfloat16, contiguous.
        copies:  empty, or one tensor per weight in any of these types that receives the new weight. On a GPU a
                 matrix's gradient and copy may have longer rows than the weight (padding, which is not touched).
        lr:      one float32.
    Raises:
        RuntimeError: lists of different lengths, wrong shape, dtype or stride.
    """
    _ops.rmsprop_dense_.default(weights, rms, grads, copies, lr, rho, eps, grad_scale, found_inf)


def rmsprop_rows_(
    weight: Tensor,
    rms: Tensor,
    last_step: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: Tensor,
    step: Tensor,
    rho: float,
    eps: float,
) -> None:
    """Update the listed rows of a table by RMSprop, exactly as if every other row's rms were decayed in every step.

    A row that missed k steps is first multiplied by rho^k. Equal rows are summed, in the order listed, before the
    update.

    Args:
        weight:    [R, D] float32, updated in the listed rows.
        rms:       [R, D] float32, as of each row's last_step; updated in the listed rows.
        last_step: [R] int32, the step of each row's last update; any value < step before its first (rms is 0 then).
        rows:      [n] int64, any order, duplicates allowed; -1 is skipped.
        grads:     [n, D] float32.
        lr, step:  one float32; one int64, counted from 0 by the caller, one up per update.
    Raises:
        RuntimeError: wrong shape, dtype or stride; on a CPU also a row outside [-1, R).
    """
    _ops.rmsprop_rows_.default(weight, rms, last_step, rows, grads, lr, step, rho, eps)


def rmsprop_settle_(rms: Tensor, last_step: Tensor, step: Tensor, rho: float) -> None:
    """Decay every row's rms to what a dense optimizer holds after `step`.

    rms *= rho^(step - last_step); last_step = step.

    Args:
        rms, last_step: [R, D] float32 and [R] int32, both updated.
        step:           one int64; no row's last_step may lie after it.
    Raises:
        RuntimeError: wrong shape, dtype or stride.
    """
    _ops.rmsprop_settle_.default(rms, last_step, step, rho)


def ftrl_dense_(
    weight: Tensor,
    accum: Tensor,
    linear: Tensor,
    grad: Tensor,
    lr: float,
    l1: float = 0.0,
    l2: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update a dense parameter by FTRL-proximal (learning-rate power -0.5), as TensorFlow's ApplyFtrl.

    Args:
        weight, accum, linear: float32, of one shape, contiguous; updated.
        grad:                  float32, of the same shape.
    Raises:
        RuntimeError: wrong shape, dtype or stride; lr is not above 0.
    """
    _ops.ftrl_dense_.default(weight, accum, linear, grad, lr, l1, l2, grad_scale, found_inf)


def ftrl_rows_(
    weight: Tensor,
    accum: Tensor,
    linear: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    l1: float = 0.0,
    l2: float = 0.0,
) -> None:
    """Update the listed rows by FTRL-proximal; other rows keep weight and state. Equal rows are summed first.

    Args:
        weight, accum, linear: [R] or [R, D] float32, updated in the listed rows.
        rows:                  [n] int64, any order, duplicates allowed; -1 is skipped.
        grads:                 [n] or [n, D] float32.
    Raises:
        RuntimeError: wrong shape, dtype or stride; lr is not above 0; on a CPU also a row outside [-1, R).
    """
    _ops.ftrl_rows_.default(weight, accum, linear, rows, grads, lr, l1, l2)


# These ops return nothing, so that on fake tensors there is nothing to do.
for _name in (
    "rmsprop_dense_",
    "rmsprop_rows_",
    "rmsprop_settle_",
    "ftrl_dense_",
    "ftrl_rows_",
):
    torch.library.register_fake(f"widedeep::{_name}", lambda *args: None)
