"""`widedeep preprocess outbrain`: the raw Kaggle CSVs to shards, with the original's 26 features, or its later 29."""

import re
from typing import Literal

from widedeep.commands.preprocessing import add_engine, add_output, settings
from widedeep.errors import InputError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_argument(
        "--data_path",
        type=str,
        required=True,
        help="directory of clicks_train, events, promoted_content and documents_* (.csv, .csv.gz or .csv.zst)",
    )
    add_output(parser)
    parser.add_argument(
        "--flavour",
        type=Literal["nvtabular", "spark"],
        default="nvtabular",
        help="features of the original's GPU pipeline (nvtabular), or of its CPU pipeline",
    )
    parser.add_argument("--multihot", action="store_true", help="topics, entities and categories of the event page too")
    parser.add_argument(
        "--stats", type=str | None, default=None, help="data set whose statistics to apply, instead of learning them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the 80/20 split of displays")
    add_engine(parser)
    parser.add_argument(
        "--memory_limit", type=str | None, default=None, help="refuse a run that would take more, such as 8G"
    )
    parser.add_argument("--chunk_rows", type=int | None, default=None, help="click rows worked on at a time")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="numpy, or cupy on a GPU")


def run(args) -> int:
    from preprocess import outbrain

    limit = parse_bytes(args.memory_limit)
    report = outbrain.run(outbrain.OutbrainConfig(**settings(args) | {"memory_limit": limit}))
    show(report)
    return 0


def show(report: dict) -> None:
    """The report as two tables, nulls by feature and the time of each stage, and lines."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    train, test = report["train"], report["test"]
    nulls = Table("nulls", "train", "test")
    for name in train["nulls"] | test["nulls"]:
        counts = [part["nulls"].get(name, 0) for part in (train, test)]  # a split without rows counts none
        if any(counts):
            nulls.add_row(name, *(f"{count:,}" for count in counts))
    if nulls.row_count:
        console.print(nulls)
    stages = Table("stage", "rows", "seconds", "rows/s")
    for name, stage in report["stages"].items():
        stages.add_row(name, f"{stage['rows']:,}", f"{stage['seconds']:.1f}", f"{stage['rows_per_second']:,.0f}")
    console.print(stages)
    for split, part in (("train", train), ("test", test)):
        rate = "no rows" if part["click_rate"] is None else f"click rate {part['click_rate']:.4f}"
        print(f"{split}: {part['rows']} rows, {part['displays']} displays, {rate}")
    if report["resumed_stages"]:
        print(f"continued a run that was stopped after {report['resumed_stages'][-1]}")
    absent = report["ads_not_promoted"]
    if absent["ads"]:
        print(f"not in promoted_content.csv: {absent['ads']} ads, {absent['rows']} rows")
    if report["missing_files"]:
        print(f"missing, taken as null: {', '.join(report['missing_files'])}")
    seconds = sum(stage["seconds"] for stage in report["stages"].values())
    print(f"{report['rows'] / max(seconds, 1e-9):,.0f} rows/s, peak {report['peak_process_bytes'] / 2**30:.1f} GiB")


def parse_bytes(text: str | None) -> int | None:
    """`8G`, `512MB` or `1000000` as a number of bytes (powers of 1024); None for None."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([KMGT]?)(?:I?B)?", text.strip().upper(), re.ASCII)
    if found is None:
        raise InputError(f"--memory_limit: expected a size such as 8G or 512M, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])
