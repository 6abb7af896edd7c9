"""`widedeep describe`: the data report of shards, on the terminal, as JSON or as one HTML page."""

from widedeep.errors import InputError


def add_arguments(parser) -> None:
    parser.add_argument("path", type=str, help="data set or shard set that `widedeep preprocess` wrote")
    parser.add_argument("--out", type=str | None, default=None, help="also write this .html or .json file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    import json
    from pathlib import Path

    from widedeep import describe, describe_page
    from widedeep.outputs import write_json, write_text

    out = None if args.out is None else Path(args.out)
    if out is not None and out.suffix not in (".html", ".json"):
        raise InputError(f"{out}: expected a name that ends in .html or .json")
    report = describe.describe(args.path)
    if out is not None:
        write_json(out, report) if out.suffix == ".json" else write_text(out, describe_page.page(report))
    if args.json:
        print(json.dumps(report))
    else:
        describe_page.show(report)
    return 0
