"""What `bench.train` and `bench.infer` share: options, contenders, interleaved rounds, the report.

Every contender starts from the same weights, must give the same logits before the clock starts, and reads the same
batches from a shard set through the package's Reader, which is part of the time. A round measures ours and a peer in
turn, about a second each; the ratio is the median over rounds of ours / peer, so that a machine that drifts slows both.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, product, repeat
from pathlib import Path

import numpy as np
import torch

from bench import peers
from bench.job import Contender, Job, write_shards
from bench.ours import WideDeepContender
from widedeep.config import ReaderMode
from widedeep.data import MODES, Batch, Places, Reader
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.shards import ShardSet
from widedeep.step import GEMMS, PRECISIONS

WARMUP_STEPS = 3  # compilation, capture, allocation
CONSTANT = "constant"
FAILED = "failed"  # how the reason begins for which a peer is left out that should have run
# Batches in the shard set, by the reader's mode; they are repeated. A stream's threads begin anew with each epoch.
EPOCH_STEPS = {"auto": 8, "device": 8, "pinned": 8, "stream": 48, CONSTANT: 1}
# Largest difference of initial logits, which are of the order of 1, between two implementations of the same model.
AGREEMENT = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}

Action = Callable[[Contender, Batch, int], None]


def options(what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="rows of a batch; several are measured one after the other"
    )
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    parser.add_argument(
        "--steps", type=int, default=0, help="steps of one measurement (default: about a second of each)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each pair")
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(peers.PEERS)}")
    parser.add_argument("--step", choices=("fused", "reference"), default="fused", help="which of our steps")
    parser.add_argument("--gemm", choices=GEMMS, default="auto", help="our products of hidden layers on a GPU")
    parser.add_argument(
        "--data", choices=(*MODES, CONSTANT), nargs="+", default=["auto"],
        help="modes of the reader, one after the other: where its rows are; constant: one batch again and again, as"
        " nobody trains",
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024] * 5)
    parser.add_argument("--fspec_file", type=Path, help="feature spec (default: the Outbrain model)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(what: str, action: Action, argv: list[str] | None = None) -> int:
    args = options(what).parse_args(argv)
    args.batch = args.batch or ([4096] if args.device == "cpu" else [131072, 16384])
    try:
        if args.rounds < 1 or args.steps < 0:
            raise InputError(
                f"expected --rounds of 1 or more and --steps of 0 or more, got {args.rounds}, {args.steps}"
            )
        report = run(args, what, action)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if args.json else text(report))
    return int(any(reason.startswith(FAILED) for reason in report["skipped"].values()))


def run(args: argparse.Namespace, what: str, action: Action) -> dict:
    """Measures every batch size with every mode of the reader; returns the report as plain values."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device: torch finds no GPU or no driver")
    spec = FeatureSpec.load(args.fspec_file) if args.fspec_file else FeatureSpec.outbrain()
    if any(f.hotness != 1 for f in spec.categorical):
        raise InputError("the peers know one-hot features only: a feature of the spec has hotness > 1")
    job = _job(args, spec)
    contenders, skipped = _contenders(args, job)
    results = []
    with tempfile.TemporaryDirectory(prefix="widedeep-bench-") as directory:
        shards = Path(directory) / "train"
        write_shards(shards, spec, max(EPOCH_STEPS[data] for data in args.data) * max(args.batch))
        for batch, data in product(args.batch, args.data):
            mode: ReaderMode = "auto" if data == CONSTANT else data
            reader = Reader(ShardSet.open(shards), batch, mode=mode, device=job.device, spec=spec)
            results.append(_measure(args, contenders, skipped, reader, action, data == CONSTANT))
            if args.json:  # so that a run which is cut short has told what it measured
                so_far = {"bench": what, "skipped": skipped, "results": results}
                print(json.dumps(so_far), file=sys.stderr, flush=True)
    return {
        "bench": what,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(job.device),
        "commit": commit(),
        "python": platform.python_version(),
        "precision": args.precision,
        "parameters": spec.parameter_count(args.hidden),
        "versions": {c.name: c.version for c in contenders} | driver(job.device),
        "skipped": skipped,
        "results": results,
    }


def _job(args: argparse.Namespace, spec: FeatureSpec) -> Job:
    model = WideDeep(spec, args.hidden, wide_init="uniform", seed=0)
    return Job(spec, tuple(args.hidden), model.named_arrays(), torch.device(args.device), args.precision)


def _contenders(args: argparse.Namespace, job: Job) -> tuple[list[Contender], dict[str, str]]:
    """Ours first, and the peers that run here and agree with it; the others with the reason."""
    names, skipped = peers.chosen(args.peers, args.device)
    ours = WideDeepContender(job, args.step, args.gemm)
    contenders: list[Contender] = [ours]
    with tempfile.TemporaryDirectory(prefix="widedeep-bench-") as directory:
        write_shards(Path(directory) / "check", job.spec, 256, seed=1)
        reader = Reader(ShardSet.open(Path(directory) / "check"), 256, device=job.device, spec=job.spec)
        batch = next(iter(reader.epoch(0)))
        want = ours.logits(batch)
        for name in names:
            try:
                peer = peers.make(name, job)
                error = float(np.abs(peer.logits(batch) - want).max())
            except Exception as failure:  # a peer that cannot run is reported, and does not stop the others
                skipped[name] = _failed(failure)
                continue
            if error <= AGREEMENT[job.precision]:
                contenders.append(peer)
            else:
                skipped[name] = f"{FAILED}: not the same model, its logits differ by up to {error:.3g}"
    return contenders, skipped


def _failed(error: Exception) -> str:
    return f"{FAILED}: {' '.join(str(error).split())[:300] or type(error).__name__}"


def endless(reader: Reader, into: Places, constant: bool = False) -> Iterator[Batch]:
    if constant:
        yield from repeat(next(iter(reader.epoch(0))))
    for epoch in count():
        for batch in reader.epoch(epoch, into=into):
            if batch.global_rows == reader.global_batch:
                yield batch


def _measure(
    args: argparse.Namespace,
    contenders: list[Contender],
    skipped: dict[str, str],
    reader: Reader,
    action: Action,
    constant: bool = False,
) -> dict:
    """Of one batch size and one reader. A peer that fails leaves `contenders` for good."""
    rows = reader.global_batch
    batches = {c.name: endless(reader, c.places, constant) for c in contenders}
    taken = dict.fromkeys(batches, 0)

    def seconds(contender: Contender, steps: int) -> float:
        contender.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            action(contender, next(batches[contender.name]), taken[contender.name])
            taken[contender.name] += 1
        contender.synchronize()
        return (time.perf_counter() - start) / steps

    def attempt(contender: Contender, steps: int) -> float | None:
        """The seconds; None: a peer failed, here for the first time or before."""
        try:
            return seconds(contender, steps) if contender in contenders else None
        except Exception as failure:
            if contender is ours:
                raise
            skipped[contender.name] = _failed(failure)
            contenders.remove(contender)
            return None

    ours, *others = contenders
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for contender in (ours, *others):
        attempt(contender, WARMUP_STEPS)
    took = {c.name: attempt(c, 2) for c in (ours, *others)}
    steps = {name: args.steps or max(1, round(1.0 / each)) for name, each in took.items() if each}
    own: list[float] = []
    pairs: dict[str, list[tuple[float, float]]] = {c.name: [] for c in others}
    turns: Sequence[Contender | None] = others or [None]
    for _ in range(args.rounds):
        for peer in turns:
            own.append(seconds(ours, steps[ours.name]))
            if peer is not None and (theirs := attempt(peer, steps.get(peer.name, 0))):
                pairs[peer.name].append((own[-1], theirs))
    table = [_row(ours.name, own, rows, steps[ours.name])]
    for name, times in pairs.items():
        if name in skipped:
            continue
        row = _row(name, [theirs for _, theirs in times], rows, steps[name])
        table.append(row | {"ours_over_this": statistics.median(theirs / mine for mine, theirs in times)})
    rows_from = CONSTANT if constant else reader.mode
    report = {"batch": rows, "rounds": args.rounds, "rows_from": rows_from, "gemm": ours.gemm, "contenders": table}
    # What torch holds: the rows of the shards, ours, and peers that are torch's own.
    return report | ({"device_GiB": torch.cuda.max_memory_reserved() / 2**30} if args.device == "cuda" else {})


def _row(name: str, times: list[float], rows: int, steps: int) -> dict:
    return {
        "name": name,
        "steps": steps,
        "samples_per_s": rows / statistics.median(times),
        "slowest": rows / max(times),
        "fastest": rows / min(times),
        "ms_per_step": 1000 * statistics.median(times),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def driver(device: torch.device) -> dict[str, str]:
    """The version of a GPU's driver, where it tells."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"driver": told[0]} if told else {}


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def commit() -> str:
    """Of this checkout, with `+` if files differ from it; `unknown` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def text(report: dict) -> str:
    lines = [
        f"{report['bench']}: {report['parameters']:,} parameters, {report['precision']}",
        f"{report['device']}; commit {report['commit']}; {report['date']}",
    ]
    for result in report["results"]:
        lines += [
            "",
            f"batch {result['batch']}, medians of {result['rounds']} rounds, rows from {result['rows_from']}"
            + (f", hidden layers through {result['gemm']}" if result["gemm"] else ""),
            f"{'':28}{'steps':>6}{'samples/s':>12}{'ms/step':>10}{'slowest':>12}{'fastest':>12}{'ours / this':>13}",
        ]
        for row in result["contenders"]:
            ratio = f"{row['ours_over_this']:.2f}" if "ours_over_this" in row else ""
            numbers = (
                f"{row['samples_per_s']:12,.0f}{row['ms_per_step']:10.2f}{row['slowest']:12,.0f}{row['fastest']:12,.0f}"
            )
            lines.append(f"{row['name']:28}{row['steps']:6}{numbers}{ratio:>13}")
        if "device_GiB" in result:
            lines.append(f"device memory held by torch: {result['device_GiB']:.2f} GiB at most")
    lines += [""] + [f"{name}: {version}" for name, version in report["versions"].items()]
    lines += [f"{name} left out: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines)
