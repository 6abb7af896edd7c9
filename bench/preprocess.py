"""Outbrain preprocessing beside polars and pandas: `python -m bench.preprocess --displays 400000 --engine all`.

See bench/README.md.

Every contender runs in a process of its own on the same files, rounds alternate, and all must make the same numbers:
rows of both splits, and the means of the two ages, six click rates and two counts.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.harness import commit, device_name
from bench.preprocess_child import OURS, PEERS
from preprocess import synthetic
from preprocess.engine import ENGINES, cores
from widedeep.errors import InputError, RunError

WORK = {
    "widedeep": "all 26 features, similarities included; shards of train and test, test by display",
    "widedeep, tables only": "without the attribute files, so without similarities; else the same",
    "polars": "streaming; no similarities, one Parquet file for both splits, rows in any order",
    "pandas": "in memory; no similarities, one Parquet file for both splits",
}
AGREEMENT = 1e-4  # of the means, relative to max(1, mean)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.preprocess", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--displays", type=int, default=400_000, help="displays of the synthetic input, 5.2 rows each")
    source.add_argument("--data", type=Path, help="a directory of raw files instead")
    parser.add_argument("--engine", choices=(*ENGINES, "all"), default="threads", help="which of our engines")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of ours")
    parser.add_argument(
        "--workers", type=int, default=cores(), help="threads or processes of every contender (pandas: of its reader)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of every contender")
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(PEERS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = options().parse_args(argv)
    try:
        report = run(args)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if args.json else text(report))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; returns the report as plain values."""
    for name in ("displays", "workers", "rounds"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least 1")
    peers, skipped = chosen(args.peers)
    engines, skipped = engines_of(args.engine, skipped)
    # The first engine does both of our jobs, further ones the whole job.
    contenders = [(name, engines[0]) for name in OURS] + [(OURS[0], engine) for engine in engines[1:]]
    contenders += [(peer, "") for peer in peers]
    with tempfile.TemporaryDirectory(prefix="widedeep-bench-") as directory:
        data = args.data
        if data is None:
            data = Path(directory) / "raw"
            synthetic.run(displays=args.displays, seed=0, out=data, workers=args.workers)
        runs: dict[tuple[str, str], list[dict]] = {contender: [] for contender in contenders}
        for _ in range(args.rounds):
            for contender in contenders:
                runs[contender].append(measure(contender, data, Path(directory) / "out", args.workers, args.device))
                check(title(contender), runs[contender][-1], runs[contenders[0]][0])
    return {
        "bench": "preprocessing",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device(args.device)),
        "workers": args.workers,
        "load": os.getloadavg()[0],
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **versions("numpy", "pyarrow", *(["cupy"] if args.device == "cuda" else []), *peers),
        },
        "rounds": args.rounds,
        "rows": sum(runs[contenders[0]][0]["rows"].values()),
        "skipped": skipped,
        "contenders": [row(contender, runs) for contender in contenders],
    }


def chosen(peers: str) -> tuple[list[str], dict[str, str]]:
    """Peers to run, and those left out with the reason; InputError for an unknown one."""
    wanted = {"all": PEERS, "none": ()}.get(peers, tuple(peers.split(",")))
    if unknown := [name for name in wanted if name not in PEERS]:
        raise InputError(f"--peers: expected all, none or some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    skipped = {name: f"{name} is not installed" for name in wanted if find_spec(name) is None}
    return [name for name in wanted if name not in skipped], skipped


def engines_of(engine: str, skipped: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Engines to run, and what is left out with the reason."""
    wanted = ENGINES if engine == "all" else (engine,)
    if "dask" in wanted and find_spec("distributed") is None:
        if engine == "dask":
            raise InputError("--engine dask: dask is not installed")
        return [name for name in wanted if name != "dask"], {**skipped, "engine dask": "dask is not installed"}
    return list(wanted), skipped


def title(contender: tuple[str, str]) -> str:
    name, engine = contender
    return f"{name} ({engine})" if engine else name


def measure(contender: tuple[str, str], data: Path, out: Path, workers: int, device: str) -> dict[str, Any]:
    """One run of a contender; what it wrote is deleted."""
    out.mkdir()
    command = [sys.executable, "-m", "bench.preprocess_child", *contender, str(data), str(out), str(workers), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        shutil.rmtree(out)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{title(contender)} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def check(name: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    """Raises RunError unless both made the same rows and numbers."""
    if got["rows"] != want["rows"]:
        raise RunError(f"{name} did other work: its splits have {got['rows']} rows, ours {want['rows']}")
    for feature, mean in want["means"].items():
        if not math.isclose(got["means"][feature], mean, rel_tol=AGREEMENT, abs_tol=AGREEMENT):
            raise RunError(f"{name} did other work: its mean {feature} is {got['means'][feature]}, ours {mean}")


def row(contender: tuple[str, str], runs: dict[tuple[str, str], list[dict]]) -> dict[str, Any]:
    """Medians over rounds; a ratio, to both jobs of our first engine, is the median of the ratios within rounds."""
    own, seconds = runs[contender], [r["seconds"] for r in runs[contender]]
    rows = sum(own[0]["rows"].values())
    result = {
        "name": title(contender),
        "does": WORK[contender[0]],
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "cpu_seconds": statistics.median(r["cpu_seconds"] for r in own),
        "rows_per_s": rows / statistics.median(seconds),
        "peak_mib": statistics.median(r["peak_bytes"] for r in own) / 2**20,
        "stages": {stage: statistics.median(r["stages"][stage] for r in own) for stage in own[0]["stages"]},
    }
    if "device_bytes" in own[0]:
        result["device_mib"] = statistics.median(r["device_bytes"] for r in own) / 2**20
    ours = list(runs)[: len(OURS)]
    if contender not in ours:
        for (name, _), mine in ((other, runs[other]) for other in ours):
            result[f"times {name}"] = statistics.median(r["seconds"] / m["seconds"] for r, m in zip(own, mine))
    return result


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def text(report: dict[str, Any]) -> str:
    on_gpu = any("device_mib" in r for r in report["contenders"])
    lines = [
        f"preprocessing {report['rows']:,} click rows, {report['workers']} workers",
        f"medians of {report['rounds']} rounds; the last columns: seconds over those of our first engine",
        f"{report['device']}; load {report['load']:.1f}; commit {report['commit']}; {report['date']}",
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "",
        f"{'':32}{'seconds':>9}{'fastest':>9}{'slowest':>9}{'CPU s':>8}{'rows/s':>11}{'peak MiB':>10}"
        f"{'GPU MiB' if on_gpu else '':>9}{'/ whole':>9}{'/ tables':>9}",
    ]
    for r in report["contenders"]:
        ratios = [f"{r[f'times {ours}']:.2f}" if f"times {ours}" in r else "" for ours in OURS]
        used = f"{r['device_mib']:.0f}" if "device_mib" in r else ""
        lines.append(
            f"{r['name']:32}{r['seconds']:9.2f}{r['fastest']:9.2f}{r['slowest']:9.2f}{r['cpu_seconds']:8.2f}{r['rows_per_s']:11,.0f}"
            f"{r['peak_mib']:10.0f}{used:>9}{ratios[0]:>9}{ratios[1]:>9}"
        )
    lines.append("")
    for r in report["contenders"]:
        lines.append(f"{r['name']}: {r['does']}")
        lines.append("    " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in r["stages"].items()))
    lines += [f"{name} left out: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
