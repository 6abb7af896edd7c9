"""What every contender of an end-to-end bench gets: the same model with the same initial weights, on the same data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widedeep.data import Batch
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardWriter

EXPONENT = 1.05  # of the power law that ids follow, rank^-1.05: the busiest ad takes 10 % of the rows


@dataclass(frozen=True)
class Job:
    """A model to train, and how.

    arrays: the initial weights by their checkpoint names (`WideDeep.named_arrays`), float32 on the CPU; to be copied.
    """

    spec: FeatureSpec
    hidden: tuple[int, ...]
    arrays: Mapping[str, Tensor]
    device: torch.device
    precision: str = "fp32"
    dropout: float = 0.1
    lr: float = 1.2e-4
    rho: float = 0.5
    eps: float = 1e-7
    wide_lr: float = 0.02
    initial_accumulator: float = 0.1


class Contender(ABC):
    """One implementation of the job. It owns its copy of the weights."""

    name: str
    version: str

    @property
    def gemm(self) -> str | None:
        """The route of the hidden layers' products; None where there is one alone."""
        return None

    def places(self, rows: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the reader shall write ids, numeric and label of a batch; None: anywhere."""
        return None

    @abstractmethod
    def train(self, batch: Batch, step: int) -> None:
        """One step: forward, backward, every update. May return before the device is done."""

    @abstractmethod
    def predict(self, batch: Batch) -> Any:
        """Logits [B] without dropout, in the contender's own array type, on its device."""

    def logits(self, batch: Batch) -> np.ndarray:
        """`predict` as float32 on the host."""
        return torch.as_tensor(self.predict(batch)).float().cpu().numpy()

    def synchronize(self) -> None:
        """Wait for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def write_shards(directory: Path, spec: FeatureSpec, rows: int, seed: int = 0) -> None:
    """A shard set of random rows: ids by a power law, the busiest ones anywhere in their table; a fifth clicked."""
    g = np.random.default_rng(seed)
    columns = {}
    for f in spec.categorical:
        weights = np.arange(1, f.cardinality + 1) ** -EXPONENT
        edges = np.cumsum(weights) / weights.sum()
        shape = (rows,) if f.hotness == 1 else (rows, f.hotness)
        rank = np.searchsorted(edges, g.random(shape)).clip(max=f.cardinality - 1)
        columns[f.name] = g.permutation(f.cardinality)[rank]
    for number in spec.numeric:
        columns[number.name] = g.random(rows, dtype=np.float32)
    columns[spec.label] = (g.random(rows) < 0.2).astype(np.uint8)
    with ShardWriter(directory, spec) as writer:
        writer.append(columns)
