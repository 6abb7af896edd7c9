"""`widedeep evaluate`: every metric of a checkpoint on the rows of a data set."""

from widedeep.config import Scoring


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_options(Scoring)
    parser.add_argument(
        "--disable_map_calculation", type=bool, nargs="?", const=True, default=False, help="leave MAP@12 out"
    )
    parser.add_argument(
        "--num_auc_thresholds", type=int, default=200, help="n of the auc_n that is printed, an AUC by n thresholds"
    )
    parser.add_argument("--out", type=str | None, default=None, help="also write this JSON file, with calibration bins")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    from widedeep.evaluate import evaluate_checkpoint, scoring_config
    from widedeep.run import launch

    config, directory = scoring_config(Scoring.of(args))
    config = config.updated(
        disable_map_calculation=args.disable_map_calculation, num_auc_thresholds=args.num_auc_thresholds
    )
    launch(config, lambda c, comm: evaluate_checkpoint(c, comm, directory, args.split, args.out, args.json))
    return 0
