"""`widedeep preprocess tabular`: any CSV, Parquet or Arrow tables to shards, as a feature spec with transforms says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from widedeep.commands.preprocessing import add_engine, add_output, settings, show_splits


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_argument(
        "inputs",
        type=str,
        nargs="*",
        default=[],
        help="CSV, Parquet or Arrow files, or directories of such (none: the spec's)",
    )
    parser.add_argument(
        "--spec",
        type=str,
        required=True,
        help="feature spec with transforms (`widedeep spec infer` proposes one), or a data set for its own",
    )
    add_output(parser)
    parser.add_argument("--test", type=str, nargs="+", default=[], help="files of the test set, or directories of such")
    parser.add_argument(
        "--split",
        type=str | None,
        default=None,
        help="random:0.2, last:1000, last:0.2, group:0.2, time:COLUMN:0.2, time:COLUMN:2016-06-26, or none",
    )
    parser.add_argument(
        "--stats",
        type=str | None,
        default=None,
        help="data set whose statistics (vocabularies, edges, means) to apply, instead of learning them",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random and group splits")
    add_engine(parser)


def run(args) -> int:
    from preprocess import tabular

    given = settings(args) | {"inputs": args.inputs or _inputs_of(args.config)}
    show_splits(args.out, tabular.run(tabular.TabularConfig(**given)))
    return 0


def _inputs_of(configs: Sequence[Any] | None) -> list[str]:
    """What config files name as inputs, the last of them: argparse puts words that are not there in their place."""
    named = [yaml.safe_load(Path(str(config)).read_text(encoding="utf-8")).get("inputs") for config in configs or ()]
    return next((inputs for inputs in reversed(named) if inputs), [])
