"""A checkpoint as a program that needs none of this package: ONNX, torch's own `.pt2`, or ONNX as Triton loads it.

The directory holds the program (`PROGRAMS`), the feature spec, and `export.json`: which column of the inputs is which,
where the weights come from, and how far the program's logits are from the model's. Where they are given it also holds
the statistics by which raw rows become these inputs. For Triton it is an entry of a model repository.
"""

import contextlib
import copy
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widedeep import __version__, atomic, checkpoint, export_triton
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import STATISTICS, FeatureSpec
from widedeep.model import WideDeep
from widedeep.restore import load_model

PROGRAMS = {"onnx": "model.onnx", "pt2": "model.pt2", "triton": export_triton.MODEL}
FORMATS = tuple(PROGRAMS)
DESCRIPTION = "export.json"
FILES = (DESCRIPTION, checkpoint.SPEC, "model.*", f"{STATISTICS}/*")
TRITON_FILES = (export_triton.CONFIG, export_triton.MODEL, f"{export_triton.MODEL}/model.*")
OUTPUT = atomic.Output(DESCRIPTION, (*FILES, *TRITON_FILES))
CHECKED = (1, 7, 300)  # rows of the batches on which the program must agree with the model
TOLERANCE = 1e-5  # of the largest logit, 1 at least: the order of float32 sums differs
LARGEST_ONNX = 1_500_000_000  # bytes of weights in the file itself; one may hold 2 GiB, more go beside it

Program = Callable[[Tensor, Tensor], Tensor]


class Statistics(NamedTuple):
    """A data set's directory of statistics, and its digest (`metadata.statistics` of a feature spec)."""

    directory: Path
    digest: str


class Served(nn.Module):
    """The model of `WideDeep` in plain torch operators, without dropout; the weights are the model's own.

    forward(ids [B, K] int32, numeric [B, N] float32) -> logit [B], prob [B], both float32.
    """

    wide: Tensor
    wide_numeric: Tensor
    wide_bias: Tensor
    first_rows: Tensor

    def __init__(self, model: WideDeep):
        super().__init__()
        self.spec, self.has_deep = model.spec, model.has_deep
        self.tables, self.layers, self.out = model.tables, model.layers, model.out
        _, wide, wide_numeric, wide_bias = model.lookup_weights()
        for name, weight in (("wide", wide), ("wide_numeric", wide_numeric), ("wide_bias", wide_bias)):
            self.register_buffer(name, weight.detach())
        first = [base for base, f in zip(self.spec.row_base, self.spec.categorical) for _ in range(f.hotness)]
        self.register_buffer("first_rows", torch.tensor(first, dtype=torch.int64))  # [K]: of a table in wide

    def forward(self, ids: Tensor, numeric: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.spec
        logit = self.wide_bias
        if spec.numeric:  # a product of no columns is not zero in onnxruntime 1.20 to 1.31
            logit = numeric @ self.wide_numeric + logit
        pieces = [(column, numeric[:, n : n + 1]) for n, column in enumerate(spec.numeric_columns)]
        valid, rows = ids >= 0, ids.long().clamp(min=0)
        if spec.categorical:
            logit = logit + (self.wide[rows + self.first_rows] * valid).sum(1)
        for f, feature in enumerate(spec.categorical):
            if not (self.has_deep and feature.dim):
                continue
            columns = slice(spec.hot_start[f], spec.hot_start[f] + feature.hotness)
            if feature.hotness == 1:  # without a sum of one, which runtimes take long for
                pooled = F.embedding(rows[:, columns.start], self.tables[f]) * valid[:, columns]
            else:
                present = valid[:, columns].unsqueeze(-1)
                pooled = (F.embedding(rows[:, columns], self.tables[f]) * present).sum(1)
                if spec.mean[f]:
                    pooled = pooled / present.sum(1).clamp(min=1)
            pieces.append((spec.table_columns[f], pooled))
        if self.has_deep:
            x = torch.cat([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])], 1)
            for layer in self.layers:
                x = torch.relu(layer(x))
            logit = logit + self.out(x)[:, 0]
        return logit, torch.sigmoid(logit)


def export_checkpoint(
    model: str | Path,
    which: str,
    out: str | Path,
    kind: str,
    statistics: Statistics | None,
    max_batch_size: int | None,
) -> dict[str, Any]:
    """Exports a checkpoint of a run; returns what `export.json` says.

    Args:
        model: a checkpoint, or the model directory of a run.
        which: best, last or step-<n>, of a model directory.
        statistics, max_batch_size: as in `export`.
    Raises:
        InputError: the checkpoint is damaged, `out` cannot be written, a package is missing, or as in `export`.
        RunError: the disk is full, or the program disagrees with the model.
    """
    directory = checkpoint.locate(model, which)
    return export(load_model(directory), out, kind, str(directory), statistics, max_batch_size)


def export(
    model: WideDeep,
    out: str | Path,
    kind: str,
    source: str = "",
    statistics: Statistics | None = None,
    max_batch_size: int | None = None,
) -> dict[str, Any]:
    """Writes a model as a program of a `kind` of `FORMATS`; returns what `export.json` says.

    Args:
        out: directory to write; an earlier export there is replaced when the new one is complete.
        source: where the weights come from, for the reader.
        statistics: to be copied beside the program.
        max_batch_size: of triton, the most rows of a request and of a batch put together of several; 4096 if None.
    Raises:
        InputError: `out` cannot be written or, for triton, is no name of a model; a package is missing; the statistics
            are not those of the model's rows; or `max_batch_size` is out of range or given for another kind.
        RunError: the disk is full, or the program disagrees with the model.
    """
    if kind not in FORMATS:
        raise InputError(f"format: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {kind}")
    out = Path(out)
    config = _triton_config(model.spec, out, kind, max_batch_size)
    if statistics and model.spec.metadata.get("statistics", statistics.digest) != statistics.digest:
        raise InputError(f"{statistics.directory}: expected the statistics that the model's rows were encoded with")
    write = {"onnx": _write_onnx, "pt2": _write_pt2, "triton": _write_triton}[kind]
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    training = model.training
    try:
        reads = [statistics.directory] if statistics else []
        with atomic.directory(out, OUTPUT, reads) as partial, torch.no_grad():
            if config:  # first: until it has the name that this says, a server that looks refuses the directory
                (partial / export_triton.CONFIG).write_text(config, encoding="utf-8")
            with _quiet():
                program = write(Served(model.eval()).eval(), partial)
            description = _description(model.spec, kind, source) | {"largest_difference": _difference(program, model)}
            (partial / checkpoint.SPEC).write_text(model.spec.without_sources().to_yaml(), encoding="utf-8")
            if statistics:
                _copy(statistics.directory, partial / STATISTICS)
            (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    finally:
        model.train(training)
    return description


def _triton_config(spec: FeatureSpec, out: Path, kind: str, max_batch_size: int | None) -> str | None:
    """The text of Triton's configuration, None for other kinds.

    Raises:
        InputError: what only Triton needs does not fit, or is given for another kind.
    """
    if kind == "triton":
        return export_triton.config(export_triton.model_name(out), spec, export_triton.batch_size(max_batch_size))
    if max_batch_size is not None:
        raise InputError(f"max_batch_size: expected with the format triton alone, got it with {kind}")
    return None


def _copy(source: Path, target: Path) -> None:
    """The files of a directory with the modes of new ones: those of a data set may be its owner's alone, or fixed."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


def _description(spec: FeatureSpec, kind: str, source: str) -> dict[str, Any]:
    ids = [f"{f.name}[{i}]" if f.multi_hot else f.name for f in spec.categorical for i in range(f.hotness)]
    return {
        "format": kind,
        "checkpoint": source,
        "inputs": {"ids": ids, "numeric": list(spec.numeric_names)},
        "outputs": ["logit", "prob"],
        "versions": {"widedeep": __version__, "torch": torch.__version__},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporters from talking about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def random_batch(spec: FeatureSpec, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [B, K] int32, of multi-hot features some padding; numeric [B, N] float32."""
    columns = [torch.empty(B, 0, dtype=torch.int32)]
    for f in spec.categorical:
        ids = torch.randint(f.cardinality, (B, f.hotness), generator=generator, dtype=torch.int32)
        columns.append(ids.masked_fill(torch.rand(B, f.hotness, generator=generator) < 0.3, -1) if f.multi_hot else ids)
    return torch.cat(columns, 1), torch.randn(B, len(spec.numeric), generator=generator)


def _example(spec: FeatureSpec) -> tuple[tuple[Tensor, Tensor], dict[str, dict[int, Any]]]:
    """Inputs to trace with, and which of their sizes stay free, by name in the same order."""
    rows = torch.export.Dim("B")
    return random_batch(spec, 3, torch.Generator().manual_seed(0)), {"ids": {0: rows}, "numeric": {0: rows}}


def _write_pt2(served: Served, directory: Path) -> Program:
    path = directory / PROGRAMS["pt2"]
    path.write_bytes(_packed(served))
    module = torch.export.load(path).module()
    return lambda ids, numeric: module(ids, numeric)[0]


def _packed(served: Served) -> bytes:
    """The file of a program: torch's own writer ends the process where the disk is full. And the program is gone before
    a failed write keeps this frame alive: torch 2.11 crashes where one is left to the end of the interpreter.
    """
    inputs, shapes = _example(served.spec)
    program = torch.export.export(served, inputs, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
    packed = io.BytesIO()
    torch.export.save(program, packed)
    return packed.getvalue()


def _write_onnx(served: Served, directory: Path) -> Program:
    return _onnx(served, ("ids", "numeric"), directory / PROGRAMS["onnx"], _needs_files(served))


def _write_triton(served: Served, directory: Path) -> Program:
    large = _needs_files(served)
    names = tuple(export_triton.input_columns(served.spec))
    return _onnx(served, names, export_triton.onnx_path(directory, large), large)


def _needs_files(served: Served) -> bool:
    """Whether the weights are too many for the ONNX file itself."""
    return sum(t.numel() * t.element_size() for t in (*served.parameters(), *served.buffers())) > LARGEST_ONNX


def _onnx(served: Served, names: Sequence[str], path: Path, external_data: bool) -> Program:
    """Writes an ONNX model with the inputs `names`: both, or the one that has columns."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it, and would say so less plainly)
    except ImportError as error:
        raise InputError(f"an ONNX model needs the package {error.name}: pip install 'widedeep[onnx]'") from error
    batch, shapes = _example(served.spec)
    inputs = {name: tensor for name, tensor in zip(shapes, batch) if name in names}
    program = torch.onnx.export(
        served if len(names) == len(batch) else export_triton.OneInput(served, names[0]).eval(),
        tuple(inputs.values()),
        input_names=list(names),
        output_names=["logit", "prob"],
        dynamic_shapes=tuple(shapes[name] for name in inputs),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # as it is only without dynamo
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    program.save(path, external_data=external_data)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, numeric: Tensor) -> Tensor:
        given = {"ids": ids.numpy(), "numeric": numeric.numpy()}
        return torch.from_numpy(session.run(["logit"], {name: given[name] for name in names})[0])

    return run


def _difference(program: Program, model: WideDeep) -> float:
    """The largest difference of a logit from the model's own kernels, over some random batches.

    Raises:
        RunError: it is larger than the order of sums explains.
    """
    generator, largest = torch.Generator().manual_seed(1), 0.0
    for B in CHECKED:
        batch = random_batch(model.spec, B, generator)
        want = model(*batch)
        error = float((program(*batch) - want).abs().max())
        if not error <= TOLERANCE * max(1.0, float(want.abs().max())):
            raise RunError(f"the exported program's logits differ from the model's by {error:.3g} on {B} random rows")
        largest = max(largest, error)
    return largest
