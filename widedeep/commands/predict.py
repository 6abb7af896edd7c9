"""`widedeep predict`: a checkpoint's probability of each row of a data set or of raw files, as Parquet or CSV."""

import os
from dataclasses import fields

from widedeep.config import Scoring
from widedeep.errors import InputError

OF_DATA_SETS = ("fspec_file", "split", "reader_mode", "verify")  # flags that say nothing of raw files


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_options(Scoring)
    parser.add_argument("--out", type=str, required=True, help="file to write, .parquet or .csv")
    parser.add_argument(
        "--rows",
        type=str,
        nargs="+",
        default=[],
        help="raw CSV, Parquet or Arrow files, or directories of such, to score instead; dataset_path is then what the"
        " model was trained on",
    )
    parser.add_argument("--keep", type=str, nargs="+", default=[], help="columns of --rows to write beside theirs")


def run(args) -> int:
    from widedeep.evaluate import scoring_config
    from widedeep.run import launch

    scoring = Scoring.of(args)
    if args.keep and not args.rows:
        raise InputError("--keep: expected --rows beside it, whose columns it names")
    config, directory = scoring_config(scoring)
    if not args.rows:
        from widedeep.predict import predict_checkpoint

        launch(config, lambda c, comm: predict_checkpoint(c, comm, directory, args.split, args.out))
        return 0

    from preprocess.engine import ThreadEngine, cores
    from preprocess.inputs import check_outside, files_of
    from preprocess.tabular import Encoder, raw_batches
    from widedeep.predict_rows import predict_rows

    _check_alone(scoring)
    if os.path.realpath(args.out) in map(os.path.realpath, files_of(args.rows)):
        raise InputError(f"--out {args.out}: expected another file than those of --rows, which it would replace")
    check_outside(args.out, args.rows)
    encoder = Encoder(scoring.dataset_path)
    with ThreadEngine(scoring.threads or cores()) as engine:
        batches = raw_batches(encoder, args.rows, args.keep, scoring.eval_batch_size, engine)
        launch(config, lambda c, comm: predict_rows(c, comm, directory, encoder.spec, batches, args.out))
    return 0


def _check_alone(scoring: Scoring) -> None:
    given = {f.name for f in fields(Scoring) if getattr(scoring, f.name) != f.default}
    for name in OF_DATA_SETS:
        if name in given:
            raise InputError(f"--{name}: expected none beside --rows, which are in no data set")
