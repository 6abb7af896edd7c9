"""Prebatched TFRecords of the original's Feb-2021 release to a data set of shards."""

from preprocess.tfrecord.pipeline import TFRecordConfig, run

__all__ = ["TFRecordConfig", "run"]
