"""The model of a checkpoint, for use outside of a run."""

from pathlib import Path

import torch

from widedeep import checkpoint
from widedeep.config import TrainConfig
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep


def load_model(path: str | Path, which: str = "best") -> WideDeep:
    """The trained model, on the CPU, in evaluation mode; `model.spec` says which column is which.

    Args:
        path: a checkpoint, or the model directory of a run.    which: best, last or step-<n>, of a model directory.
    Raises:
        InputError: there is none, or it is damaged.
    """
    directory = checkpoint.locate(path, which)
    progress = checkpoint.read_progress(directory)  # which checks the files
    shape = TrainConfig.load(directory / checkpoint.CONFIG).model
    spec = FeatureSpec.load(directory / checkpoint.SPEC)
    with torch.device("cpu"):
        model = WideDeep(spec, shape.deep_hidden_units, shape.deep_dropout, wide_init="zeros", seed=progress.seed)
    checkpoint.load_arrays(directory, checkpoint.MODEL, model.named_arrays())
    return model.eval()
