"""The dynamic loss scale, on the device: whether gradients are finite, and what follows for the scale.

The rule stands in csrc/core/loss_scale.h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep import _load  # noqa: F401  registers torch.ops.widedeep

_ops = torch.ops.widedeep


def check_finite_(tensors: Sequence[Tensor], found_inf: Tensor) -> None:
    """Set found_inf to 1 if any element is infinite or NaN; leave it as it is otherwise.

    Args:
        tensors:   float32, float16 or bfloat16, contiguous.
        found_inf: one float32.
    Raises:
        RuntimeError: wrong dtype, device or stride.
    """
    _ops.check_finite_.default(tensors, found_inf)


def loss_scale_update_(
    scale: Tensor,
    good_steps: Tensor,
    updates: Tensor,
    found_inf: Tensor,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> None:
    """Move the dynamic loss scale: down after an overflow (never below 1), up after `interval` good steps in a row; and
    count the update, if it was made.

    Args:
        scale, good_steps: one float32 and one int32, both updated.
        updates:           one int64: one up unless the step was skipped; the `step` of the next row updates.
        found_inf:         one float32; != 0 says that this step's gradients were not finite.
    Raises:
        RuntimeError: wrong shape, dtype or device.
    """
    _ops.loss_scale_update_.default(scale, good_steps, updates, found_inf, growth, backoff, interval)


# These ops return nothing, so that on fake tensors there is nothing to do.
for _name in ("check_finite_", "loss_scale_update_"):
    torch.library.register_fake(f"widedeep::{_name}", lambda *args: None)
