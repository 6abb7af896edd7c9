"""Every kernel of the GPU step beside its target and the ceilings measured in the same run: `python -m bench.budget`.

One step of the Outbrain model at B = 131072 in fp16; times are medians of CUDA events with a flushed L2
cache, or (--sustained) means over many calls in a row, replayed from a CUDA graph, in which a card may come to its
power limit; the ceilings are measured in the same way. Targets and predictions: docs/cuda.md.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench.ceilings import Clock, ceilings
from bench.harness import commit, device_name
from widedeep import ops
from widedeep.ops import linear_sm90
from widedeep.ops.linear import bit_row_bytes
from widedeep.shuffle import BLOCK_ROWS, WINDOW_ROWS
from widedeep.testing import OUTBRAIN_TABLES, embedding_case, gather_case, normal

WIDTH, LAYERS, P = 1024, 5, 0.1
NAMES = 40  # columns of a table for the names of kernels


class Line(NamedTuple):
    """One kernel: milliseconds, target (None: none), and what share of which ceiling it reaches."""

    name: str
    ms: float
    target: float | None
    fraction: float
    ceiling: str


class Budget:
    """The measured lines, and the two ceilings."""

    def __init__(self, B: int, calls: int, sm90: bool, sustained: bool):
        self.B, self.clock, self.sm90 = B, Clock("cuda", calls, sustained), sm90
        self.lines: list[Line] = []
        self.limits = ceilings("cuda", calls, sustained)

    def add(self, name: str, function: Callable[[], object], target: float | None, *, bytes=0.0, flops=0.0) -> None:
        seconds = self.clock.seconds(function)
        work, rate, ceiling = (flops, self.limits.product, "product") if flops else (bytes, self.limits.copy, "copy")
        self.lines.append(Line(name, seconds * 1000, target, work / seconds / rate, ceiling))


def batch(budget: Budget) -> None:
    rows, out = gather_case(20_000_000, budget.B, "cuda")
    budget.add(
        "batch gather",
        lambda: ops.gather_batch_out(rows, (BLOCK_ROWS, WINDOW_ROWS, 1, 2), 5, out=out),
        None,
        bytes=2 * sum(t.numel() * 4 for t in out[:3]),
    )


def embedding(budget: Budget) -> None:
    case = embedding_case(budget.B, OUTBRAIN_TABLES, numeric=13, device="cuda", aligned=True)
    B, K = case.ids.shape
    x = torch.empty(B, case.width, dtype=torch.float16, device="cuda")
    wide_logit, dlogit = torch.empty(B, device="cuda"), normal(B, device="cuda", scale=1e-4)
    places = (case.hotness, case.mean, case.columns)
    out_bytes = x.numel() * 2 + 4 * B * (K + 13)

    def forward():
        ops.embedding_forward_out(*case.weights(), *places, case.numeric_columns, x=x, wide_logit=wide_logit)

    budget.add("embedding forward", forward, 0.20, bytes=out_bytes)
    budget.add(
        "segments (hidden)",
        lambda: ops.embedding_segments(case.ids, case.hotness, case.rows),
        0.20,
        bytes=56 * case.ids.numel(),
    )
    segments = ops.embedding_segments(case.ids, case.hotness, case.rows)
    rms = [torch.zeros_like(t) for t in case.tables]
    R = sum(case.rows)
    last_step = torch.full((R,), -1, dtype=torch.int32, device="cuda")
    slots = torch.full((R,), 0.1, device="cuda"), torch.zeros(R, device="cuda")
    lr, step = torch.full((1,), 1e-4, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    dx = normal(B, case.width, device="cuda", dtype=torch.float16, scale=1e-4)
    state = (case.tables, rms, last_step, case.wide, *slots)
    update = (case.ids, dx, dlogit, *segments, *state, *places, lr, step, 0.5, 1e-7, 0.02)
    touched = segments[0][segments[0] >= 0].long()
    starts = segments[-1].tolist()
    row_bytes = sum((b - a) * d * 16 for a, b, d in zip(starts, starts[1:], case.dims)) + 32 * len(touched)
    budget.add(
        "embedding update",
        lambda: ops.embedding_update_(*update),
        0.30,
        bytes=dx.numel() * 2 + 8 * case.ids.numel() + row_bytes,
    )


def layers(budget: Budget) -> None:
    B = budget.B
    x, dz, y, dx = (normal(B, WIDTH, device="cuda", dtype=torch.float16, key=k) for k in "xzyd")
    weight = normal(WIDTH, WIDTH, device="cuda", dtype=torch.float16, scale=WIDTH**-0.5)
    bias, dbias = normal(WIDTH, device="cuda", dtype=torch.float16), torch.empty(WIDTH, device="cuda")
    dweight, step = torch.empty(WIDTH, WIDTH, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    flops = 2.0 * B * WIDTH * WIDTH
    weight_t = weight.t().contiguous()
    bits = torch.empty(B, bit_row_bytes(WIDTH), dtype=torch.uint8, device="cuda")

    def add(name, function, target=None):
        budget.add(name, function, target, flops=flops)

    def forward(p, bits):
        return lambda: ops.linear_relu_dropout_out(x, weight, bias, p, 1, step, 0, 0, y=y, bits=bits)

    add("layer forward, cublaslt", forward(P, bits))
    add("layer predict, cublaslt", forward(0.0, None), 0.39)
    add("layer dgrad, cublaslt", lambda: ops.linear_dgrad_out(dz, weight, None, P, dx=dx, dbias=dbias, bits=bits))
    add("layer wgrad", lambda: ops.linear_wgrad_out(dz, x, dweight=dweight), 0.37)
    if not (budget.sm90 and linear_sm90.available(torch.device("cuda"))):
        return
    for n in (1, LAYERS):
        size = linear_sm90.mask_bytes(B, WIDTH)
        masks = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(n)]
        many = [y, *(torch.empty_like(y) for _ in range(n - 1))]
        sums = [dbias, *(torch.empty_like(dbias) for _ in range(n - 1))]
        name = "layer" if n == 1 else f"{n} layers"
        forward = partial(linear_sm90.linear_sm90_out, x, [weight] * n, [bias] * n, y=many, masks=masks)
        dgrad = partial(linear_sm90.linear_sm90_dgrad_out, dz, [weight_t] * n, masks, P, dx=many, dbias=sums)
        for what, call, target in (
            ("forward", partial(forward, P, 1, step, 0, 0), 0.42),
            ("forward without dropout", partial(forward, 0.0, 1, step, 0, 0), None),
            ("dgrad", dgrad, 0.46),
        ):
            budget.add(f"{name} {what}, sm90", call, target and n * target, flops=n * flops)


def head_and_updates(budget: Budget) -> None:
    B = budget.B
    h = normal(B, WIDTH, device="cuda", dtype=torch.float16).relu()
    weight, bias = normal(1, WIDTH, device="cuda", scale=WIDTH**-0.5), torch.zeros(1, device="cuda")
    wide, label = normal(B, device="cuda"), (normal(B, device="cuda", key="y") > 1).float()
    one = torch.empty(1, device="cuda")
    out = {"logit": torch.empty(B, device="cuda"), "dlogit": torch.empty(B, device="cuda"), "dz": torch.empty_like(h)}
    out |= {"dbias_hidden": torch.empty(WIDTH, device="cuda"), "dweight": torch.empty(1, WIDTH, device="cuda")}
    out |= {"dbias": one, "loss": one.clone()}
    size = h.numel() * 2
    budget.add("head", lambda: ops.head_step_out(h, weight, bias, wide, label, B, P, None, **out), 0.22, bytes=2 * size)
    budget.add("head, inference", lambda: ops.head_forward(h, weight, bias, wide), None, bytes=size)
    numeric, sums = normal(B, 13, device="cuda"), {"dweight": torch.empty(13, device="cuda"), "dbias": one.clone()}
    budget.add(
        "wide numerics (hidden)",
        lambda: ops.wide_numeric_backward_out(numeric, wide, **sums),
        None,
        bytes=4 * (numeric.numel() + B),
    )
    found = torch.zeros(1, device="cuda")
    budget.add("finiteness of dx", lambda: ops.check_finite_([h], found), None, bytes=size)
    masters = [normal(WIDTH, WIDTH, device="cuda", scale=0.03, key=i) for i in range(LAYERS)]
    rms, grads = [torch.zeros_like(w) for w in masters], [torch.ones_like(w) for w in masters]
    copies, lr = [w.half() for w in masters], torch.full((1,), 1e-4, device="cuda")
    budget.add(
        "dense update",
        lambda: ops.rmsprop_dense_(masters, rms, grads, copies, lr, 0.5, 1e-7),
        0.05,
        bytes=22 * LAYERS * WIDTH * WIDTH,
    )
    transposed = [torch.empty_like(c) for c in copies]

    size = 4 * LAYERS * WIDTH * WIDTH
    budget.add("transposed copies (hidden)", lambda: ops.transpose_out(copies, out=transposed), None, bytes=size)


def predicted_step(lines: list[Line]) -> tuple[float, str]:
    """Milliseconds of a training step, the sum of its measured kernels with the fastest route, and which that is."""
    ms = {line.name: line.ms for line in lines}
    fixed = (
        ms["batch gather"] + ms["embedding forward"] + ms["embedding update"] + ms["head"] + LAYERS * ms["layer wgrad"]
    )
    both = LAYERS * (ms["layer forward, cublaslt"] + ms["layer dgrad, cublaslt"])
    routes = {"cublaslt": both + ms["finiteness of dx"]}  # the others look at dx as they make it
    for name in ms:
        if found := re.fullmatch(r"(layer|\d+ layers) forward, sm90", name):
            calls, chain = (LAYERS, "") if found[1] == "layer" else (1, "-chain")
            both = calls * (ms[name] + ms[name.replace("forward", "dgrad")])
            routes[f"sm90{chain}"] = both
    route = min(routes, key=routes.__getitem__)
    return fixed + routes[route], route


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=131072)
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each kernel")
    parser.add_argument("--gemm", choices=("auto", "cublaslt"), default="auto", help="cublaslt: no Hopper products")
    parser.add_argument("--sustained", action="store_true", help="calls in a row instead of single ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    budget = Budget(args.batch, args.calls, args.gemm == "auto", args.sustained)
    for family in (batch, embedding, layers, head_and_updates):
        family(budget)
    step, route = predicted_step(budget.lines)
    report = {
        "device": device_name(torch.device("cuda")),
        "commit": commit(),
        "torch": torch.__version__,
        "batch": args.batch,
        "copy_TB/s": budget.limits.copy / 1e12,
        "product_TFLOP/s": budget.limits.product / 1e12,
        "sum_of_kernels_ms": step,
        "route": route,
        "kernels": [line._asdict() for line in budget.lines],
    }
    print(json.dumps(report) if args.json else text(report))
    return 0


def text(report: dict) -> str:
    lines = [
        f"{report['device']}, torch {report['torch']}, commit {report['commit']}, batch {report['batch']}",
        f"ceilings: copy {report['copy_TB/s']:.2f} TB/s, product {report['product_TFLOP/s']:.0f} TFLOP/s",
        f"{'kernel':{NAMES}}{'ms':>9}{'target':>9}{'of ceiling':>14}",
    ]
    for k in report["kernels"]:
        target = f"{k['target']:.2f}" if k["target"] else ""
        share = f"{100 * k['fraction']:.0f} % {k['ceiling']}"
        lines.append(f"{k['name']:{NAMES}}{k['ms']:9.3f}{target:>9}{share:>14}")
    lines.append(f"sum of a step's kernels: {report['sum_of_kernels_ms']:.2f} ms, layers by {report['route']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
