"""Inputs and tolerances shared by the tests and the benches: random, but the same for the same shape everywhere."""

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Largest error (relative, absolute) against the float64 reference fed with the same rounded inputs. float32 covers sums
# of a few thousand terms; the half types one rounding of the result, and a little for a float that sat near the middle.
TOLERANCE = {
    torch.float32: (1e-5, 1e-6),
    torch.float16: (1.1e-3, 1e-6),
    torch.bfloat16: (8.5e-3, 1e-6),
}


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    """Compare with a float64 reference at the tolerance of `dtype` (default: got's) times `scale`.

    A tenth of the relative part counts for every element by the size of the largest one: sums cancel.
    """
    rtol, atol = TOLERANCE[dtype or got.dtype]
    size = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(
        got.double(), want.double(), rtol=rtol * scale, atol=scale * (atol + rtol / 10 * size), equal_nan=True
    )


def generator(*key) -> torch.Generator:
    """A CPU generator seeded by whatever names the case."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def normal(*shape: int, device="cpu", dtype=torch.float32, scale: float = 1.0, key=()) -> Tensor:
    return (torch.randn(*shape, generator=generator(shape, key)) * scale).to(device=device, dtype=dtype)


def poisoned(*shape: int, device="cpu", dtype=torch.float32) -> Tensor:
    """An output that was never written shows: NaN, or the type's least integer."""
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, value, dtype=dtype, device=device)


@dataclass
class EmbeddingCase:
    """A batch and the tables it reads; field names are the ops' arguments."""

    ids: Tensor
    numeric: Tensor
    tables: list[Tensor]
    wide: Tensor
    wide_numeric: Tensor
    wide_bias: Tensor
    hotness: list[int]
    mean: list[int]
    columns: list[int]
    numeric_columns: list[int]
    width: int

    @property
    def rows(self) -> list[int]:
        return [len(t) for t in self.tables]

    @property
    def dims(self) -> list[int]:
        return [t.shape[1] for t in self.tables]

    def forward_args(self, dtype: torch.dtype) -> tuple:
        return (*self.weights(), self.hotness, self.mean, self.columns, self.numeric_columns, self.width, dtype)

    def weights(self) -> tuple:
        return self.ids, self.numeric, self.tables, self.wide, self.wide_numeric, self.wide_bias

    def double(self) -> "EmbeddingCase":
        """The same values in float64, for the reference."""
        return replace(
            self,
            numeric=self.numeric.double(),
            tables=[t.double() for t in self.tables],
            wide=self.wide.double(),
            wide_numeric=self.wide_numeric.double(),
            wide_bias=self.wide_bias.double(),
        )


# (rows, dim, hotness, mean): widths that are and are not multiples of 8, one-hot and multi-hot, a table of one row.
SMALL_TABLES = [(50, 16, 1, 0), (7, 3, 1, 0), (1, 4, 1, 0), (300, 33, 3, 0), (20, 8, 4, 1)]
# The tables of the Outbrain model.
OUTBRAIN_TABLES = [
    (300000, 128, 1, 0),
    (4, 16, 1, 0),
    (100000, 128, 1, 0),
    (4000, 64, 1, 0),
    (1000, 64, 1, 0),
    (2500, 64, 1, 0),
    (300, 64, 1, 0),
    (2000, 64, 1, 0),
    (250000, 128, 1, 0),
    (2500, 64, 1, 0),
    (4000, 64, 1, 0),
    (1000, 64, 1, 0),
    (5000, 64, 1, 0),
]


def random_ids(B: int, tables: list[tuple], kind: str, key) -> Tensor:
    """Ids [B, K] int32 for tables as in SMALL_TABLES.

    kind: "zipf" (a few busy rows, padding in multi-hot features), "hot" (one row takes the batch) or "padding" (all).
    """
    g = generator("ids", B, tables, kind, key)
    parts = [torch.empty(B, 0)]
    for rows, _, hotness, _ in tables:
        if kind == "padding":
            parts.append(torch.full((B, hotness), -1))
            continue
        if kind == "hot":
            parts.append(torch.full((B, hotness), rows - 1))
            continue
        u = torch.rand(B, hotness, generator=g, dtype=torch.float64)
        ids = ((rows + 1) ** u).long().sub(1).clamp(0, rows - 1)  # log-uniform: a few rows take much of the batch
        if hotness > 1:
            ids = torch.where(torch.rand(B, hotness, generator=g) < 0.4, -1, ids)
        parts.append(ids)
    return torch.cat(parts, 1).int()


def embedding_case(
    B: int, tables=tuple(SMALL_TABLES), numeric: int = 5, kind: str = "zipf", device="cpu", key=(), aligned=False
) -> EmbeddingCase:
    """A batch over the given tables; numerics stand between their columns, or after them all (`aligned`, the order of
    the GPU step where dims are multiples of 8), and padding at the end of the width.
    """
    tables = list(tables)
    columns, numeric_columns, at = [], [], 0
    for f, (_, dim, _, _) in enumerate(tables):
        if f < numeric and not aligned:
            numeric_columns.append(at)
            at += 1
        columns.append(at)
        at += dim
    numeric_columns += list(range(at, at + numeric - len(numeric_columns)))
    at += numeric - (0 if aligned else min(numeric, len(tables)))
    total = sum(t[0] for t in tables)
    return EmbeddingCase(
        ids=random_ids(B, tables, kind, key).to(device),
        numeric=normal(B, numeric, device=device, key=key),
        tables=[normal(rows, dim, device=device, key=(key, f)) for f, (rows, dim, _, _) in enumerate(tables)],
        wide=normal(total, device=device, scale=0.1, key=key),
        wide_numeric=normal(numeric, device=device, key=(key, "n")),
        wide_bias=normal(1, device=device, key=(key, "b")),
        hotness=[t[2] for t in tables],
        mean=[t[3] for t in tables],
        columns=columns,
        numeric_columns=numeric_columns,
        width=-(-at // 64) * 64,
    )


def gather_case(rows: int, B: int, device: str) -> tuple[tuple, tuple]:
    """A data set of 13 id columns and 13 numbers as `ops.gather_batch_out` takes it, and room for a batch of B rows."""
    shapes = {"ids": (13,), "numeric": (13,), "label": ()}
    types = {"ids": torch.int32, "numeric": torch.float32, "label": torch.float32}
    made = [
        [torch.zeros(n, *shape, dtype=types[name], device=device) for name, shape in shapes.items()] for n in (rows, B)
    ]
    return (*made[0], None), (*made[1], None)
