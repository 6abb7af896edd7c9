"""`widedeep export`: a checkpoint as an ONNX model, a torch `.pt2` program or a model of Triton, to be served."""

from pathlib import Path
from typing import Literal


def add_arguments(parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="a checkpoint, or the model directory of a run")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last or step-<n>, of a model directory")
    parser.add_argument("--format", type=Literal["onnx", "pt2", "triton"], default="onnx", help="what to write")
    parser.add_argument(
        "--stats",
        type=str | None,
        default=None,
        help="also copy the statistics of this data set, by which raw rows become inputs",
    )
    parser.add_argument(
        "--max_batch_size",
        type=int | None,
        default=None,
        help="of triton: the most rows of a request, and of requests that are put together (4096)",
    )
    parser.add_argument("--out", type=str, required=True, help="directory to write; of triton, its name is the model's")


def run(args) -> int:
    from widedeep.export import PROGRAMS, export_checkpoint

    statistics = args.stats and _statistics(Path(args.stats))
    told = export_checkpoint(args.model, args.checkpoint, args.out, args.format, statistics, args.max_batch_size)
    types = {"ids": "int32", "numeric": "float32"}
    inputs = [
        f"{name} [B, {len(columns)}] {types[name]}"
        for name, columns in told["inputs"].items()
        if columns or args.format != "triton"
    ]
    print(
        f"{Path(args.out) / PROGRAMS[args.format]}: {told['checkpoint']}, inputs {' and '.join(inputs)}; logits within "
        f"{told['largest_difference']:.1g} of the model's"
    )
    return 0


def _statistics(data: Path):
    """Of a data set, or that directory itself."""
    from preprocess.provenance import statistics_digest
    from widedeep.errors import InputError
    from widedeep.export import Statistics
    from widedeep.feature_spec import STATISTICS

    directory = data / STATISTICS if (data / STATISTICS).is_dir() else data
    if directory.name != STATISTICS or not directory.is_dir():
        raise InputError(f"{data}: expected a data set with its directory {STATISTICS}")
    return Statistics(directory, statistics_digest(directory))
