"""`widedeep doctor`: what is installed, what was built, what is missing and what to do about it."""


def add_arguments(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    from widedeep import doctor

    return doctor.run(json=args.json)
