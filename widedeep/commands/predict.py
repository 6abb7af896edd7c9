"""`widedeep predict`: a checkpoint's probability of every row of a data set, to a Parquet or CSV file."""

from widedeep.config import Scoring


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_options(Scoring)
    parser.add_argument("--out", type=str, required=True, help="file to write, .parquet or .csv")


def run(args) -> int:
    from widedeep.evaluate import scoring_config
    from widedeep.predict import predict_checkpoint
    from widedeep.run import launch

    config, directory = scoring_config(Scoring.of(args))
    launch(config, lambda c, comm: predict_checkpoint(c, comm, directory, args.split, args.out))
    return 0
