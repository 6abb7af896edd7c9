"""The command line for tests; one that uses it is skipped where jsonargparse, which it needs, is not installed."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

FLAGS = shlex.split(
    "--cpu --global_batch_size 64 --num_epochs 1 --deep_warmup_epochs 0 --seed 5 --threads 1 --deep_hidden_units 8"
    " --step reference --affinity disabled"
)


def command_line() -> ModuleType:
    """The module `widedeep.cli`; skips the test, or at import the file."""
    pytest.importorskip("jsonargparse", reason="the command line needs jsonargparse, which is not installed")
    from widedeep import cli

    return cli


def main(words: Sequence[str]) -> int:
    """`widedeep *words` in this process; returns its exit code."""
    return command_line().main(words)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def train_words(data: Path, out: Path, *more: str) -> list:
    """A short training on `data`, with its model and results in `out`."""
    return [
        "train",
        "--dataset_path",
        data,
        "--model_dir",
        out / "model",
        "--results_dir",
        out / "results",
        *FLAGS,
        *more,
    ]
