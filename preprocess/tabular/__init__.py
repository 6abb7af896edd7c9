"""Any CSV, Parquet or Arrow tables to a data set of shards, as a feature spec with transforms says."""

from preprocess.tabular.config import TabularConfig
from preprocess.tabular.encoder import Encoder
from preprocess.tabular.infer import infer_spec
from preprocess.tabular.pipeline import run
from preprocess.tabular.raw import RawBatch, raw_batches

__all__ = ["Encoder", "RawBatch", "TabularConfig", "infer_spec", "raw_batches", "run"]
