"""`widedeep parity`: replays a file of golden numbers through a step and compares every quantity."""

from widedeep.config import Precision, StepKind


def add_arguments(parser) -> None:
    parser.add_argument("file", type=str, help="golden file (.npz)")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--step", type=StepKind, default="auto", help="which implementation")
    parser.add_argument("--precision", type=Precision, default="fp32", help="of matrix products")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    from widedeep import parity

    return parity.run(args.file, args.device, args.step, args.precision, args.json)
