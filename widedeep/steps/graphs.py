"""CUDA graphs of a step: one for each shape of batch, captured when the shape comes for the second time.

The first time runs the same code as it stands: that loads kernels, times algorithms and fills the allocator, all of
which a capture forbids. So a shape that comes once (the last batch of the only epoch) never costs a capture, and a
replay computes exactly what the first run did. Where a capture fails, every shape goes on as plain launches: the same
results, at a cost that only small batches feel.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from widedeep.steps.streams import own_stream

log = logging.getLogger(__name__)

KEPT = 8  # graphs; the one that was used longest ago makes room

_failed: list[torch.cuda.CUDAGraph] = []  # for the life of the process: torch's allocator goes on referring to them


class Graphs:
    def __init__(self, device: torch.device):
        self.device = device
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._captures = True
        self._stream = own_stream(device, priority=-1)

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forgets every graph: the memory that they name has moved."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Does what `function` queues on the current stream. It reads and writes memory that outlives the graph."""
        graph = self._graphs.get(key)
        if graph is None:
            if key in self._seen and self._captures:
                graph = self._capture(function)
            if graph is None:
                function()
                self._seen.add(key)  # now: what failed must not be captured
                return
            self._graphs[key] = graph
            if len(self._graphs) > KEPT:
                oldest, _ = self._graphs.popitem(last=False)
                self._seen.discard(oldest)
        self._graphs.move_to_end(key)
        graph.replay()

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: a reader's thread may go on pinning and copying the next batches meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                function()
        except Exception as error:
            torch.cuda.set_stream(before)  # torch leaves the capturing one when a capture cannot be ended
            self._captures = False
            _failed.append(graph)
            cause = str(error.__context__ or error).splitlines()[0]
            log.warning("the step is not captured in a CUDA graph, which slows small batches down: %s", cause)
            return None
        return graph


def make_graphs(device: torch.device) -> "Graphs | NoGraphs":
    """A sanitizer sees where each tensor ends only with torch's allocator switched off, so that must work too."""
    captures = device.type == "cuda" and not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")
    return Graphs(device) if captures else NoGraphs()


class NoGraphs:
    """Runs every time as it stands: without a GPU, or without torch's allocator, whose pools a capture needs."""

    def __len__(self) -> int:
        return 0

    def clear(self) -> None:
        pass

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        function()
