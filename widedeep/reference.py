"""Plain-torch oracle of the ops in `torch.ops.widedeep`: same names and arguments, any float dtype, any device. The
Hopper products have none of their own: they compute what the linear ops do.

Written to be obviously right, by other techniques than the ops: dense formulas, `index_add`, sorting, autograd. The
tests ask for float64; `--step reference` trains with it. Contracts (shapes, dtypes) stand in `widedeep/ops/`, which
never imports this file.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from widedeep.reference_order import epoch_order

_U32 = 0xFFFFFFFF


# --- dropout ----------------------------------------------------------------------------------------------------------


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int) -> list[Tensor]:
    """Philox4x32 (Salmon et al. 2011) on int64 tensors of 32-bit words; four words come back."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which keeps all the bits
        c0, c1, c2, c3 = ((p1 >> 32) & _U32) ^ c1 ^ k0, p1 & _U32, ((p0 >> 32) & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """Of 65536, an even number: an element is dropped when twice its 15 random bits are below."""
    return 2 * math.floor(p * 32768 + 0.5)


def dropout_scale(p: float) -> float:
    """Factor of kept values, of the rounded probability."""
    return 65536 / (65536 - dropout_threshold(p))


def dropout_mask(
    rows: int, columns: int, p: float, seed: int, step: Tensor | int, layer: int, first_row: int = 0, device="cpu"
) -> Tensor:
    """Which elements of a layer's output are kept: [rows, columns] bool. Layout: docs/architecture.md, "Dropout"."""
    calls = -(-columns // 8)
    word = torch.tensor(0, dtype=torch.int64, device=device)
    row = ((torch.arange(rows, device=device) + first_row) & _U32)[:, None]
    call = torch.arange(calls, device=device)[None, :]
    counter = [(row >> 1).expand(rows, calls), (layer << 24) | call, (word + step) & _U32, ((word + step) >> 32) & _U32]
    words = philox4x32(counter, [word + (seed & _U32), word + (seed >> 32 & _U32)], rounds=7)
    in_order = torch.stack([w >> shift & 0xFF for w in words for shift in (0, 8, 16, 24)], -1)  # [rows, calls, 16]
    parity = functools.reduce(torch.bitwise_xor, in_order.unbind(-1))[..., None]
    own = torch.where(row[..., None] % 2 == 0, in_order[..., :8], in_order[..., 8:])
    fifteen_bits = (own & 0x7F) * 256 + parity
    return (2 * fifteen_bits >= dropout_threshold(p)).view(rows, calls * 8)[:, :columns]


# --- hidden layers ----------------------------------------------------------------------------------------------------


def linear_relu_dropout(x, weight, bias, p, seed, step, layer, first_row):
    y = torch.relu(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))
    if dropout_threshold(p) == 0:
        return y
    keep = dropout_mask(*y.shape, p, seed, step, layer, first_row, y.device)
    return torch.where(keep, y * dropout_scale(p), 0)


def linear_relu_dropout_backward(dy, y, x, weight, p):
    dz = torch.where(y > 0, dy * dropout_scale(p), 0)
    return dz @ weight.to(dz.dtype), dz.T @ x, dz.sum(0)


def linear_relu_dropout_out(x, weight, bias, p, seed, step, layer, first_row, *, y, bits=None):
    y.copy_(linear_relu_dropout(x, weight, bias, p, seed, step, layer, first_row))
    if bits is not None:
        bits.copy_(pack_bits(y > 0))


def pack_bits(flags: Tensor) -> Tensor:
    """Rows of bools [B, N] as bytes: column n is bit n % 8 of byte n / 8, rows filled up to whole 32-bit words."""
    padded = F.pad(flags.to(torch.int64), (0, -flags.shape[1] % 32)).view(len(flags), -(-flags.shape[1] // 32) * 4, 8)
    return (padded << torch.arange(8, device=flags.device)).sum(-1).to(torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Flags [B, columns] of `pack_bits`."""
    flags = (bits[:, :, None].to(torch.int64) >> torch.arange(8, device=bits.device)) & 1
    return flags.view(len(bits), bits.shape[1] * 8)[:, :columns].bool()


def linear_dgrad_out(dz, weight, mask, p, *, dx, dbias, bits=None):
    gradient = dz @ weight.to(dz.dtype)
    if bits is not None:
        mask = unpack_bits(bits, weight.shape[1])
    if mask is not None:
        gradient = torch.where(mask > 0, gradient * dropout_scale(p), 0)
    dx.copy_(gradient)
    if dbias is not None:
        dbias.copy_(gradient.sum(0))


def transpose_out(matrices, *, out):
    for matrix, target in zip(matrices, out, strict=True):
        target.copy_(matrix.t())


def linear_wgrad_out(dz, x, *, dweight):
    dweight.copy_(dz.T @ x)


# --- embedding --------------------------------------------------------------------------------------------------------


def _per_feature(hotness):
    """(feature, first id column, id column past the last)."""
    first = 0
    for f, k in enumerate(hotness):
        yield f, first, first + k
        first += k


def embedding_forward(
    ids, numeric, tables, wide, wide_numeric, wide_bias, hotness, mean, columns, numeric_columns, width, dtype
):
    x = torch.zeros(len(ids), width, dtype=dtype, device=ids.device)
    logit = numeric.to(wide.dtype) @ wide_numeric + wide_bias
    base = 0
    for f, first, last in _per_feature(hotness):
        table = tables[f]
        index = ids[:, first:last].long()
        # A row of zeros past the end of the table stands for padding.
        safe = torch.where(index >= 0, index, len(table))
        if table.shape[1]:  # without columns the backward pass of torch's own gather faults on CUDA
            pooled = F.embedding(safe, F.pad(table, (0, 0, 0, 1))).sum(1)
            if mean[f]:
                pooled = pooled / (index >= 0).sum(1, keepdim=True).clamp(min=1)
            x[:, columns[f] : columns[f] + table.shape[1]] = pooled.to(dtype)
        logit = logit + torch.cat([wide[base : base + len(table)], wide.new_zeros(1)])[safe].sum(1)
        base += len(table)
    if len(numeric_columns):
        x[:, list(numeric_columns)] = numeric.to(dtype)
    return x, logit


def embedding_forward_out(*args, x, wide_logit):
    got = embedding_forward(*args, x.shape[1], x.dtype)
    x.copy_(got[0])
    wide_logit.copy_(got[1])


def embedding_segments(ids, hotness, rows):
    n = ids.numel()
    base = torch.tensor([sum(rows[:f]) for f, k in enumerate(hotness) for _ in range(k)], device=ids.device).long()
    flat = (ids.long() + base).reshape(-1)
    entries = torch.nonzero(ids.reshape(-1) >= 0).squeeze(1)
    order = torch.argsort(flat[entries], stable=True)
    entries = entries[order]
    distinct, counts = torch.unique(flat[entries], return_counts=True)
    used = len(distinct)

    unique = torch.full((n,), -1, dtype=torch.int32, device=ids.device)
    unique[:used] = distinct.int()
    offsets = torch.full((n + 1,), len(entries), dtype=torch.int32, device=ids.device)
    offsets[:used] = (counts.cumsum(0) - counts).int()
    padded = torch.full((n,), -1, dtype=torch.int32, device=ids.device)
    padded[: len(entries)] = entries.int()
    keys = torch.full((n,), sum(rows), dtype=torch.int32, device=ids.device)
    keys[: len(entries)] = flat[entries].int()
    ends = torch.tensor([sum(rows[:f]) for f in range(len(rows) + 1)], device=ids.device)
    return unique, offsets, padded, keys, torch.searchsorted(distinct, ends).int()


def _table_gradients(ids, dx, dlogit, hotness, mean, columns, rows, dims):
    """Dense gradients of every table and of the flat wide vector, in dx's and dlogit's dtype."""
    tables, wide = [], []
    for f, first, last in _per_feature(hotness):
        index = ids[:, first:last].long()
        valid = index >= 0
        row_gradient = dx[:, columns[f] : columns[f] + dims[f]]
        if mean[f]:
            row_gradient = row_gradient / valid.sum(1, keepdim=True).clamp(min=1)
        sample = torch.nonzero(valid)[:, 0]
        tables.append(dx.new_zeros(rows[f], dims[f]).index_add_(0, index[valid], row_gradient[sample]))
        wide.append(dlogit.new_zeros(rows[f]).index_add_(0, index[valid], dlogit[sample]))
    return tables, torch.cat([dlogit.new_zeros(0), *wide])


def embedding_row_gradients(
    ids, dx, dlogit, unique, offsets, entries, keys, table_start, hotness, mean, columns, rows, dims
):
    dense, wide = _table_gradients(ids, dx, dlogit, hotness, mean, columns, rows, dims)
    compact, base = [], 0
    for f in range(len(rows)):
        touched = unique[table_start[f] : table_start[f + 1]].long() - base
        out = dx.new_zeros(min(rows[f], len(ids) * hotness[f]), dims[f])
        out[: len(touched)] = dense[f][touched]
        compact.append(out)
        base += rows[f]
    used = unique[: table_start[-1]].long()
    return compact, F.pad(wide[used], (0, len(unique) - len(used)))


def embedding_update_(
    ids, dx, dlogit, unique, offsets, entries, keys, table_start, tables, rms, last_step, wide, accum, linear,
    hotness, mean, columns, lr, step, rho, eps, wide_lr, l1, l2, grad_scale, found_inf,
):  # fmt: skip
    if found_inf is not None and found_inf.item():
        return
    rows, dims = [len(t) for t in tables], [t.shape[1] for t in tables]
    scale = 1 if grad_scale is None else grad_scale
    dense, wide_gradient = _table_gradients(ids, dx, dlogit, hotness, mean, columns, rows, dims)
    base = 0
    for f, first, last in _per_feature(hotness):
        index = ids[:, first:last].unique().long()
        index = index[index >= 0]
        last_of_table = last_step[base : base + rows[f]]
        rmsprop_rows_(tables[f], rms[f], last_of_table, index, dense[f][index] / scale, lr, step, rho, eps)
        flat = index + base
        ftrl_rows_(wide, accum, linear, flat, wide_gradient[flat] / scale, wide_lr, l1, l2)
        base += rows[f]


# --- optimizers -------------------------------------------------------------------------------------------------------


def rmsprop_dense_(weights, rms, grads, copies, lr, rho, eps, grad_scale, found_inf):
    if found_inf is not None and found_inf.item():
        return
    for i, (w, r, g) in enumerate(zip(weights, rms, grads)):
        g = g.to(w.dtype) / (1 if grad_scale is None else grad_scale)
        r.copy_(rho * r + (1 - rho) * g**2)
        w -= lr * g / (r.sqrt() + eps)
        if copies:
            copies[i].copy_(w)


def _sum_duplicates(rows, grads):
    distinct, inverse = torch.unique(rows, return_inverse=True)
    summed = grads.new_zeros(len(distinct), *grads.shape[1:]).index_add_(0, inverse, grads)
    return distinct[distinct >= 0], summed[distinct >= 0]


def rmsprop_rows_(weight, rms, last_step, rows, grads, lr, step, rho, eps):
    rows, grads = _sum_duplicates(rows, grads)
    missed = (step - last_step[rows].long() - 1).clamp(min=0)
    decay = rho ** missed.to(weight.dtype)
    rms[rows] = rho * rms[rows] * decay[:, None] + (1 - rho) * grads**2
    weight[rows] -= lr * grads / (rms[rows].sqrt() + eps)
    last_step[rows] = step.to(last_step.dtype)


def rmsprop_settle_(rms, last_step, step, rho):
    rms *= (rho ** (step - last_step.long()).clamp(min=0).to(rms.dtype))[:, None]
    last_step.fill_(step.item())


def ftrl_dense_(weight, accum, linear, grad, lr, l1, l2, grad_scale, found_inf):
    if found_inf is not None and found_inf.item():
        return
    g = grad.to(weight.dtype) / (1 if grad_scale is None else grad_scale)
    n = accum + g**2
    linear += g - (n.sqrt() - accum.sqrt()) / lr * weight
    shrunk = -linear.sign() * (linear.abs() - l1).clamp(min=0)
    weight.copy_(torch.where(shrunk == 0, 0, shrunk / (n.sqrt() / lr + 2 * l2)))
    accum.copy_(n)


def ftrl_rows_(weight, accum, linear, rows, grads, lr, l1, l2):
    rows, grads = _sum_duplicates(rows, grads)
    part = [t[rows] for t in (weight, accum, linear)]
    ftrl_dense_(*part, grads, lr, l1, l2, None, None)
    for whole, touched in zip((weight, accum, linear), part):
        whole[rows] = touched


def check_finite_(tensors, found_inf):
    if not all(t.isfinite().all() for t in tensors):
        found_inf.fill_(1)


def loss_scale_update_(scale, good_steps, updates, found_inf, growth, backoff, interval):
    if found_inf.item():
        scale.mul_(backoff).clamp_(min=1)
        good_steps.zero_()
        return
    updates += 1
    if good_steps + 1 >= interval:
        if (scale * growth).isfinite():
            scale.mul_(growth)
        good_steps.zero_()
    else:
        good_steps += 1


# --- head, metrics, order ---------------------------------------------------------------------------------------------


def head_forward(h, weight, bias, wide_logit):
    return F.linear(h, weight.to(h.dtype), bias.to(h.dtype)).squeeze(1) + wide_logit


def head_step_out(
    h, weight, bias, wide_logit, label, global_rows, p, loss_scale,
    *, logit, dlogit, dz, dbias_hidden, dweight, dbias, loss,
):  # fmt: skip
    leaves = [t.detach().clone().requires_grad_() for t in (h, weight, bias, wide_logit)]
    z = head_forward(*leaves)
    z.retain_grad()
    total = F.binary_cross_entropy_with_logits(z, label.to(z.dtype), reduction="sum") / global_rows
    (total if loss_scale is None else total * loss_scale).backward()
    logit.copy_(z.detach())
    dlogit.copy_(z.grad)
    masked = torch.where(h > 0, leaves[0].grad * dropout_scale(p), 0)
    dz.copy_(masked)
    dbias_hidden.copy_(masked.sum(0))
    dweight.copy_(leaves[1].grad)
    dbias.copy_(leaves[2].grad)
    loss.copy_(total.detach())


def wide_numeric_backward_out(numeric, dlogit, *, dweight, dbias):
    dweight.copy_((numeric * dlogit[:, None]).sum(0))
    dbias.copy_(dlogit.sum(0, keepdim=True))


def auc_histogram_(logit, label, positives, negatives):
    bins = len(positives)
    inner = torch.arange(1, bins, dtype=torch.float64, device=logit.device) / bins
    probability = logit.double().sigmoid().float()
    bin_of = torch.searchsorted(inner.float(), probability, right=False)  # thresholds < p
    for counts, chosen in ((positives, label > 0.5), (negatives, label <= 0.5)):
        counts += torch.bincount(bin_of[chosen], minlength=bins)


def gather_batch_out(rows, order, start, *, out):
    stored = rows[2]
    places = epoch_order(len(stored), *order).to(stored.device) if order else torch.arange(len(stored))
    for source, target in zip(rows, out):
        if target is not None:
            target.copy_(source[places[start : start + len(target)]])
