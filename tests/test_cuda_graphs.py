"""Which runs of a step are captured, and which graphs are kept; with stand-ins for CUDA's graphs, so on any machine."""

import contextlib

import pytest
import torch

from widedeep.steps import graphs


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
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: object())
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
    for _ in range(2):
        kept.run("a", lambda: queue("a"))
    assert ("capture", 1, "thread_local") in events


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


@pytest.mark.cuda
def test_the_second_stream_goes_first():
    captured, beside = (graphs.own_stream(torch.device("cuda"), priority) for priority in (-1, -2))
    assert beside.priority < captured.priority < torch.cuda.Stream().priority
