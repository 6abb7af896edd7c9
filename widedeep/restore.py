"""Models outside of a run: that of a checkpoint, and a checkpoint of one."""

from pathlib import Path

import torch

from widedeep import checkpoint
from widedeep.checkpoint import Progress
from widedeep.config import TrainConfig
from widedeep.errors import InputError
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


def save_model(model: WideDeep, path: str | Path) -> None:
    """Writes a model as a checkpoint, which `load_model` and the commands take: `widedeep evaluate --model PATH`,
    predict, export, and `train --initial_checkpoint PATH`, which begins with its weights and a fresh optimizer state.

    Args:
        path: directory to write; an earlier checkpoint there is replaced when the new one is complete.
    Raises:
        InputError: the model has one part only, or a share of its tables; `path` cannot be written, or is there and no
            checkpoint.    RunError: the disk is full.
    """
    if not (model.has_wide and model.has_deep) or model.share.world > 1:
        raise InputError(f"{path}: expected a model with both parts and whole tables, for a checkpoint has these")
    arrays = {name: array.detach().cpu() for name, array in model.named_arrays().items()}
    config = TrainConfig().updated(deep_hidden_units=list(model.hidden), deep_dropout=model.dropout)
    texts = {checkpoint.SPEC: model.spec.without_sources().to_yaml(), checkpoint.CONFIG: config.to_yaml()}
    parts = {checkpoint.MODEL: arrays, checkpoint.OPTIMIZER: {}}
    checkpoint.write(Path(path), parts, Progress(model.seed, rows=0, global_batch_size=0), texts)
