"""`make demo`: the whole job on synthetic Outbrain data, and a table of the model beside two yardsticks.

Runs the commands that a user would run, printing each: synth, preprocess, train, report. The yardsticks rank the same
evaluation displays: popularity by the smoothed click rate of each ad in the training displays, best by the planted
probabilities that the clicks were drawn from. Exits with 1 when the model closes less than half of the gap between
them, and with the exit code of a command that fails. A second run takes the raw data of the first, and replaces the
rest.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from widedeep.feature_spec import FeatureSpec
from widedeep.metrics import score_rows
from widedeep.outputs import write_json
from widedeep.scoring import log_loss
from widedeep.shards import ShardSet

# Small enough for two cores; the sizes of the reference job are the defaults of `widedeep train`.
TRAIN = (
    "--embedding_sizes_file {out}/embedding_sizes.json --deep_hidden_units 256 128 --wide_init zeros "
    "--global_batch_size 2048 --eval_batch_size 16384 --num_epochs 3 --deep_warmup_epochs 1 --deep_learning_rate 0.003 "
    "--log_every 50 --seed 1 --overwrite"
)
EMBEDDING_DIM = 16
SMOOTHING = 20  # rows of the average click rate that every ad starts with
MIN_GAP_CLOSED = 0.5
SEED, PLANTED = 1, "planted.parquet"


def command(line: str) -> None:
    """Print and run one command of the package.

    Raises:
        SystemExit: it failed, and has said why; with its exit code, that of a shell where a signal ended it.
    """
    print(f"\n$ widedeep {line}", flush=True)
    try:
        code = subprocess.run([sys.executable, "-m", "widedeep", *shlex.split(line)]).returncode
    except KeyboardInterrupt:  # the command has had it too
        code = -signal.SIGINT
    if code:
        sys.exit(code if code > 0 else 128 - code)


def is_made(raw: Path, displays: int) -> bool:
    """Whether an earlier run has made this raw data, with the planted probabilities; `synth` never replaces any."""
    manifest = raw / "manifest.json"
    if not manifest.exists() or not (raw / PLANTED).exists():
        return False
    made = json.loads(manifest.read_text(encoding="utf-8"))
    return (made["displays"], made["seed"]) == (displays, SEED)


def popularity(ad: Tensor, clicked: Tensor, train: Tensor) -> Tensor:
    """[B] float64 click rate of each row's ad over the training rows, drawn towards the average one."""
    ads = int(ad.max()) + 1
    clicks = torch.zeros(ads, dtype=torch.float64).index_add_(0, ad[train], clicked[train].double())
    views = torch.zeros(ads, dtype=torch.float64).index_add_(0, ad[train], torch.ones(int(train.sum())).double())
    rate = clicked[train].double().mean()
    return ((clicks + SMOOTHING * rate) / (views + SMOOTHING))[ad]


def yardsticks(raw: Path, data: Path) -> dict[str, dict[str, float]]:
    """Scores of popularity and of the planted probabilities on the displays that preprocessing put into `test`."""
    rows = pq.read_table(raw / PLANTED, columns=["display_id", "ad_id", "clicked", "probability"])
    display, ad, clicked, planted = (torch.from_numpy(column.to_numpy().copy()) for column in rows.columns)
    held_out = ShardSet.open(data / "test")
    shown = torch.from_numpy(held_out.read(0, held_out.rows, ["display_id"])["display_id"])
    test = torch.isin(display.long(), shown)
    popular = popularity(ad.long(), clicked, ~test)
    scored = {"popularity": popular, "best reachable": planted.double()}
    return {
        name: score_rows(score[test], score[test], clicked[test], display[test].long())
        | {"loss": log_loss(score[test], clicked[test])}
        for name, score in scored.items()
    }


def show(results: dict[str, dict[str, float]], seconds: dict[str, float]) -> float:
    """Print both tables; the share of the gap in MAP@12 between popularity and best that the model closes."""
    low, high = results["popularity"]["map"], results["best reachable"]["map"]
    table = Table(title="Evaluation displays, synthetic Outbrain")
    for column in ("", "MAP@12", "AUC", "log loss", "gap closed"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("popularity", "model", "best reachable"):
        found = results[name]
        closed = (found["map"] - low) / (high - low)
        table.add_row(name, *(f"{found[key]:.4f}" for key in ("map", "auc", "loss")), f"{closed:.0%}")
    Console().print(table)
    Console().print("seconds: " + ", ".join(f"{stage} {spent:.0f}" for stage, spent in seconds.items()))
    return (results["model"]["map"] - low) / (high - low)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for data, model and report")
    parser.add_argument("--displays", type=int, default=150_000)
    args = parser.parse_args()
    out, seconds = args.out, {}
    out.mkdir(parents=True, exist_ok=True)
    raw, data, results = out / "raw", out / "data", out / "results"
    stages = {
        "synth": f"synth --displays {args.displays} --seed {SEED} --truth true --out {shlex.quote(str(raw))}",
        "preprocess": f"preprocess outbrain --data_path {shlex.quote(str(raw))} --out {shlex.quote(str(data))}",
        "train": f"train --dataset_path {shlex.quote(str(data))} --model_dir {shlex.quote(str(out / 'model'))} "
        f"--results_dir {shlex.quote(str(results))} {TRAIN.format(out=shlex.quote(str(out)))}",
        "report": f"report {shlex.quote(str(results))}",
    }
    if is_made(raw, args.displays):
        print(f"{raw}: made by an earlier run")
        del stages["synth"]
    for stage, line in stages.items():
        started = time.perf_counter()
        if stage == "train":
            spec = FeatureSpec.load(data / "feature_spec.yaml")
            write_json(out / "embedding_sizes.json", {f.name: EMBEDDING_DIM for f in spec.categorical})
        if stage == "report":
            baselines = yardsticks(raw, data)
            write_json(results / "baselines.json", baselines)
        command(line)
        seconds[stage] = time.perf_counter() - started
    model = json.loads((results / "evaluation.json").read_text())
    closed = show(baselines | {"model": model}, seconds)
    print(f"report: {results / 'report.html'}")
    if closed < MIN_GAP_CLOSED:
        print(f"the model closes {closed:.0%} of the gap, expected at least {MIN_GAP_CLOSED:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
