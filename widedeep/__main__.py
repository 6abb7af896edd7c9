"""`widedeep ...`, `python -m widedeep ...`, and `torchrun -m widedeep train ...`."""

import io
import os
import sys


def main() -> int:
    """The command line; returns its exit code. `doctor` also answers where what the others need is not installed."""
    _open_closed()
    try:
        from widedeep import cli
    except KeyboardInterrupt:
        print("widedeep: interrupted", file=sys.stderr)
        return 130
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


def _open_closed() -> None:
    """Opens what stands for a standard stream that the caller closed: else an output would take its number, and get
    what a library prints there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)


if __name__ == "__main__":
    sys.exit(main())
