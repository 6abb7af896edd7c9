"""Outbrain click prediction: the raw Kaggle CSVs to shards of 13 categorical and 13 numeric features, and if asked for
3 multi-hot ones.

Left joins of clicks, events, promoted content and document tables; a split by day and display; click rates and counts
by key, learned on train rows; tf-idf similarities of the two pages; buckets. Formulas are those of the original's GPU
pipeline (flavour `nvtabular`) or of its CPU pipeline (`spark`). Modules, in the order of the data: `layout` (files),
`columns` (tables and counts), `flavour` (what flavours decide; `nvtabular`, `spark`), `tables` (look-ups),
`similarity`, `lists`, `clicks` (pass 1), `statistics`, `ads` (features of an ad), `transform` (pass 2), `pipeline`,
`resume`.
"""

from preprocess.outbrain.config import OutbrainConfig
from preprocess.outbrain.pipeline import run

__all__ = ["OutbrainConfig", "run"]
