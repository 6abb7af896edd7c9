"""Models outside of a run: that of a checkpoint, and a checkpoint of one."""

from pathlib import Path

import torch
import yaml

from widedeep import atomic, checkpoint
from widedeep.checkpoint import Progress
from widedeep.config import TrainConfig
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep


def load_model(path: str | Path, which: str = "best") -> WideDeep:
    """The trained model, on the CPU, in evaluation mode; `model.spec` says which column is which.

    Args:
        path: a checkpoint, or the model directory of a run.
        which: best, last or step-<n>, of a model directory.
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
        InputError: the model has one part only, or a share of its weights, or none (on torch's device meta), or weights
            other than float32, or layers or parameters that a WideDeep is not made with (a parametrized weight is saved
            as the value that it has), or a feature spec that no file can hold; `path` cannot be written, or is there
            and is no checkpoint, or holds more.
        RunError: the disk is full.
    """
    model = getattr(model, "_orig_mod", model)  # that of torch.compile
    if not isinstance(model, WideDeep):
        raise InputError(f"{path}: expected a WideDeep, got {type(model).__name__}")
    if not (model.has_wide and model.has_deep) or model.share.world > 1:
        raise InputError(f"{path}: expected a model with both parts and whole tables, for a checkpoint has these")
    _check_weights(model, path)
    arrays = model.named_arrays()
    for name, array in arrays.items():
        if array.is_meta:
            raise InputError(f"{path}: expected weights, got none for {name}, which is on torch's device meta")
        if type(array) is not torch.Tensor or array.dtype != torch.float32:  # a DTensor, say, of fully_shard
            got = f"a {type(array).__name__} of {array.dtype} for {name}"
            raise InputError(f"{path}: expected whole weights of float32, got {got}")
    config = TrainConfig().updated(deep_hidden_units=list(model.hidden), deep_dropout=model.dropout)
    texts = {checkpoint.SPEC: _spec_text(model.spec), checkpoint.CONFIG: config.to_yaml()}
    atomic.check(Path(path), atomic.Output(checkpoint.STATE, checkpoint.FILES))
    parts = {checkpoint.MODEL: {name: array.cpu() for name, array in arrays.items()}, checkpoint.OPTIMIZER: {}}
    checkpoint.write(Path(path), parts, Progress(model.seed, rows=0, global_batch_size=0), texts)


def _check_weights(model: WideDeep, path: str | Path) -> None:
    """Raises InputError where a model like it, freshly made, would not compute the same with its weights."""
    try:
        model.check_modules()
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    with torch.device("meta"):
        fresh = WideDeep(model.spec, model.hidden, seed=0)
    shapes, wanted = ({name: list(a.shape) for name, a in m.named_arrays().items()} for m in (model, fresh))
    for name in wanted | shapes:
        if shapes.get(name) != wanted.get(name):
            raise InputError(f"{path}: expected shape {wanted.get(name)} for {name}, got {shapes.get(name)}")
    made = {name.split(".")[0] for name, _ in fresh.named_parameters()} | {"parametrizations"}
    if others := [name for name, _ in model.named_parameters() if name.split(".")[0] not in made]:
        raise InputError(
            f"{path}: expected no parameters but a WideDeep's, which are all that is kept, got {others[0]}"
        )


def _spec_text(spec: FeatureSpec) -> str:
    """The file of a spec, which may be made in code. Raises InputError where it could not be loaded again."""
    spec = spec.without_sources()
    FeatureSpec.from_dict(spec.to_dict(), "feature spec")
    try:
        return spec.to_yaml()
    except yaml.YAMLError as error:
        raise InputError(f"feature spec: expected metadata and transforms of plain values: {error}") from error
