"""Wide & Deep click-through-rate models: from raw tables to a trained, evaluated model.

Importing this package registers nothing and loads nothing heavy; each name below is resolved when first used.
"""

from importlib import import_module, metadata

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
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f"widedeep.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'widedeep' has no attribute {name!r}")
