"""From raw CSV files to MAP@12: `python -m bench.end_to_end --displays 20000 --epochs 2`. See bench/README.md.

What `widedeep preprocess outbrain` and `widedeep train` do, one after the other in one process, and the time of each.
Writing synthetic raw files is not part of the total.
"""

import argparse
import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from bench.harness import commit, device_name
from bench.preprocess import versions
from preprocess import synthetic
from preprocess.engine import cores
from preprocess.outbrain import OutbrainConfig
from preprocess.outbrain import run as preprocess
from widedeep.config import Precision, TrainConfig
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import FeatureSpec
from widedeep.logs import METRICS_FILE
from widedeep.outputs import write_json
from widedeep.run import launch
from widedeep.train import train

SIZES = "embedding_sizes.json"
EPOCH_METRICS = ("loss_val", "auc_val", "streaming_map_val")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--displays", type=int, default=400_000, help="displays of the synthetic input, 5.2 rows each")
    source.add_argument("--data", type=Path, help="a directory of raw files instead")
    parser.add_argument("--out", type=Path, help="where data set, checkpoints and results are kept (default: nowhere)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=cores(), help="threads of the preprocessing")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--warmup_epochs", type=float, help="of the learning rate (default: 6, or fewer where there are)"
    )
    parser.add_argument("--batch", type=int, default=131072, help="rows of a training batch")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024] * 5)
    parser.add_argument("--embedding_dim", type=int, help="of every table (default: those of the original)")
    parser.add_argument("--lr", type=float, default=1.2e-4, help="learning rate of the deep part")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = options().parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = run(args)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if args.json else text(report))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does it all; returns the report as plain values."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device: torch finds no GPU or no driver")
    with _directory(args.out) as out:
        data = args.data
        if data is None:
            data = out / "raw"
            synthetic.run(displays=args.displays, seed=args.seed, out=data, workers=args.workers)
        start = time.perf_counter()
        prepared = preprocess(OutbrainConfig(data, out / "data", device=args.device, workers=args.workers))
        if args.embedding_dim is not None:
            sizes = dict.fromkeys((f.name for f in FeatureSpec.outbrain().categorical), args.embedding_dim)
            write_json(out / SIZES, sizes)
        middle = time.perf_counter()
        launch(_train_config(args, out), train)
        end = time.perf_counter()
        epochs = list(_epochs(out / "results" / METRICS_FILE))
    return {
        "bench": "end to end",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device(args.device)),
        "host": device_name(torch.device("cpu")),
        "commit": commit(),
        "versions": {"torch": torch.__version__, **versions("numpy", "pyarrow")},
        "load": os.getloadavg()[0],
        "settings": {k: getattr(args, k) for k in ("workers", "epochs", "batch", "precision", "hidden", "lr", "seed")},
        "rows": {split: prepared[split]["rows"] for split in ("train", "test")},
        "seconds": {"preprocessing": middle - start, "training": end - middle, "total": end - start},
        "preprocessing": {stage: values["seconds"] for stage, values in prepared["stages"].items()},
        "epochs": epochs,
    }


@contextlib.contextmanager
def _directory(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="widedeep-bench-") as directory:
            yield Path(directory)
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: expected a new or empty directory")
    out.mkdir(parents=True, exist_ok=True)
    yield out


def _train_config(args: argparse.Namespace, out: Path) -> TrainConfig:
    warmup = min(6.0, args.epochs) if args.warmup_epochs is None else args.warmup_epochs
    return TrainConfig.from_flat(
        {
            "dataset_path": str(out / "data"),
            "embedding_sizes_file": str(out / SIZES) if args.embedding_dim is not None else None,
            "model_dir": str(out / "model"),
            "results_dir": str(out / "results"),
            "global_batch_size": args.batch,
            "eval_batch_size": args.batch,
            "num_epochs": args.epochs,
            "deep_warmup_epochs": warmup,
            "deep_learning_rate": args.lr,
            "deep_hidden_units": tuple(args.hidden),
            "precision": args.precision,
            "cpu": args.device == "cpu",
            "seed": args.seed,
            "affinity": "disabled",
        }
    )


def _epochs(path: Path) -> Iterator[dict[str, float]]:
    """Seconds since the first step could begin, and the metrics, at the end of each epoch's evaluation."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["step"] and "loss_val" in record:  # the summary at the end has no step
            yield {"seconds": record["seconds"]} | {k: record[k] for k in EPOCH_METRICS if k in record}


def text(report: dict[str, Any]) -> str:
    s, seconds = report["settings"], report["seconds"]
    rows = ", ".join(f"{n:,} {split}" for split, n in report["rows"].items())
    trained = report["rows"]["train"] * len(report["epochs"])
    lines = [
        f"raw CSV files to MAP@12: {rows} rows, {s['epochs']} epochs, batch {s['batch']}, {s['precision']}, "
        f"hidden {'-'.join(map(str, s['hidden']))}, seed {s['seed']}",
        f"{report['device']}; preprocessing by {s['workers']} workers of {report['host']}; load {report['load']:.1f}",
        f"commit {report['commit']}; {report['date']}; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "",
        f"{'preprocessing':16}{seconds['preprocessing']:9.2f} s   "
        + ", ".join(f"{stage} {spent:.2f}" for stage, spent in report["preprocessing"].items()),
        f"{'training':16}{seconds['training']:9.2f} s   start, evaluations and checkpoints included: "
        f"{trained / seconds['training']:,.0f} rows/s",
        f"{'total':16}{seconds['total']:9.2f} s",
        "",
        f"{'epoch':>5}{'seconds':>10}{'loss':>10}{'AUC':>10}{'MAP@12':>10}",
    ]
    for number, epoch in enumerate(report["epochs"], 1):
        values = "".join(f"{epoch[name]:10.5f}" if name in epoch else f"{'':10}" for name in EPOCH_METRICS)
        lines.append(f"{number:5}{epoch['seconds']:10.2f}{values}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
