"""The output layer, and the loss with all its gradients in one pass over the last hidden activation; the gradient of
the wide numerics.
"""

import torch
from torch import Tensor

from widedeep import _load  # noqa: F401  registers torch.ops.widedeep

_ops = torch.ops.widedeep


def head_forward(h: Tensor, weight: Tensor, bias: Tensor, wide_logit: Tensor) -> Tensor:
    """Return the logit of every row: h . weight + bias + wide_logit, in float32.

    Args:
        h:          [B, H] float32, float16 or bfloat16, contiguous.
        weight:     [1, H] float32.
        bias:       [1] float32.
        wide_logit: [B] float32.
    Returns:
        [B] float32 log-odds, new tensor.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; on a GPU H above 2048, or above 1024 and no multiple of 8.
    Notes: differentiable in every argument.
    """
    return _ops.head_forward.default(h, weight, bias, wide_logit)


def head_forward_out(h: Tensor, weight: Tensor, bias: Tensor, wide_logit: Tensor, *, logit: Tensor) -> None:
    """Write what `head_forward` returns into logit, [B] float32; without gradients."""
    _ops.head_forward_out.default(h, weight, bias, wide_logit, logit=logit)


def head_step_out(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    wide_logit: Tensor,
    label: Tensor,
    global_rows: int,
    p: float,
    loss_scale: Tensor | None = None,
    *,
    logit: Tensor,
    dlogit: Tensor,
    dz: Tensor,
    dbias_hidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    loss: Tensor,
) -> None:
    """Write the logits, this rank's share of the mean loss, and its gradients down to the last hidden layer's product.

    logit = head_forward(...); loss = sum over the B rows of (max(z, 0) - z y + log(1 + exp(-|z|))) / global_rows. All
    gradients are of loss times loss_scale.

    Args:
        h:            [B, H] float32, float16 or bfloat16: the last hidden layer after relu and dropout.
        weight, bias, wide_logit: as for head_forward.
        label:        [B] float32, 0 or 1.
        global_rows:  rows of the global batch, whose mean the loss is.
        p:            dropout of the last hidden layer, in [0, 1); 32768 / (32768 - round(32768 p)) is its scale s.
        loss_scale:   one float32, or None for 1.
        logit:        [B] float32, overwritten, as all that follow.
        dlogit:       [B] float32: loss_scale (sigmoid(z) - y) / global_rows.
        dz:           [B, H] in h's dtype: dlogit weight s where h > 0, else 0: the gradient of the last hidden layer's
                      x weight^T + bias. It may be h, which is then overwritten.
        dbias_hidden: [H] float32: column sums of dz, before they are rounded to its dtype.
        dweight:      [1, H] float32; dbias: [1] float32: gradients of the output layer.
        loss:         one float32, without loss_scale.
    Raises:
        RuntimeError: as head_forward; p or global_rows out of range.
    Notes: the order of every sum is fixed, so the bits repeat, for any number of threads.
    """
    outputs = {"logit": logit, "dlogit": dlogit, "dz": dz, "dbias_hidden": dbias_hidden}
    outputs |= {"dweight": dweight, "dbias": dbias, "loss": loss}
    _ops.head_step_out.default(h, weight, bias, wide_logit, label, global_rows, p, loss_scale, **outputs)


def wide_numeric_backward_out(numeric: Tensor, dlogit: Tensor, *, dweight: Tensor, dbias: Tensor) -> None:
    """Write the gradients of the wide part's numeric weights and bias: dweight = dlogit numeric, dbias = sum of dlogit.

    Args:
        numeric: [B, N] float32, contiguous; on a GPU N is at most 256.
        dlogit:  [B] float32: gradient of the logits.
        dweight: [N] float32, overwritten.
        dbias:   [1] float32, overwritten.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride.
    Notes: as head_step_out, the bits repeat.
    """
    _ops.wide_numeric_backward_out.default(numeric, dlogit, dweight=dweight, dbias=dbias)


@torch.library.register_fake("widedeep::head_forward")
def _(h, weight, bias, wide_logit):
    return wide_logit.new_empty(h.shape[0])


for _name in ("head_forward_out", "head_step_out", "wide_numeric_backward_out"):
    torch.library.register_fake(f"widedeep::{_name}", lambda *args, **outputs: None)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx, dlogit):
    h, weight = ctx.saved_tensors
    dh = (dlogit[:, None] * weight).to(h.dtype)
    return dh, dlogit[None] @ h.float(), dlogit.sum(0, keepdim=True), dlogit


torch.library.register_autograd("widedeep::head_forward", _backward, setup_context=_save)
