"""`widedeep preprocess tabular`: any CSV, Parquet or Arrow tables to shards, as a feature spec with transforms says."""

from widedeep.commands.preprocessing import add_engine, add_output, settings, show_splits


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_argument(
        "inputs", type=str, nargs="*", default=[], help="CSV, Parquet or Arrow files (none: the spec's)"
    )
    parser.add_argument("--spec", type=str, required=True, help="feature spec with transforms")
    add_output(parser)
    parser.add_argument("--test", type=str, nargs="+", default=[], help="files of the test set")
    parser.add_argument(
        "--split",
        type=str | None,
        default=None,
        help="random:0.2, last:1000, last:0.2, group:0.2, time:COLUMN:0.2 or time:COLUMN:2016-06-26",
    )
    parser.add_argument("--stats", type=str | None, default=None, help="apply the statistics of an earlier run")
    parser.add_argument("--seed", type=int, default=0, help="of random and group splits")
    add_engine(parser)


def run(args) -> int:
    from preprocess import tabular

    show_splits(args.out, tabular.run(tabular.TabularConfig(**settings(args))))
    return 0
