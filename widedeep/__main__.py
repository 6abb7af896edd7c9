"""`widedeep ...`, `python -m widedeep ...`, and `torchrun -m widedeep train ...`."""

import io
import sys


def main() -> int:
    """The command line; returns its exit code. `doctor` also answers where what the others need is not installed."""
    try:
        from widedeep import cli
    except ModuleNotFoundError as missing:
        if sys.argv[1:2] == ["doctor"]:
            from widedeep import doctor

            return doctor.run(json="--json" in sys.argv[2:])
        print(
            f"widedeep: the command line needs the package {missing.name}, which is not installed; "
            "`widedeep doctor` lists all that is missing",
            file=sys.stderr,
        )
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and paths may hold what the terminal cannot show
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
