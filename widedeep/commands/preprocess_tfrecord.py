"""`widedeep preprocess tfrecord`: prebatched TFRecords of the original's Feb-2021 release to shards."""

from typing import Literal


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_argument("--data_path", type=str, required=True, help="directory with train/part-* and eval/part-*")
    parser.add_argument("--out", type=str, required=True, help="directory of the data set to write")
    parser.add_argument("--rows_per_shard", type=int, default=1 << 22, help="rows of a shard file")
    parser.add_argument("--numeric", type=Literal["float32", "float16"], default="float32", help="stored type")


def run(args) -> int:
    from preprocess import tfrecord

    values = {name: value for name, value in vars(args).items() if name != "config"}
    report = tfrecord.run(tfrecord.TFRecordConfig(**values))
    for split in ("train", "test"):
        part = report[split]
        rate = "no rows" if part["positive_rate"] is None else f"{100 * part['positive_rate']:.2f} % positive"
        print(f"{args.out}/{split}: {part['rows']} rows of {part['records']} records, {rate}")
    if report["left_out"]:
        print(f"left out: {', '.join(report['left_out'])}")
    return 0
