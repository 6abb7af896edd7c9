"""Work ahead of the training loop: a background thread, and copies to a GPU on a stream of their own."""

import atexit
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from widedeep.readers.rows import Rows, Slice

S = TypeVar("S")
T = TypeVar("T")
_END = object()


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield `items`, computed by a thread that is at most `depth` finished items ahead.

    The thread starts with the first `next` and has ended when the iterator is exhausted, closed or dropped. What it
    raises is raised here.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, ready, stopped), name="widedeep-prefetch", daemon=True)
    thread.start()

    def end() -> None:
        stopped.set()
        while thread.is_alive():
            # The thread may be waiting for room.
            while not ready.empty():
                ready.get_nowait()
            thread.join(0.01)

    # An interpreter that ends while the thread is in C++ aborts; a traceback may keep this iterator until then.
    atexit.register(end)
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        end()
        atexit.unregister(end)


def _produce(items: Iterator[T], ready: queue.Queue, stopped: threading.Event) -> None:
    try:
        for item in items:
            ready.put(item)
            if stopped.is_set():
                return
        ready.put(_END)
    except BaseException as error:
        ready.put(_Failure(error))
    finally:
        # Closes what `items` itself runs, a prefetch of its own among them.
        if hasattr(items, "close"):
            items.close()


def prefetch_map(function: Callable[[S], T], items: Iterator[S], workers: int) -> Iterator[T]:
    """Yield function(item) of each item, in their order, computed by `workers` threads, at most one more ahead.

    Threads start with the first `next` and have ended when the iterator is exhausted, closed or dropped. What a call
    raises is raised here, in its place.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="widedeep-read")
    ahead: deque[Future[T]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def transfer(batches: Iterator[tuple[Slice, Rows]], device: torch.device) -> Iterator[tuple[Slice, Rows]]:
    """Yield host batches on `device`: prepared by a thread, for a GPU copied from pinned memory beside the compute."""
    if device.type != "cuda":
        yield from prefetch(batches, depth=2)
        return
    for piece, rows, copied in prefetch(_copies(batches, device, _copying(device)), depth=2):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        # The memory belongs to the copying stream; its reuse must wait for the work queued here.
        rows.map(lambda tensor, current=current: tensor.record_stream(current))
        yield piece, rows


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: torch's allocator keeps memory for each stream, and would for each epoch's."""
    return torch.cuda.Stream(device)


def _copies(batches: Iterator[tuple[Slice, Rows]], device: torch.device, stream: torch.cuda.Stream) -> Iterator[tuple]:
    try:
        # A thread begins with the first GPU as its current one, and leaving a stream would take memory there.
        with torch.cuda.device(device):
            for piece, host in batches:
                # torch's allocator of pinned memory keeps a freed block until the copies queued from it are done.
                pinned = host.map(lambda tensor: tensor if tensor.is_pinned() else tensor.contiguous().pin_memory())
                with torch.cuda.stream(stream):
                    rows = pinned.map(lambda tensor: tensor.to(device, non_blocking=True))
                    copied = stream.record_event()
                yield piece, rows, copied
    finally:
        batches.close()  # type: ignore[attr-defined]  # of a generator
