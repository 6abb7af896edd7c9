"""`widedeep report`: one self-contained HTML page of a run."""


def add_arguments(parser) -> None:
    parser.add_argument("run_dir", type=str, help="results directory of a training")
    parser.add_argument("--out", type=str | None, default=None, help="the page (report.html in run_dir)")


def run(args) -> int:
    from widedeep import report

    print(report.run(args.run_dir, args.out))
    return 0
