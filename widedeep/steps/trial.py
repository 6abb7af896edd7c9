"""Which route the hidden layers take: those that agree with the library's products are tried, and the fastest kept."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from widedeep import ops
from widedeep.errors import RunError
from widedeep.ops import linear_sm90
from widedeep.steps.base import PRECISIONS
from widedeep.steps.buffers import Activations
from widedeep.steps.layers import Dropout, Layers, Sm90Chain, Sm90Layers
from widedeep.steps.padded import PaddedWeights
from widedeep.steps.timing import in_turn

log = logging.getLogger(__name__)

# Largest difference between the two routes, relative to the largest value: two roundings of the half type; and the
# share of elements on whose mask they may differ, values that round to 0 in one of them.
AGREEMENT = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 4e-3}  # float32: with TF32 operands
MASK_AGREEMENT = 2e-3
REPEATS = 8  # runs whose bits must be those of the first
CHAIN_REPEATS = 4  # runs of a chain whose bits must be those of its layers
ROUTES = ("cublaslt", "sm90")  # of other bits each; checkpoints name them by number
TURN, ROUNDS = 0.025, 5  # seconds of a route's turn, and turns of which the median counts: a second in all at most
AS_GOOD = 1.02  # noise of the clock: within it the order of the candidates decides, so that runs repeat


_kept: dict[tuple, str] = {}  # what was the fastest, for the life of the process: equal steps take equal routes


def choose_layers(
    gemm: str,
    weights: PaddedWeights,
    precision: str,
    p: float,
    buffers: Activations,
    resumed: str | None = None,
    alone: bool = True,
) -> Layers:
    """The route that `gemm` names; of "auto" the fastest of those that run and agree with the library's products.

    Args:
        precision: of the step; "fp32" has the library's products alone.
        buffers: for the batches to come: the routes are compared on random data of their size, and what is timed is
            written there.
        resumed: of `ROUTES` the one whose bits the run has had so far: "auto" keeps to it where it runs and agrees, and
            warns where it does not.
        alone: whether no other kernel waits on this GPU for something from outside. A chain's clusters wait for each
            other, so it must not miss a multiprocessor for as long as another rank takes.
    Raises:
        RunError: the Hopper products do not come to an end; this process can then no longer use the GPU.
    """
    found = _choose(gemm, weights, precision, p, buffers, resumed, alone)
    if gemm == "auto" and resumed not in (None, found.bits):
        log.warning("hidden layers: using %s from here on; %s was used until now", found.name, resumed)
    return found


def _choose(
    gemm: str, weights: PaddedWeights, precision: str, p: float, buffers: Activations, resumed: str | None, alone: bool
) -> Layers:
    device, dtype = weights.flat.device, PRECISIONS[precision]
    fits = precision != "fp32" and len(weights.widths) > 1 and linear_sm90.available(device)
    if gemm == "cublaslt" or not fits:
        return Layers(weights)
    no_chain = _no_chain(weights, alone)
    if gemm == "sm90-chain" and no_chain:
        log.warning("hidden layers: using sm90, not sm90-chain: %s", no_chain)
    if gemm != "auto":
        return Sm90Chain(weights) if gemm == "sm90-chain" and not no_chain else Sm90Layers(weights)
    with _rounding(device, precision == "tf32"):
        found = _trial(weights, dtype, p, buffers, resumed, chains=not no_chain)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the comparison took is not wanted again
    return found


def _no_chain(weights: PaddedWeights, alone: bool) -> str | None:
    """Why there can be no chain."""
    layers = len(weights.widths) - 1
    if not 2 <= layers <= linear_sm90.LINKS:
        return f"a launch takes 2 to {linear_sm90.LINKS} layers, the model has {layers}"
    return None if alone else "there are several ranks, and none may wait for another inside a launch"


def _trial(
    weights: PaddedWeights, dtype: torch.dtype, p: float, buffers: Activations, resumed: str | None, chains: bool
) -> Layers:
    rows, hopper = max(buffers.capacity, 1), []
    if problem := _problem(weights, rows, dtype, p):
        log.warning("hidden layers: not using the Hopper products: %s", problem)
    else:
        hopper = [Sm90Layers(weights)]
    library = Layers(weights)

    def compared(routes: list[Layers]) -> Layers:
        routes = [route for route in routes if route.bits == resumed] or routes
        key = (str(weights.flat.device), *weights.widths, dtype, p > 0, rows, *(route.name for route in routes))
        found = next((route for route in routes if route.name == _kept.get(key)), None)
        if found is None:
            found = fastest(routes, p, buffers, rows)
            _kept[key] = found.name
        return found

    # A chain keeps all gradients at once: at a batch of 131072 that takes 1.6 GB more in float32, 0.8 GB in half types.
    if hopper and chains and dtype != torch.float32:
        try:
            return compared([*hopper, *_chain(hopper[0], p, buffers, rows), library])
        except torch.OutOfMemoryError:
            log.warning("hidden layers: not enough memory to try one launch for all layers")
        buffers.keep_apart(False)
    return compared([*hopper, library])


def _chain(single: Sm90Layers, p: float, buffers: Activations, rows: int) -> list[Layers]:
    """The chain, if it makes the bits of a launch for each layer."""
    chain = Sm90Chain(single.weights)
    wrong = f"its results are not bit-identical to those of {single.name}"
    if problem := _tested(wrong, bits_difference, chain, single, p, buffers, rows):
        log.warning("hidden layers: not using %s: %s", chain.name, problem)
        return []
    return [chain]


@contextlib.contextmanager
def _rounding(device: torch.device, tf32: bool) -> Iterator[None]:
    """The library's float32 products are rounded to TF32 meanwhile, if so asked, as in the step."""
    if not tf32 or device.type != "cuda":
        yield
        return
    ops.allow_tf32_(torch.empty(0, device=device), True)
    try:
        yield
    finally:
        ops.allow_tf32_(torch.empty(0, device=device), False)


def fastest(routes: list[Layers], p: float, buffers: Activations, rows: int) -> Layers:
    """The route that takes least for the layers forward and back. Routes within AS_GOOD of it count as equal: the first
    of these in the list decides the bits, so that runs repeat, and of the routes with these bits the fastest is taken.
    """
    if len(routes) == 1:
        return routes[0]
    times = _seconds_of(routes, p, buffers, rows)
    log.info("hidden layers: %s", ", ".join(f"{r.name} {t * 1e3:.3f} ms" for r, t in zip(routes, times)))
    bits = next(route.bits for route, t in zip(routes, times) if t <= AS_GOOD * min(times))
    return min(zip(times, routes), key=lambda timed: (timed[1].bits != bits, timed[0]))[1]


def _seconds_of(routes: list[Layers], p: float, buffers: Activations, rows: int) -> list[float]:
    """Of each route: all layers forward, and the gradients of their inputs."""
    bench = _Stack(routes[0].weights, buffers, rows, apart=any(route.together for route in routes))
    for route in routes:
        route.grow(rows)

    def both(route: Layers) -> None:
        bench.forward(route, p)
        bench.dgrad(route, p)

    return in_turn([partial(both, route) for route in routes], bench.x.device, TURN, ROUNDS)


class _Stack:
    """The hidden layers on random data, in a step's buffers. The last output stands for its gradient."""

    def __init__(self, weights: PaddedWeights, buffers: Activations, rows: int, apart: bool):
        buffers.keep_apart(apart)
        self.x, self.hidden = buffers.rows(rows)
        self.gradients = [*(buffers.gradient(i, rows) for i in range(len(self.hidden))), self.hidden[-1]]
        g, device = torch.Generator(self.x.device).manual_seed(rows), self.x.device
        # Half zeros, as in training: on what is multiplied depends what a card draws, and so its clock.
        self.x.normal_(generator=g).relu_()
        self.dbias = [torch.empty(width, device=device) for width in weights.widths[1:-1]]
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.found_inf = None if self.x.dtype == torch.float32 else torch.zeros(1, device=device)
        self.down = range(len(self.hidden) - 1, -1, -1)

    def forward(self, route: Layers, p: float) -> None:
        route.forward(self.x, self.dropout(p), hidden=self.hidden)

    def dropout(self, p: float) -> Dropout:
        return Dropout(p, 0, self.step, 0)

    def dgrad(self, route: Layers, p: float) -> None:
        inputs = [self.x, *self.hidden]
        for layers in [self.down] if route.together else [[i] for i in self.down]:
            outputs = {"dx": [self.gradients[i] for i in layers], "dbias": [self.dbias[i - 1] for i in layers if i]}
            dz = self.gradients[layers[0] + 1]
            route.dgrad(layers, dz, inputs, p, **outputs, found_inf=self.found_inf)


def bits_difference(chain: Sm90Chain, single: Sm90Layers, p: float, buffers: Activations, rows: int) -> str | None:
    """What a chain makes, of the same inputs, with other bits than a launch for each layer: there one has not waited
    for what it reads, say.
    """
    stack = _Stack(chain.weights, buffers, rows, apart=True)
    inputs, spare = [stack.x, *stack.hidden], stack.x.new_empty(rows * max(chain.weights.widths))
    for route in (chain, single):
        route.grow(rows)
    for _ in range(CHAIN_REPEATS):
        for a in (*stack.hidden, *stack.gradients[:-1]):
            a.fill_(float("nan"))  # what was right in the run before must not be read again
        stack.forward(chain, p)
        for i, y in enumerate(stack.hidden):
            again = spare[: y.numel()].view_as(y)
            single.launch(i, inputs[i], stack.dropout(p), hidden=[again])
            if not _same_bits(again, y) or (i < len(chain.masks) and not torch.equal(chain.masks[i], single.masks[i])):
                return f"the output of layer {i}"
        stack.dgrad(chain, p)
        for i in stack.down:
            again, sums = spare[: inputs[i].numel()].view_as(inputs[i]), [torch.empty_like(b) for b in stack.dbias]
            below = slice(i - 1, i) if i else slice(0)
            outputs: dict[str, Any] = {"dx": [again], "dbias": sums[below], "found_inf": stack.found_inf}
            single.dgrad([i], stack.gradients[i + 1], inputs, p, **outputs)
            pairs = [(again, stack.gradients[i]), *zip(sums[below], stack.dbias[below])]
            if not all(_same_bits(a, b) for a, b in pairs):
                return f"the gradient of layer {i}"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integers = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(integers), b.view(integers))


def _problem(weights: PaddedWeights, rows: int, dtype: torch.dtype, p: float) -> str | None:
    shapes = sorted(set(zip(weights.widths, weights.widths[1:])))
    wrong, device = "they disagree with cuBLASLt", weights.flat.device
    problems = (_tested(wrong, disagreement, rows, I, O, dtype, p, device) for I, O in shapes)
    return next((problem for problem in problems if problem), None)


def _tested(wrong: str, test: Callable[..., str | None], *arguments) -> str | None:
    try:
        found = test(*arguments)
        return found and f"{wrong}: {found}"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        words = str(error).splitlines()[0]
        if not _gpu_is_lost():
            return f"a launch failed ({words})"
        raise RunError(
            f"the matrix products for Hopper GPUs failed their first run ({words}); set the environment "
            "variable WIDEDEEP_SM90=0 to run without them"
        ) from error


def _gpu_is_lost() -> bool:
    """Whether the GPU takes no more work from this process: so it is after a fault, not after a launch refused."""
    try:
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # the latter: a torch without CUDA
        return True
    return False


def disagreement(B: int, I: int, O: int, dtype: torch.dtype, p: float, device: torch.device) -> str | None:
    """What differs between ours and the library's on a random layer [B, I] -> [B, O] and the gradients back through
    it, or between two runs of ours.
    """
    g = torch.Generator(device).manual_seed(B)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(scale)

    x, weight, bias, dz = random(B, I), random(O, I, scale=I**-0.5), random(O, scale=0.1), random(B, O)
    upper = random(O, O, scale=O**-0.5)  # the layer above: its input's gradient goes through the mask
    step, tolerance, where = torch.full((1,), 3, device=device), AGREEMENT[dtype], f"of [{B}, {I}] x [{O}, {I}]"
    dropout = (p, 11, step, 2, 5)
    want, got = random(B, O), random(B, O)
    mask = torch.empty(linear_sm90.mask_bytes(B, O), dtype=torch.uint8, device=device)
    ours = (x, [weight], [bias], *dropout)
    ops.linear_relu_dropout_out(x, weight, bias, *dropout, y=want)
    linear_sm90.linear_sm90_out(*ours, y=[got], masks=[mask])
    if ((want > 0) != (got > 0)).sum() > MASK_AGREEMENT * want.numel() + 8:
        return f"the mask {where}"
    if _relative(got, want) > tolerance:
        return f"the output {where}"
    sums = [torch.empty(O, device=device) for _ in range(2)]
    dx = [torch.empty_like(want) for _ in range(2)]
    # Both look through the same y, so that its rounding plays no part.
    ops.linear_dgrad_out(dz, upper, got, p, dx=dx[0], dbias=sums[0])
    linear_sm90.linear_sm90_dgrad_out(dz, [upper.t().contiguous()], [mask], p, dx=dx[1:], dbias=sums[1:])
    if _relative(dx[1], dx[0]) > tolerance:
        return f"the gradient {where}"
    noise = tolerance / 2 * B**0.5  # roundings of B terms of the order of 1; a tile left out makes ten times as much
    if not (sums[1] - sums[0]).abs().max() <= noise + tolerance * 4:
        return f"the bias gradient {where}"
    del dx
    return _input_gradient(dz, weight, tolerance, where) or _repeats(ours, got, where)


def _input_gradient(dz: Tensor, weight: Tensor, tolerance: float, where: str) -> str | None:
    """As `disagreement`: the first layer's, which looks through no mask and says whether it is finite."""
    dx = [dz.new_empty(len(dz), weight.shape[1]) for _ in range(2)]
    found, weight_t = torch.zeros(1, device=dz.device), weight.t().contiguous()
    ops.linear_dgrad_out(dz, weight, None, 0.0, dx=dx[0], dbias=None)
    asked = None if dz.dtype == torch.float32 else found
    linear_sm90.linear_sm90_dgrad_out(dz, [weight_t], [], 0.0, dx=dx[1:], dbias=[], found_inf=asked)
    if _relative(dx[1], dx[0]) > tolerance:
        return f"the input's gradient {where}"
    if dz.dtype == torch.float32:  # of which nobody asks whether it is finite
        return None
    dz[-1, -1] = float("inf")
    after = torch.zeros(1, device=dz.device)
    linear_sm90.linear_sm90_dgrad_out(dz, [weight_t], [], 0.0, dx=dx[1:], dbias=[], found_inf=after)
    return None if found == 0 and after == 1 else f"the finiteness of the input's gradient {where}"


def _repeats(layer: tuple, got: Tensor, where: str) -> str | None:
    """As `disagreement`: a race shows in bits that change from run to run."""
    again = torch.empty_like(got)
    for _ in range(REPEATS):
        linear_sm90.linear_sm90_out(*layer, y=[again], masks=[])
        if not torch.equal(again, got):
            return f"the output of a second run {where}"
    return None


def _relative(got: Tensor, want: Tensor) -> float:
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
    return error if error == error else float("inf")
