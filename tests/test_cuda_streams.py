"""The order that the two streams of the GPU step keep among their ops, found from what each op reads and writes; on any
machine. Streams are clocks here: an op may touch what another stream's op has written only after waiting for it.
"""

import contextlib

import pytest
import torch
from test_cuda_step import EVEN, gpu_step
from test_model import MOVED
from test_step import LR, batch_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from widedeep.dist import LocalComm
from widedeep.ops import linear_sm90
from widedeep.step import StepConfig
from widedeep.steps.cuda_ranks import RanksCudaStep
from widedeep.steps.sharded import ShardedCudaStep


class Stream:
    """Counts its ops, and remembers how many of each stream's it comes after."""

    def __init__(self):
        self.after = {}

    def wait_stream(self, other):
        for stream, count in other.after.items():
            self.after[stream] = max(count, self.after.get(stream, 0))

    def record_event(self):
        event = Stream()
        event.after = dict(self.after)
        return event

    wait_event = wait_stream

    def next(self):
        self.after[self] = self.after.get(self, 0) + 1
        return self.after[self]


class Races(TorchDispatchMode):
    """Notes every access to memory; `found` are pairs of ops that no wait puts in order though one of them writes."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.main = self.current = Stream()
        self.accesses, self.kept, self.found = {}, [], set()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.switched)

    @contextlib.contextmanager
    def switched(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        schema, kwargs = op._schema, kwargs or {}
        if not schema.is_mutable and any(r.alias_info for r in schema.returns):
            return result  # a view
        tick = self.current.next()
        given = [*zip(schema.arguments, args), *((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs)]
        for argument, value in given:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            self.touch(op, tick, value, writes)
        self.touch(op, tick, result, True)
        return result

    def touch(self, op, tick, value, writes):
        for tensor in (t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.numel()):
            self.kept.append(tensor)  # so that no memory is handed out twice
            start = tensor.data_ptr()
            end = start + (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))) * tensor.element_size()
            accesses = self.accesses.setdefault(tensor.untyped_storage().data_ptr(), [])
            for other, stream, at, first, last, wrote in accesses:
                if (writes or wrote) and first < end and start < last and self.current.after.get(stream, 0) < at:
                    self.found.add(f"{other.name()} and {op.name()}")
            accesses.append((op, self.current, tick, start, end, writes))


class Echo(LocalComm):
    """Another process that has nothing: sums and gathers are what this one gives, read and written anew."""

    def all_reduce_(self, tensor):
        return tensor.add_(0)

    def all_gather_rows(self, tensor, lengths=None):
        return tensor.clone()

    def all_to_all_rows(self, tensor, sent, received):
        return tensor.clone()


def watched(step, monkeypatch, steps=2):
    """Runs steps on two streams; returns the races and the step's streams."""
    step.train(batch_of(step.model.spec, 40), 0, LR)  # allocates and copies
    races = Races(monkeypatch)
    step.second.stream = Stream()
    for i in range(1, 1 + steps):
        batch = batch_of(step.model.spec, 40, seed=i)
        with races:
            step.train(batch, i, LR)
            step.predict(batch)
    assert step.second.stream.after[step.second.stream] >= 2 * steps
    return races


@pytest.mark.parametrize("spec", [EVEN, MOVED], ids=["even", "moved"])
@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_streams_race_for_nothing(parts, precision, spec, monkeypatch):
    step = gpu_step(spec, StepConfig(precision), parts=parts)
    races = watched(step, monkeypatch)
    assert races.found == set()
    second = step.second.stream
    assert races.main.after[second] == second.after[second]  # joined, as the end of a capture demands


@pytest.mark.parametrize("spec", [EVEN, MOVED], ids=["even", "moved"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", [RanksCudaStep, ShardedCudaStep])
def test_streams_race_for_nothing_among_ranks(kind, precision, spec, monkeypatch):
    step = gpu_step(spec, StepConfig(precision))
    step = kind(step.model, step.config, step.device, Echo("cpu"))
    assert watched(step, monkeypatch).found == set()


@pytest.fixture
def hopper(monkeypatch):
    """In the place of the Hopper products what touches the same memory."""

    def products(x, weights, *rest, **outputs):
        for read in tree_leaves((x, weights, rest)):
            if isinstance(read, torch.Tensor):
                read.clone()
        for written in tree_leaves(outputs):
            if isinstance(written, torch.Tensor):
                written.zero_()

    monkeypatch.setattr(linear_sm90, "available", lambda device: True)
    monkeypatch.setattr(linear_sm90, "linear_sm90_out", products)
    monkeypatch.setattr(linear_sm90, "linear_sm90_dgrad_out", products)


@pytest.mark.parametrize("gemm", ["sm90", "sm90-chain"])
def test_streams_race_for_nothing_with_hopper_products(gemm, hopper, monkeypatch):
    step = gpu_step(EVEN, StepConfig("fp16", gemm=gemm))
    assert watched(step, monkeypatch).found == set()
    assert step.gemm == gemm


@pytest.mark.parametrize("forgotten", ["wait", "queue"])
def test_a_forgotten_wait_is_seen(forgotten, monkeypatch):
    step = gpu_step()

    @contextlib.contextmanager
    def queue():
        with torch.cuda.stream(step.second.stream) if step.second.stream else contextlib.nullcontext():
            yield

    monkeypatch.setattr(step.second, forgotten, {"wait": lambda: None, "queue": queue}[forgotten])
    assert watched(step, monkeypatch).found
