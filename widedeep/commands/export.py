"""`widedeep export`: a checkpoint as an ONNX model or a torch `.pt2` program, for other programs to serve."""

from typing import Literal


def add_arguments(parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="a checkpoint, or the model directory of a run")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last or step-<n>, of a model directory")
    parser.add_argument("--format", type=Literal["onnx", "pt2"], default="onnx", help="what to write")
    parser.add_argument("--out", type=str, required=True, help="directory to write")


def run(args) -> int:
    from widedeep.export import export_checkpoint

    told = export_checkpoint(args.model, args.checkpoint, args.out, args.format)
    inputs = told["inputs"]
    print(
        f"{args.out}/model.{args.format}: {told['checkpoint']}, inputs ids [B, {len(inputs['ids'])}] int32 and numeric "
        f"[B, {len(inputs['numeric'])}] float32; logits within {told['largest_difference']:.1g} of the model's"
    )
    return 0
