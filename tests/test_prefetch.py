"""What works ahead of the training loop: threads, and copies to a GPU on stand-ins for its streams; on any machine."""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cuda_streams import Stream

from widedeep.errors import InputError
from widedeep.readers.prefetch import _copies, _copying, prefetch, prefetch_map, transfer
from widedeep.readers.rows import Rows, Slice

ROOT = Path(__file__).resolve().parents[1]


def test_a_failure_in_the_thread_is_raised_to_the_loop():
    def items():
        yield 1
        raise InputError("block 7 is damaged")

    got = prefetch(items(), 2)
    assert next(got) == 1
    with pytest.raises(InputError, match="block 7"):
        next(got)


def test_prefetch_stays_within_its_depth():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    got = prefetch(items(), 3)
    for taken in range(1, 20):
        next(got)
        assert len(made) <= taken + 3 + 1
    got.close()
    assert len(made) < 30


ENDS = """
import torch
from widedeep.readers.prefetch import prefetch

def slow():
    while True:
        yield torch.rand(1 << 22).sort()

def fail():
    items = prefetch(slow(), 2)
    next(items)
    raise RuntimeError("the traceback keeps this frame, and the frame its iterator")

fail()
"""


def test_an_interpreter_that_ends_waits_for_the_thread():
    """It would abort the process where it meets the thread in C++."""
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("its iterator\n")


def test_a_thread_that_copies_is_on_its_gpu_all_the_while(monkeypatch):
    """It begins on the first one; where a stream is left there, every process has memory on the first GPU."""
    current = ["cuda:0"]

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    @contextlib.contextmanager
    def using(stream):
        assert current == ["cuda:3"]
        yield
        assert current == ["cuda:3"]

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "stream", using)
    piece, rows = object(), SimpleNamespace(map=lambda function: rows)
    stream = SimpleNamespace(record_event=lambda: "event")
    copies = _copies((pair for pair in [(piece, rows)] * 3), "cuda:3", stream)
    assert list(copies) == [(piece, rows, "event")] * 3
    assert current == ["cuda:0"]


@pytest.mark.parametrize("workers", [1, 3])
def test_parallel_prefetch_keeps_the_order_and_its_depth(workers):
    started, before = [], threading.active_count()

    def square(i):
        started.append(i)
        if i == 30:
            raise InputError("block 30 is damaged")
        return i * i

    got = prefetch_map(square, iter(range(100)), workers)
    for taken in range(30):
        assert next(got) == taken * taken
        assert len(started) <= taken + workers + 1
    with pytest.raises(InputError, match="block 30"):
        next(got)
    assert threading.active_count() == before


class Tensor:
    """A tensor of which only where it is counts."""

    def __init__(self, name, place="host", ready=None):
        self.name, self.place, self.ready, self.used_by = name, place, ready, []

    def is_pinned(self):
        return self.place == "pinned"

    def contiguous(self):
        return self

    def pin_memory(self):
        return Tensor(self.name, "pinned")

    def to(self, device, non_blocking):
        assert self.is_pinned()  # else the copy would hold the thread, and the device's other work
        assert non_blocking
        stream = torch.cuda.current_stream(device)
        return Tensor(self.name, "device", (stream, stream.next()))

    def record_stream(self, stream):
        self.used_by.append(stream)


@pytest.fixture
def streams(monkeypatch):
    """In the place of CUDA's streams clocks, of which each thread has a current one; the loop's, and those made."""
    loop, made, here = Stream(), [], threading.local()

    @contextlib.contextmanager
    def switched(stream):
        before, here.stream = torch.cuda.current_stream(), stream
        yield
        here.stream = before

    def make(device):
        made.append(Stream())
        return made[-1]

    here.stream = loop  # of the loop's thread
    others = Stream()  # what a thread has that chooses none
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: getattr(here, "stream", others))
    monkeypatch.setattr(torch.cuda, "stream", switched)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    _copying.cache_clear()
    yield loop, made
    _copying.cache_clear()


@pytest.mark.parametrize("place", ["host", "pinned"])
@pytest.mark.parametrize("group", [True, False])
def test_the_loop_gets_batches_whose_copies_its_stream_waits_for(place, group, streams):
    """They are copied beside its work, and their memory is not used anew before it is done with them."""
    loop, made = streams
    names = ["ids", "numeric", "label", *(["group"] if group else [])]
    for _ in range(2):  # epochs
        pieces = [Slice(i, i + 1, 0, 1) for i in range(5)]
        host = (
            (p, Rows(*(Tensor(f"{n} {p.start}", place) for n in names), *([] if group else [None]))) for p in pieces
        )
        for piece, (got, rows) in zip(pieces, transfer(host, torch.device("cuda")), strict=True):
            assert got is piece
            assert [t.name for t in rows if t is not None] == [f"{name} {piece.start}" for name in names]
            for tensor in (t for t in rows if t is not None):
                stream, tick = tensor.ready
                assert stream in made
                assert loop.after.get(stream, 0) >= tick
                assert tensor.used_by == [loop]
    assert len(made) == 1  # torch's allocator would keep memory for each


def test_work_on_a_side_stream_waits_for_the_copies_too(streams):
    host = ((Slice(i, i + 1, 0, 1), Rows(*map(Tensor, "inl"), None)) for i in range(2))
    side = Stream()
    with torch.cuda.stream(side):
        for _, rows in transfer(host, torch.device("cuda")):
            assert all(side.after[t.ready[0]] >= t.ready[1] and t.used_by == [side] for t in rows[:3])
