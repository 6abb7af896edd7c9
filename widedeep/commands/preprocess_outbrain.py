"""`widedeep preprocess outbrain`: the raw Kaggle CSVs to shards, with the original's 26 features."""

from typing import Literal

from widedeep.errors import InputError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_argument("--data_path", type=str, required=True, help="directory of the raw CSVs (plain, .gz or .zst)")
    parser.add_argument("--out", type=str, required=True, help="directory of the data set to write")
    parser.add_argument("--flavour", type=Literal["nvtabular"], default="nvtabular", help="whose formulas")
    parser.add_argument("--stats", type=str | None, default=None, help="apply the statistics of an earlier run")
    parser.add_argument("--seed", type=int, default=0, help="of the 80/20 split of displays")
    parser.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on it")
    parser.add_argument("--memory_limit", type=str | None, default=None, help="of all processes together, such as 8G")
    parser.add_argument("--chunk_rows", type=int | None, default=None, help="rows worked on at a time")
    parser.add_argument("--rows_per_shard", type=int, default=1 << 22, help="rows of a shard file")
    parser.add_argument("--numeric", type=Literal["float32", "float16"], default="float32", help="stored type")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="numpy, or cupy on a GPU")


def run(args) -> int:
    from preprocess import outbrain

    values = {name: value for name, value in vars(args).items() if name != "config"}
    values["memory_limit"] = parse_bytes(args.memory_limit)
    report = outbrain.run(outbrain.OutbrainConfig(**values))
    for split in ("train", "test"):
        part = report[split]
        rate = "no rows" if part["click_rate"] is None else f"click rate {part['click_rate']:.4f}"
        print(f"{args.out}/{split}: {part['rows']} rows, {part['displays']} displays, {rate}")
    if absent := report["missing_files"]:
        print(f"missing, taken as null: {', '.join(absent)}")
    seconds = sum(stage["seconds"] for stage in report["stages"].values())
    print(
        f"{report['rows'] / max(seconds, 1e-9):,.0f} rows/s, peak {report['peak_process_bytes'] / 2**30:.1f} GiB a process"
    )
    return 0


def parse_bytes(text: str | None) -> int | None:
    """`8G`, `512MB` or `1000000` as a number of bytes (powers of 1024); None for None."""
    if text is None:
        return None
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        return int(float(number.removesuffix(unit)) * UNITS[unit])
    except (KeyError, ValueError) as error:
        raise InputError(f"--memory_limit: expected a size such as 8G or 512M, got {text!r}.") from error
