"""The command line for tests; one that uses it is skipped where jsonargparse, which it needs, is not installed."""

from collections.abc import Sequence
from types import ModuleType

import pytest


def command_line() -> ModuleType:
    """The module `widedeep.cli`; skips the test, or at import the file."""
    pytest.importorskip("jsonargparse", reason="the command line needs jsonargparse, which is not installed")
    from widedeep import cli

    return cli


def main(words: Sequence[str]) -> int:
    """`widedeep *words` in this process; returns its exit code."""
    return command_line().main(words)
