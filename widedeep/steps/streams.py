"""The streams of the GPU step that are not the current one."""

import contextlib
from collections.abc import Iterator

import torch


def own_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A stream that no reader has. torch hands out the same 32 streams of a priority again and again: work that another
    thread queues on the one that is being captured would become part of the graph. Readers' streams have priority 0,
    and torch keeps 32 streams for each of the priorities 0 to -3, so those of another priority are nobody else's.

    Args:
        priority: -1 for the stream that is captured, -2 for the one beside it. Blocks of the lower number are started
            first: what the second stream queues is small and gets its place as soon as blocks of the large kernels end.
    """
    return torch.cuda.Stream(device, priority=priority)


class SecondStream:
    """What runs beside the current stream; without a GPU, in its place.

    Attributes:
        stream: None without a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = own_stream(device, priority=-2) if device.type == "cuda" else None

    @contextlib.contextmanager
    def queue(self) -> Iterator[None]:
        """Queues here, after what the current stream has been given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def wait(self) -> None:
        """The current stream goes on after all that this one has been given."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
