"""Wide & Deep click-through-rate models: from raw tables to a trained, evaluated model.

Importing this package registers nothing and loads nothing heavy; each name below is resolved when first used.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

__version__ = metadata.version("widedeep")

_LAZY = {
    "WideDeep": "model",
    "FeatureSpec": "feature_spec",
    "RMSprop": "optim",
    "FTRL": "optim",
    "Reader": "data",
    "Batch": "data",
    "ShardSet": "shards",
    "ShardWriter": "shards",
    "StepConfig": "step",
    "make_step": "step",
    "load_model": "restore",
    "save_model": "restore",
}
# In words, as are the imports below: type checkers read, they do not run.
__all__ = [
    "FTRL",
    "Batch",
    "FeatureSpec",
    "RMSprop",
    "Reader",
    "ShardSet",
    "ShardWriter",
    "StepConfig",
    "WideDeep",
    "__version__",
    "load_model",
    "make_step",
    "save_model",
]

if TYPE_CHECKING:
    from widedeep.data import Batch, Reader
    from widedeep.feature_spec import FeatureSpec
    from widedeep.model import WideDeep
    from widedeep.optim import FTRL, RMSprop
    from widedeep.restore import load_model, save_model
    from widedeep.shards import ShardSet, ShardWriter
    from widedeep.step import StepConfig, make_step
else:  # unseen by type checkers, to which any name would be fine

    def __getattr__(name: str):
        if name in _LAZY:
            return getattr(import_module(f"widedeep.{_LAZY[name]}"), name)
        raise AttributeError(f"module 'widedeep' has no attribute {name!r}")
