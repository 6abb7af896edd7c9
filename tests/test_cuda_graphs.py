"""Which runs of a step are captured, which graphs are kept, what a replay repeats; with stand-ins for CUDA's graphs, so
on any machine.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_cuda_step import EVEN, gpu_step
from test_model import MOVED
from test_step import LR, assert_same, batch_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from widedeep.dist import LocalComm
from widedeep.step import StepConfig
from widedeep.steps import cuda as cuda_step
from widedeep.steps import graphs
from widedeep.steps.sharded import ShardedCudaStep
from widedeep.steps.streams import SecondStream


class Recorded:
    """What `torch.cuda.graph` records: the functions that ran inside it, which a replay runs."""

    def __init__(self):
        self.replay = None


@pytest.fixture
def cuda(monkeypatch):
    """The events in order: ("capture", pool, mode) and whatever the functions add. A capture runs nothing."""
    events, capturing = [], []

    @contextlib.contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        assert stream.priority == -1  # one that no reader has
        events.append(("capture", pool, capture_error_mode))
        capturing.append(recorded)
        try:
            yield
        except Exception:
            raise RuntimeError("capture is not joined") from None  # as torch does; the stream stays
        finally:
            capturing.pop()

    def queue(what):
        if capturing:
            capturing[-1].replay = lambda: events.append(what)
        else:
            events.append(what)

    pools = iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: SimpleNamespace(priority=priority))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: events.append(("stream", stream)))
    return graphs.Graphs(torch.device("cuda")), events, queue


def test_a_shape_runs_as_it_stands_then_captured_then_replayed(cuda):
    kept, events, queue = cuda
    for key in ("a", "a", "b", "a", "b", "b"):
        kept.run(key, lambda key=key: queue(key))
    captures = [e for e in events if e[0] == "capture"]
    assert captures == [("capture", 0, "thread_local")] * 2  # one pool; a reader's thread may go on
    assert [e for e in events if e not in captures] == ["a", "a", "b", "a", "b", "b"]
    assert len(kept) == 2
    kept.clear()
    assert len(kept) == 0
    events.clear()
    for _ in range(2):
        kept.run("a", lambda: queue("a"))
    assert events == ["a", ("capture", 1, "thread_local"), "a"]  # what follows may have kernels to load again


def test_a_failed_first_run_is_not_captured(cuda):
    kept, events, queue = cuda

    def failing():
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        kept.run("a", failing)
    kept.run("a", lambda: queue("a"))
    assert events == ["a"]


def test_a_failed_capture_leaves_plain_launches(cuda, caplog):
    kept, events, queue = cuda

    def not_capturable():
        if events[-1:] == [("capture", 0, "thread_local")]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        queue("a")

    for _ in range(4):
        kept.run("a", not_capturable)
    kept.clear()
    for _ in range(2):
        kept.run("b", lambda: queue("b"))
    assert events == ["a", ("capture", 0, "thread_local"), ("stream", "before"), "a", "a", "a", "b", "b"]
    assert len(kept) == 0
    (record,) = caplog.records
    assert record.message.endswith(": operation not permitted when stream is capturing")
    assert isinstance(graphs._failed.pop(), Recorded)  # outlives its step, since torch's allocator may still ask it


def test_graphs_used_longest_ago_make_room_and_warm_up_again(cuda):
    kept, events, queue = cuda
    for key in range(graphs.KEPT):
        for _ in range(2):
            kept.run(key, lambda key=key: queue(key))
    kept.run(0, lambda: queue(0))  # now 1 is the oldest
    for _ in range(2):
        kept.run("new", lambda: queue("new"))
    assert len(kept) == graphs.KEPT
    events.clear()
    kept.run(0, lambda: queue(0))
    kept.run(1, lambda: queue(1))
    assert events == [0, 1]
    kept.run(1, lambda: queue(1))
    assert events[2:] == [("capture", 0, "thread_local"), 1]


def test_nothing_is_captured_without_the_allocator_of_torch(cuda, monkeypatch):
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    kinds = [type(graphs.make_graphs(torch.device(name))) for name in ("cuda", "cpu")]
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert [*kinds, type(graphs.make_graphs(torch.device("cuda")))] == [graphs.Graphs, graphs.NoGraphs, graphs.NoGraphs]


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: a replay runs the recorded ops on the memory and the numbers of that time."""

    def __init__(self):
        super().__init__()
        self.ops, self.recorded = [], False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        is_view = not op._schema.is_mutable and any(r.alias_info for r in op._schema.returns)
        if not is_view and not op.name().startswith("aten::empty"):
            self.ops.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        for op, args, kwargs, result in self.ops if self.recorded else ():  # the recording itself ran them once
            again = op(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
        self.recorded = True


@pytest.fixture
def tapes(monkeypatch):
    """Steps that are made here have graphs, of `Tape`s; the list of them."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, *_, **__: tape)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(cuda_step, "make_graphs", graphs.Graphs)
    return made


def taped_and_plain(spec, precision, **settings):
    taped, plain = (gpu_step(spec, StepConfig(precision), **settings) for _ in range(2))
    plain.graphs = graphs.NoGraphs()
    return taped, plain


@pytest.mark.parametrize("spec", [EVEN, MOVED], ids=["even", "moved"])
@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_replay_does_what_the_step_would_do_now(precision, parts, spec, tapes):
    """Rows, rates, step numbers, weights and states are new each time; larger batches move what it reads and writes."""
    steps = taped_and_plain(spec, precision, parts=parts)
    kept = {}
    for i, B in enumerate([9, 9, 9, 5, 9, 5, 5, 0, 0, 0, 14, 9, 9, 9, 14, 14, 9]):
        batch = batch_of(spec, B, seed=i)._replace(global_rows=16)
        if i == 6 and precision == "fp16":
            batch.numeric[2, 1] = float("inf")  # a step that is skipped
        losses = [step.train(batch, i, LR * (1 + i)) for step in steps]
        assert torch.equal(*losses) or (losses[0].isnan() and losses[1].isnan()), i
        for seed in (50, 90):
            other = batch_of(spec, B, seed=i + seed)
            assert torch.equal(*(step.predict(other) for step in steps)), i
        for step in steps:
            arrays = step.model.named_arrays() | step.state()
            if i == 2:
                kept[step] = {name: a.clone() for name, a in arrays.items()}
            if i == 7:
                step.load_state(kept[step])
                for name, a in step.model.named_arrays().items():
                    a.copy_(kept[step][name])
    assert len(tapes) >= 8
    assert_same(*steps, rtol=0, atol=0)


def test_a_prediction_of_no_rows_is_not_captured(tapes):
    """It launches nothing, and torch warns of a graph of nothing."""
    step = gpu_step()
    for i in range(3):
        assert step.predict(batch_of(EVEN, 0, seed=i)).shape == (0,)
    assert not tapes
    for i in range(3):
        step.predict(batch_of(EVEN, 4, seed=i))
    assert len(tapes) == 1


@pytest.mark.parametrize("parts", ["both", "wide"])
def test_what_a_graph_has_as_a_number_is_captured_anew(parts, tapes):
    """The place of a batch's first row and the size of the global batch; a model's dropout and seed."""
    taped, plain = taped_and_plain(EVEN, "fp32", parts=parts)
    batch = batch_of(EVEN, 8)._replace(global_rows=40)
    several = [batch, batch._replace(first_row=16), batch._replace(first_row=16, global_rows=24)] * 6
    for i, each in enumerate(several):
        for step in (taped, plain):
            step.model.dropout, step.model.seed = (0.3 if i < 6 else 0.5), (11 if i < 12 else 12)
        assert torch.equal(taped.train(each, i, LR), plain.train(each, i, LR)), i
    assert_same(taped, plain, rtol=0, atol=0)


def test_no_graph_names_rows_that_were_borrowed_once(tapes):
    """The tables that a batch borrows from the ranks are its own."""
    model = gpu_step().model
    rest = (model, StepConfig(), torch.device("cpu"), LocalComm("cpu"))
    steps = ShardedCudaStep(*rest), cuda_step.CudaStep(*rest)
    for i in range(4):
        batch = batch_of(EVEN, 9, seed=i)
        assert torch.equal(*(step.predict(batch) for step in steps))


def test_the_second_stream_is_nobody_elses_either(cuda):
    kept, *_ = cuda
    assert SecondStream(torch.device("cuda")).stream.priority < kept._stream.priority < 0


@pytest.mark.cuda
def test_the_second_stream_goes_first():
    captured, beside = (graphs.own_stream(torch.device("cuda"), priority) for priority in (-1, -2))
    assert beside.priority < captured.priority < torch.cuda.Stream().priority
