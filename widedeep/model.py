"""The Wide & Deep model: parameters, initial values, and a forward pass through the ops that autograd can follow.

Source: Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems"; sizes and initialisers are the original's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from widedeep import ops
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.share import ALL_ROWS, Share

# Standard deviation of a unit normal truncated at +-2; a normal is made that much wider before truncation.
TRUNCATED_STD = 0.87962566103423978
PARTS = ("both", "wide", "deep")
WIDE_INITS = ("uniform", "zeros")
MOST_DROPOUT = 0.99998  # masks know probabilities in 32768ths
INT32_MAX = 2**31 - 1
PIECE = 1 << 22  # initial values of a table at a time, where a process keeps a share of it

if TYPE_CHECKING:

    class _Linears(nn.ModuleList):  # torch's does not say of what type its modules are
        def __iter__(self) -> Iterator[nn.Linear]: ...
else:
    _Linears = nn.ModuleList


class WideDeep(nn.Module):
    """Logit = wide(ids, numeric) + deep(ids, numeric), float32.

    Wide: the sum of one learned scalar per id, a weighted sum of the numeric features, and a bias. Deep: embeddings and
    numeric features side by side (`spec.deep_columns`) through relu layers, each followed by dropout, and one linear
    unit. Weights are float32, whatever torch's default; the model is made on torch's default device. Under
    `torch.autocast` of that device the hidden layers take and give its type; logits and all sums stay float32.

    Args:
        spec: features; fixes tables, their sizes and their places. Those of dim 0 are in the wide part only.
        hidden: widths of the hidden layers.
        dropout: probability of zeroing a hidden unit in training, in [0, 1).
        wide_init: "uniform": tables in [-0.05, 0.05), the numeric kernel glorot; "zeros": all zero.
        seed: of the initial weights and of dropout; None draws one from torch's default generator (`model.seed` tells
            it), so that `torch.manual_seed` fixes it.
        parts: "both", or only "wide" or "deep": the other part has no parameters and adds 0.
        sparse: gradients of `tables` and `wide` are sparse COO: what a step costs does not grow with the tables. False:
            dense, for what takes no sparse ones (DistributedDataParallel, torch.optim.Adam, clip_grad_norm_).
        share: which rows of the tables are here, with the values that the whole model has there. With less than all
            only a step of as many processes (`make_step`) applies the model; "rows" and R below count those here.

    Attributes:
        table_rows: F ints, the rows of each table.
        tables: ParameterList, F x [rows, D]; without columns (D = 0) one asks for no gradient, as nothing is in it.
        wide: [R], all wide tables in a row.  wide_numeric: [N].  wide_bias: [1].
        layers: ModuleList of nn.Linear.  out: nn.Linear(H, 1).  Absent parts are empty or None.
        dropout_step: buffer [1] int64, the step of the next training call; `state_dict` has it, but not `seed`.
        layout: where embeddings and numerics go: the spec; in a wide part alone a copy, whose tables have no columns.

    Raises:
        InputError: an argument is out of range, no feature is there for the deep part, or the tables have more rows
            than 2^31 - 2.
    """

    tables: nn.ParameterList
    layers: _Linears
    out: nn.Linear  # None without a deep part, as the next three without a wide part: nobody reads them there
    wide: nn.Parameter
    wide_numeric: nn.Parameter
    wide_bias: nn.Parameter
    dropout_step: Tensor

    def __init__(
        self,
        spec: FeatureSpec,
        hidden: Sequence[int] = (1024,) * 5,
        dropout: float = 0.1,
        wide_init: str = "uniform",
        seed: int | None = None,
        parts: str = "both",
        sparse: bool = True,
        share: Share = ALL_ROWS,
    ):
        super().__init__()
        _check_arguments(hidden, dropout, wide_init, parts)
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
            raise InputError(f"seed: expected an integer from 0 to 2^63 - 1, got {seed}")
        self.spec = spec
        self.hidden = tuple(map(int, hidden))
        self.dropout = float(dropout)
        self.has_wide = parts != "deep"
        self.has_deep = parts != "wide"
        _check_spec(spec, self.has_deep)
        self.sparse = sparse
        self.layout = at = spec if self.has_deep else _without_columns(spec)
        # Read here, for torch.compile does not trace the lock of a cached property.
        self._places = (at.hotness, at.mean, at.table_columns, at.numeric_columns)
        self._widths = (at.deep_width, at.padded_width)
        self._dims = [f.dim for f in spec.categorical]
        self.share = share if spec.categorical else ALL_ROWS
        self.table_rows = tuple(share.count(rows) for rows in spec.cardinalities)
        generator = torch.Generator()
        self.seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else int(seed)
        generator.manual_seed(self.seed)
        device = torch.get_default_device()
        with torch.device("meta" if device.type == "meta" else "cpu"):  # a seed gives the same weights on every device
            self._make_deep(generator)
            self._make_wide(generator, wide_init)
            self.register_buffer("dropout_step", torch.zeros(1, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_keep_step)
        self.to(device)
        self._made = {name: tuple(p.shape) for name, p in self.named_parameters()}

    def _make_deep(self, generator: torch.Generator) -> None:
        self.tables = nn.ParameterList()
        self.layers = _Linears()
        self.out = None  # type: ignore[assignment]  # absent
        if not self.has_deep:
            return
        for feature in self.spec.categorical:
            std = math.sqrt(2 / (feature.cardinality + feature.dim)) / TRUNCATED_STD
            table = torch.empty(self.share.count(feature.cardinality), feature.dim, dtype=torch.float32)
            _draw_rows(table, self.share, feature.cardinality, partial(_truncated_normal, std, generator))
            self.tables.append(nn.Parameter(table, requires_grad=feature.dim > 0))
        width = self.spec.deep_width
        for units in self.hidden:
            self.layers.append(_linear(width, units, generator))
            width = units
        self.out = _linear(width, 1, generator)

    def _make_wide(self, generator: torch.Generator, wide_init: str) -> None:
        if not self.has_wide:
            self.wide = self.wide_numeric = self.wide_bias = None  # type: ignore[assignment]  # absent
            return
        N = len(self.spec.numeric)
        wide, numeric, bias = (torch.zeros(n, dtype=torch.float32) for n in (sum(self.table_rows), N, 1))
        if wide_init == "uniform":
            for table, rows in zip(wide.split(self.table_rows), self.spec.cardinalities):
                _draw_rows(table, self.share, rows, partial(_uniform, 0.05, generator))
            _uniform(math.sqrt(6 / (N + 1)), generator, numeric)
        self.wide, self.wide_numeric = nn.Parameter(wide), nn.Parameter(numeric)
        self.wide_bias = nn.Parameter(bias)

    def forward(self, ids: Tensor, numeric: Tensor, first_row: int = 0, step: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            ids: [B, K] integers; -1 pads a multi-hot list. int32, contiguous, is taken as it is, else copied.
            numeric: [B, N] floats; float32, contiguous, is taken as it is, else copied.
            first_row: position of row 0 within the global batch, where ranks share one: each row has masks of its own.
            step: one int64 on the model's device that fixes the masks; None: `dropout_step`, which is then counted up.
        Returns:
            [B] float32, differentiable in numeric and in every parameter, once and backward.
        Notes:
            In training mode the dropout masks are fixed by (`seed`, step, row), so each call without a step draws new
            ones. A call that autograd repeats (torch.utils.checkpoint) must be given its step, or the repetition is a
            RuntimeError: it would draw other masks, and its gradients be those of another function.
        """
        wide, deep = self.parts(ids, numeric, first_row, step)
        return wide + deep

    def parts(
        self, ids: Tensor, numeric: Tensor, first_row: int = 0, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two summands of the logit: wide [B], deep [B], float32; zeros for an absent part."""
        if self.share.world > 1:
            raise RuntimeError(f"this model holds one of {self.share.world} shares of its tables: a step applies it")
        if forward_ad._current_level >= 0:  # torch would take the tangents of our ops to be 0, without a word
            raise NotImplementedError("WideDeep has no forward-mode derivative (torch.func.jvp)")
        if not torch.compiler.is_compiling() and _is_transformed():
            raise NotImplementedError("WideDeep takes no part in torch.func.grad, vjp or vmap: call backward of a loss")
        if ids.dtype != torch.int32:
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise TypeError(f"ids: expected integers, got {ids.dtype}")
            is_unsigned, ids = ids.dtype == torch.uint64, ids.long()
            ids = ids.where(ids >= 0, INT32_MAX) if is_unsigned else ids  # of 64 bits: no padding, nor another id
            ids = ids.clamp(-2, INT32_MAX).int()  # one that is out of range stays so
        ids, numeric = ids.contiguous(), numeric.float().contiguous()
        dtype, width = self._activations(ids.device.type)
        weights = self.lookup_weights()
        self.check_modules(weights[0])
        x, wide_logit = ops.embedding_forward(ids, numeric, *weights, *self._places, width, dtype, self.sparse)
        zeros = torch.zeros_like(wide_logit)
        if not self.has_deep:
            return wide_logit, zeros
        p = self.dropout if self.training else 0.0
        if step is None:
            if p and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise RuntimeError("dropout: expected a step in a call that autograd repeats (torch.utils.checkpoint)")
            step = self.dropout_step
            if self.training:
                step = step.clone()
                self.dropout_step.add_(1)  # in place, so that an exported program counts too
        for i, layer in enumerate(self.layers):
            weight = layer.weight.to(dtype).contiguous()
            if not i and weight.shape[1] == self._widths[0] < width:
                weight = nn.functional.pad(weight, (0, width - weight.shape[1]))
            x = ops.linear_relu_dropout(x, weight, layer.bias, p, self.seed, step, i, first_row)
        return wide_logit, ops.head_forward(x, self.out.weight, self.out.bias, zeros)

    def check_modules(self, tables: Sequence[Tensor] | None = None) -> None:
        """Raises TypeError where a layer is not as it is read, ValueError where a table (of `tables`, by default the
        model's) has another dim.
        """
        if not self.has_deep:
            return
        for name, layer in (*self.layers._modules.items(), ("out", self.out)):
            kind, weights = type(layer), layer._parameters  # not by `layer.bias`, which takes longer in every call
            is_linear = kind is nn.Linear or (isinstance(layer, nn.Linear) and kind.forward is nn.Linear.forward)
            others = len(weights) > ("weight" in weights) + ("bias" in weights)
            if not is_linear or others or weights.get("bias", layer) is None:
                place = name if layer is self.out else f"layers[{name}]"
                has = ", ".join(key for key, p in weights.items() if p is not None) or "no parameters"
                raise TypeError(
                    f"{place}: expected nn.Linear with weight and bias alone, for layers are read, not called, "
                    f"got {kind.__module__}.{kind.__qualname__} with {has}"
                )
        for i, (table, dim) in enumerate(zip(self.tables if tables is None else tables, self._dims)):
            if table.shape[1] != dim:  # its columns would lie over another's
                raise ValueError(f"tables[{i}]: expected {dim} columns, got {table.shape[1]}")

    def difference(self) -> str | None:
        """What parameters it has other than those it was made with, in words; None: no others."""
        now = {name: tuple(p.shape) for name, p in self.named_parameters()}  # one that has two names stands once
        for name in self._made | now:
            if name not in now:
                return f"no {name}"
            if name not in self._made:
                return f"{name} as well"
            if now[name] != self._made[name]:
                return f"{name} of shape {list(now[name])}"
        return None

    def _activations(self, device: str) -> tuple[torch.dtype, int]:
        """Type and width of the deep input. A half type has columns of zeros, for Tensor Cores want rows of whole
        packs.
        """
        width, padded = self._widths
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):  # it raises for "meta"
            return torch.float32, width
        dtype = torch.get_autocast_dtype(device)
        return dtype, padded if self.layers and dtype != torch.float32 else width

    def wide_parameters(self) -> list[nn.Parameter]:
        """Of the wide part, which the original trains with FTRL."""
        return [self.wide, self.wide_numeric, self.wide_bias] if self.has_wide else []

    def deep_parameters(self) -> list[nn.Parameter]:
        """Of the deep part, which the original trains with RMSprop."""
        wide = {id(p) for p in self.wide_parameters()}
        return [p for p in self.parameters() if id(p) not in wide]

    def lookup_weights(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Tables F x [rows, D], wide [R], wide numerics [N] and bias [1]; of an absent part ones that add nothing."""
        zeros = partial(torch.zeros, dtype=torch.float32, device=next(self.parameters()).device)
        tables = list(self.tables)
        if not self.has_deep:
            tables = [zeros(rows, 0) for rows in self.table_rows]
        if self.has_wide:
            return tables, self.wide, self.wide_numeric, self.wide_bias
        return tables, zeros(sum(self.table_rows)), zeros(len(self.spec.numeric)), zeros(1)

    def wide_rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the flat wide table that ids [B, K] stand for, int64, and which of them are ids, not padding."""
        base = [b for b, hot in zip(self.spec.row_base, self.spec.hotness) for _ in range(hot)]
        valid = ids >= 0
        return ids.clamp(min=0).long() + torch.tensor(base, dtype=torch.int64, device=ids.device), valid

    def named_arrays(self) -> dict[str, Tensor]:
        """Every weight by its name in a checkpoint; the tensors share memory with the parameters."""
        arrays: dict[str, Tensor] = {}
        if self.has_deep:
            arrays |= {f"deep.table.{f.name}": t.detach() for f, t in zip(self.spec.categorical, self.tables)}
            for i, layer in enumerate(self.layers):
                arrays |= {f"deep.layer.{i}.weight": layer.weight.detach(), f"deep.layer.{i}.bias": layer.bias.detach()}
            arrays |= {"deep.out.weight": self.out.weight.detach(), "deep.out.bias": self.out.bias.detach()}
        if self.has_wide:
            arrays |= self.wide_tables(self.wide.detach())
            arrays |= {"wide.numeric.weight": self.wide_numeric.detach(), "wide.bias": self.wide_bias.detach()}
        return arrays

    def wide_tables(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat [R] tensor, one per feature, called `wide.table.<feature>`."""
        views = flat.split(list(self.table_rows)) if self.spec.categorical else ()
        return {f"wide.table.{f.name}": view for f, view in zip(self.spec.categorical, views)}


def _is_transformed() -> bool:
    """Whether torch.func differentiates or maps the call; its `functionalize` changes nothing."""
    level = torch._C._functorch.peek_interpreter_stack()
    return level is not None and level.key() != torch._C._functorch.TransformType.Functionalize


def _without_columns(spec: FeatureSpec) -> FeatureSpec:
    return replace(spec, categorical=[replace(f, dim=0) for f in spec.categorical])


def _keep_step(model: WideDeep, state: dict, prefix: str, *_) -> None:
    """A state from before `dropout_step` was part of it leaves the model's as it is."""
    state.setdefault(f"{prefix}dropout_step", model.dropout_step)


def _draw_rows(table: Tensor, share: Share, rows: int, draw: Callable[[Tensor], None]) -> None:
    """Fills `table`, the share of a table of `rows`, with what `draw` puts there in the whole: drawn piece by piece,
    for a process need not have memory for all.
    """
    if share.world == 1:
        draw(table)
        return
    piece = share.world * max(1, PIECE // (share.world * max(1, table.shape[1:].numel())))
    for start in range(0, rows, piece):
        draw(values := torch.empty(min(piece, rows - start), *table.shape[1:], dtype=table.dtype))
        mine = values[share.rank :: share.world]
        table[start // share.world :][: len(mine)] = mine


def _truncated_normal(std: float, generator: torch.Generator, draws: Tensor) -> None:
    """Draws of a normal, cut at two of its standard deviations: the inverse of its distribution function.

    `nn.init.trunc_normal_` takes ten times as long.
    """
    within = math.erf(math.sqrt(2))  # probability of lying inside
    _uniform(within, generator, draws)
    draws.erfinv_().mul_(math.sqrt(2) * std).clamp_(-2 * std, 2 * std)


def _uniform(limit: float, generator: torch.Generator, draws: Tensor) -> None:
    draws.uniform_(-limit, limit, generator=generator)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A layer with the original's glorot_uniform kernel and zero bias."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)
    limit = math.sqrt(6 / (inputs + outputs))
    with torch.no_grad():
        layer.weight.uniform_(-limit, limit, generator=generator)
        layer.bias.zero_()
    return layer


def _check_spec(spec: FeatureSpec, has_deep: bool) -> None:
    if has_deep and not spec.deep_width:
        raise InputError(
            "feature spec: expected a numeric feature or one with an embedding_dim >= 1 for the deep part, got none"
        )
    if spec.total_rows >= INT32_MAX:  # the ops count the rows of all tables in int32
        raise InputError(
            f"feature spec: expected cardinalities that add up to at most {INT32_MAX - 1}, got {spec.total_rows}"
        )


def _check_arguments(hidden: Sequence[int], dropout: float, wide_init: str, parts: str) -> None:
    if not all(isinstance(units, Integral) and units >= 1 for units in hidden):
        raise InputError(f"hidden: expected layer widths >= 1, got {list(hidden)}")
    if not 0 <= dropout <= MOST_DROPOUT:
        raise InputError(f"dropout: expected a probability from 0 to {MOST_DROPOUT}, got {dropout}")
    if wide_init not in WIDE_INITS:
        raise InputError(f"wide_init: expected one of {', '.join(WIDE_INITS)}, got {wide_init!r}")
    if parts not in PARTS:
        raise InputError(f"parts: expected one of {', '.join(PARTS)}, got {parts!r}")
