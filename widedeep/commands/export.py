"""`widedeep export`: a checkpoint as an ONNX model or a torch `.pt2` program, for other programs to serve."""

from pathlib import Path
from typing import Literal


def add_arguments(parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="a checkpoint, or the model directory of a run")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last or step-<n>, of a model directory")
    parser.add_argument("--format", type=Literal["onnx", "pt2"], default="onnx", help="what to write")
    parser.add_argument(
        "--stats",
        type=str | None,
        default=None,
        help="also copy the statistics of this data set, by which raw rows become inputs",
    )
    parser.add_argument("--out", type=str, required=True, help="directory to write")


def run(args) -> int:
    from widedeep.export import export_checkpoint

    statistics = args.stats and _statistics(Path(args.stats))
    told = export_checkpoint(args.model, args.checkpoint, args.out, args.format, statistics)
    inputs = told["inputs"]
    print(
        f"{args.out}/model.{args.format}: {told['checkpoint']}, inputs ids [B, {len(inputs['ids'])}] int32 and numeric "
        f"[B, {len(inputs['numeric'])}] float32; logits within {told['largest_difference']:.1g} of the model's"
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
