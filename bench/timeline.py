"""Every kernel of one captured step in the order in which they start: `python -m bench.timeline train --batch 131072`.

Columns: microseconds from the step's first kernel, duration, the time since the last kernel before it ended (below
zero: they overlap), the stream, the name. Needs a GPU.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from bench.harness import commit, device_name, endless
from bench.job import Job, write_shards
from bench.ours import WideDeepContender
from widedeep.data import Reader
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.shards import ShardSet
from widedeep.step import GEMMS, PRECISIONS

WARMUP = 8  # steps
FIRST_KERNEL = "gather_batch_kernel"  # the reader's: each step begins with it
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


class Launch(NamedTuple):
    start: float  # microseconds
    duration: float
    stream: int
    name: str


def launches(trace: dict) -> list[Launch]:
    """What ran on the device, by start, from a trace in Chrome's format."""
    events = [e for e in trace["traceEvents"] if e.get("cat") in DEVICE_WORK]
    return sorted(Launch(e["ts"], e["dur"], e["args"].get("stream", 0), e["name"]) for e in events)


def last_whole_step(all_launches: list[Launch]) -> list[Launch]:
    """From the last but one first kernel to the one before the last. Raises ValueError where there are not two."""
    firsts = [i for i, launch in enumerate(all_launches) if FIRST_KERNEL in launch.name]
    if len(firsts) < 2:
        raise ValueError(f"expected at least two steps, each beginning with {FIRST_KERNEL}, found {len(firsts)}")
    return all_launches[firsts[-2] : firsts[-1]]


def text(step: list[Launch]) -> str:
    lines, ended = [f"{'start':>9}{'us':>9}{'gap':>9}{'stream':>8}  kernel"], step[0].start
    for launch in step:
        gap = launch.start - ended
        lines.append(
            f"{launch.start - step[0].start:9.1f}{launch.duration:9.1f}{gap:9.1f}{launch.stream:8}  {launch.name[:90]}"
        )
        ended = max(ended, launch.start + launch.duration)
    total = sum(launch.duration for launch in step)
    return "\n".join([*lines, f"step {ended - step[0].start:.1f} us, sum of its kernels {total:.1f} us"])


def profiled(what: str, batch: int, precision: str, gemm: str, count: int) -> list[Launch]:
    """The last whole step of `count`."""
    spec, hidden = FeatureSpec.outbrain(), (1024,) * 5
    model = WideDeep(spec, hidden, wide_init="uniform", seed=0)
    ours = WideDeepContender(Job(spec, hidden, model.named_arrays(), torch.device("cuda"), precision), gemm=gemm)
    with tempfile.TemporaryDirectory(prefix="widedeep-bench-") as directory:
        shards, trace = Path(directory) / "train", Path(directory) / "trace.json"
        write_shards(shards, spec, 4 * batch)
        batches = endless(Reader(ShardSet.open(shards), batch, device="cuda", spec=spec), ours.places)

        def steps(first: int, count: int) -> None:
            for i in range(first, first + count):
                rows = next(batches)
                ours.train(rows, i) if what == "train" else ours.predict(rows)
            torch.cuda.synchronize()

        steps(0, WARMUP)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            steps(WARMUP, count)
        profile.export_chrome_trace(str(trace))
        print(f"hidden layers: {ours.gemm}")
        return last_whole_step(launches(json.loads(trace.read_text())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "predict"))
    parser.add_argument("--batch", type=int, default=131072)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp16")
    parser.add_argument("--gemm", choices=GEMMS, default="auto")
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="profiled, of which the last is shown: after hundreds a card is at its power limit",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    print(f"{device_name(torch.device('cuda'))}, torch {torch.__version__}, commit {commit()}, batch {args.batch}")
    print(text(profiled(args.what, args.batch, args.precision, args.gemm, args.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
