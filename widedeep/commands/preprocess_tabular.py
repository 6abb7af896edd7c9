"""`widedeep preprocess tabular`: any CSV, Parquet or Arrow tables to shards, as a feature spec with transforms says."""

from typing import Literal


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_argument(
        "inputs", type=str, nargs="*", default=[], help="CSV, Parquet or Arrow files (none: the spec's)"
    )
    parser.add_argument("--spec", type=str, required=True, help="feature spec with transforms")
    parser.add_argument("--out", type=str, required=True, help="directory of the data set to write")
    parser.add_argument("--test", type=str, nargs="+", default=[], help="files of the test set")
    parser.add_argument(
        "--split",
        type=str | None,
        default=None,
        help="random:0.2, last:1000, last:0.2, group:0.2, time:COLUMN:0.2 or time:COLUMN:2016-06-26",
    )
    parser.add_argument("--stats", type=str | None, default=None, help="apply the statistics of an earlier run")
    parser.add_argument("--seed", type=int, default=0, help="of random and group splits")
    parser.add_argument("--workers", type=int, default=1, help="threads; the output does not depend on it")
    parser.add_argument("--rows_per_shard", type=int, default=1 << 22, help="rows of a shard file")
    parser.add_argument("--numeric", type=Literal["float32", "float16"], default="float32", help="stored type")


def run(args) -> int:
    from preprocess import tabular

    values = {name: value for name, value in vars(args).items() if name != "config"}
    report = tabular.run(tabular.TabularConfig(**values))
    for split in ("train", "test"):
        part = report[split]
        rate = "no rows" if part["positive_rate"] is None else f"{100 * part['positive_rate']:.2f} % positive"
        print(f"{args.out}/{split}: {part['rows']} rows, {rate}")
    return 0
