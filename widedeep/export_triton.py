"""What NVIDIA Triton Inference Server wants of an ONNX model: its configuration, its name, its place in the directory.

Triton serves a directory of models, a repository: the parent of what `export` writes. Of a model's directory it reads
`config.pbtxt` and the numbered versions; the rest it leaves alone.
"""

import os
import re
from pathlib import Path

from torch import Tensor, nn

from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec

CONFIG = "config.pbtxt"
MODEL = "1/model.onnx"  # version 1; Triton's own name of the file
MAX_BATCH_SIZE = 4096
LARGEST_BATCH = 2**31 - 1  # the field is an int32
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # Triton's HTTP server does not decode names: %20 is no blank to it


class OneInput(nn.Module):
    """`Served` of a spec without numeric or without categorical features: Triton refuses an input of 0 columns.

    forward(x [B, K] int32 for ids, or [B, N] float32 for numeric) -> logit [B], prob [B], as `served` gives them where
    the other input is empty.
    """

    def __init__(self, served: nn.Module, name: str):
        super().__init__()
        self.served, self.name = served, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        empty = x[:, :0]
        return self.served(x, empty.float()) if self.name == "ids" else self.served(empty.int(), x)


def input_columns(spec: FeatureSpec) -> dict[str, int]:
    """The inputs that have columns, and how many: K of ids, N of numeric."""
    sizes = {"ids": spec.id_columns, "numeric": len(spec.numeric)}
    return {name: columns for name, columns in sizes.items() if columns}


def model_name(out: Path) -> str:
    """The last part of a path: Triton demands that a model is called what its directory is.

    Raises:
        InputError: as part of a request's URL it would not reach the model, or the text of the config would be another.
    """
    name = os.path.basename(os.path.abspath(out))
    if not NAME.fullmatch(name):
        raise InputError(
            f"{out}: expected a last part of ASCII letters, digits, '_', '-' and, but not in front, '.', since it is "
            f"what Triton calls the model, got {name!r}"
        )
    return name


def batch_size(given: int | None) -> int:
    """The most rows of a batch: `given`, or 4096 if None.

    Raises:
        InputError: it is less than 1, or more than the config can say.
    """
    size = MAX_BATCH_SIZE if given is None else given
    if not 1 <= size <= LARGEST_BATCH:
        raise InputError(f"max_batch_size: expected 1 to {LARGEST_BATCH}, got {size}")
    return size


def config(name: str, spec: FeatureSpec, max_batch_size: int) -> str:
    """The text of `config.pbtxt`: a ModelConfig in protobuf's text format.

    dims are without the batch. An output of [B] cannot be declared: it is [B, 1] to clients, and the reshape says that
    the model gives [B]. Without an instance_group Triton runs the model on every GPU, or on the CPU if there is none.

    Raises:
        InputError: the spec has no features, so the model no inputs.
    """
    columns = input_columns(spec)
    if not columns:
        raise InputError(
            "the model has no features: expected at least one, since Triton serves no model without inputs"
        )
    types = {"ids": "TYPE_INT32", "numeric": "TYPE_FP32"}
    inputs = [_tensor(key, types[key], f"dims: [ {size} ]") for key, size in columns.items()]
    outputs = [_tensor(key, "TYPE_FP32", "dims: [ 1 ]", "reshape { shape: [ ] }") for key in ("logit", "prob")]
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {max_batch_size}"]
    return "\n".join([*lines, _list("input", inputs), _list("output", outputs), "dynamic_batching { }"]) + "\n"


def _tensor(name: str, data_type: str, *shape: str) -> str:
    fields = [f'name: "{name}"', f"data_type: {data_type}", *shape]
    return "  {\n" + "\n".join(f"    {field}" for field in fields) + "\n  }"


def _list(key: str, tensors: list[str]) -> str:
    return f"{key} [\n" + ",\n".join(tensors) + "\n]"


def onnx_path(directory: Path, of_several_files: bool) -> Path:
    """Where the ONNX model goes, its directory made: Triton wants one of several files in a directory `model.onnx`."""
    path = directory / MODEL
    if of_several_files:
        path /= path.name
    path.parent.mkdir(parents=True)
    return path
