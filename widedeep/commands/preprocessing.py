"""What the three `widedeep preprocess` commands have in common: flags of the output and of the engine."""

from typing import Any, Literal

from widedeep.html_page import percent


def add_output(parser) -> None:
    parser.add_argument("--out", type=str, required=True, help="directory of the data set to write")
    parser.add_argument("--rows_per_shard", type=int, default=1 << 22, help="rows of a shard file")
    parser.add_argument(
        "--numeric", type=Literal["float32", "float16"], default="float32", help="type that numbers are stored as"
    )


def add_engine(parser) -> None:
    """The output depends on none of these."""
    parser.add_argument(
        "--engine",
        type=Literal["threads", "processes", "dask"],
        default="threads",
        help="what does the work; the output is the same",
    )
    parser.add_argument("--workers", type=int | None, default=None, help="of the engine; one a core if not given")
    parser.add_argument(
        "--scheduler",
        type=str | None,
        default=None,
        help="with --engine dask: address of a running scheduler, whose workers see the same files",
    )


def settings(args) -> dict[str, Any]:
    """The flags as arguments of a config."""
    return {name: value for name, value in vars(args).items() if name != "config"}


def show_splits(out: str, report: dict[str, Any]) -> None:
    for split in ("train", "test"):
        part = report[split]
        lacking = "no labels" if part["rows"] else "no rows"
        rate = lacking if part["positive_rate"] is None else f"{percent(part['positive_rate'])} positive"
        records = f" of {part['records']} records" if "records" in part else ""
        print(f"{out}/{split}: {part['rows']} rows{records}, {rate}")
