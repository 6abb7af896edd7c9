"""The package's own ops, `torch.ops.widedeep.*`, as documented functions. Importing registers them with torch.

Each has a fake implementation (shapes only), so they work under torch.compile and with fake tensors (sparse gradients:
see embedding_forward); those that a model calls are differentiable.
"""

from widedeep.ops import linear_sm90
from widedeep.ops.batch import gather_batch_out
from widedeep.ops.embedding import (
    Segments,
    embedding_forward,
    embedding_forward_out,
    embedding_row_gradients,
    embedding_segments,
    embedding_update_,
)
from widedeep.ops.head import head_forward, head_forward_out, head_step_out, wide_numeric_backward_out
from widedeep.ops.linear import (
    allow_tf32_,
    linear_dgrad_out,
    linear_relu_dropout,
    linear_relu_dropout_out,
    linear_wgrad_out,
    transpose_out,
)
from widedeep.ops.loss_scale import check_finite_, loss_scale_update_
from widedeep.ops.metrics import auc_histogram_
from widedeep.ops.optim import (
    ftrl_dense_,
    ftrl_rows_,
    rmsprop_dense_,
    rmsprop_rows_,
    rmsprop_settle_,
)

__all__ = [
    "Segments",
    "allow_tf32_",
    "auc_histogram_",
    "check_finite_",
    "embedding_forward",
    "embedding_forward_out",
    "embedding_row_gradients",
    "embedding_segments",
    "embedding_update_",
    "ftrl_dense_",
    "ftrl_rows_",
    "gather_batch_out",
    "head_forward",
    "head_forward_out",
    "head_step_out",
    "linear_dgrad_out",
    "linear_relu_dropout",
    "linear_relu_dropout_out",
    "linear_sm90",
    "linear_wgrad_out",
    "loss_scale_update_",
    "rmsprop_dense_",
    "rmsprop_rows_",
    "rmsprop_settle_",
    "transpose_out",
    "wide_numeric_backward_out",
]
