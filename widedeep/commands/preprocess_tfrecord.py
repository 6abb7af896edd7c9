"""`widedeep preprocess tfrecord`: prebatched TFRecords of the original's Feb-2021 release to shards."""

from widedeep.commands.preprocessing import add_engine, add_output, settings, show_splits


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_argument("--data_path", type=str, required=True, help="directory with train/part-* and eval/part-*")
    add_output(parser)
    add_engine(parser)


def run(args) -> int:
    from preprocess import tfrecord

    report = tfrecord.run(tfrecord.TFRecordConfig(**settings(args)))
    show_splits(args.out, report)
    if report["left_out"]:
        print(f"left out: {', '.join(report['left_out'])}")
    return 0
