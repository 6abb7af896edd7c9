"""What calls take in a long run: replayed from CUDA graphs, one right behind the other, on a card that has been busy
for a while. Single launches would measure the host's time to launch them, on a rested card, whose clock is higher.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch

from widedeep.steps.graphs import make_graphs

CAPTURED = 8  # calls in a graph at most: so often the pause between two graphs is shared

Mark = torch.cuda.Event | float


def in_turn(functions: Sequence[Callable[[], object]], device: torch.device, turn: float, rounds: int) -> list[float]:
    """Seconds of a call of each function, medians over `rounds` turns.

    In a round every function has its turn: calls for about `turn` seconds, one at least. Turns follow each other
    without a pause, so that all find the card in the same state; a round that does not count brings it there.

    Args:
        functions: they queue on the current stream, are captured, and read and write memory that outlives the timing.
    """
    graphs = make_graphs(device)
    turns, calls = [], []
    for key, function in enumerate(functions):
        function()  # loads kernels; the library times its algorithms
        captured = min(CAPTURED, _fitting(turn, _seconds(function, device)))
        run = partial(graphs.run, key, partial(_repeat, function, captured))
        _repeat(run, 2)  # as it stands, then captured
        replays = _fitting(turn, _seconds(run, device))
        turns.append(partial(_repeat, run, replays))
        calls.append(captured * replays)
    marks = [mark(device)]
    for each in turns * (rounds + 1):
        each()
        marks.append(mark(device))
    counted = between(marks)[len(turns) :]
    return [statistics.median(counted[i :: len(turns)]) / count for i, count in enumerate(calls)]


def _repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def _fitting(turn: float, seconds: float) -> int:
    return max(1, int(turn / max(seconds, 1e-6)))


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    start = mark(device)
    function()
    return between([start, mark(device)])[0]


def mark(device: torch.device) -> Mark:
    """A point of time on the current stream; without a GPU, of the host."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks: Sequence[Mark]) -> list[float]:
    """Seconds from each mark to the next; waits for the last."""
    if isinstance(marks[-1], float):
        return [b - a for a, b in pairwise(marks)]  # type: ignore[operator]  # all are of one kind
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]  # type: ignore[union-attr, arg-type]  # as above
