"""`widedeep metrics`: the metrics of any file of predictions."""


def add_arguments(parser) -> None:
    parser.add_argument("--predictions", type=str, required=True, help=".csv (.gz and .zst too) or .parquet file")
    parser.add_argument("--label", type=str, default="label", help="column of clicked (1) or not (0)")
    parser.add_argument("--score", type=str, default="prob", help="column of the probability of a click")
    parser.add_argument("--group", type=str | None, default=None, help="column of what is ranked together")
    parser.add_argument("--k", type=int, default=12, help="ranks that count in MAP")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    from widedeep import scoring

    return scoring.run(args.predictions, args.label, args.score, args.group, args.k, args.json)
