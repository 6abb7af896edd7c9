"""SIGTERM, by which clusters announce that a process will be killed soon: a training then saves where it stands."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from widedeep.dist import LocalComm


class Terminated(SystemExit):
    """The run ends, as a process that SIGTERM ended does."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class Termination:
    """Notes SIGTERM while it is entered, in the main thread. A second one changes nothing: where every process of a job
    is sent it, torchrun sends it to its own once more.
    """

    def __init__(self, comm: LocalComm):
        self._comm, self._asked = comm, False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self._asked = True

    def agreed(self, waits: bool) -> bool:
        """Whether any process was asked to end; all must call this at the same step, and have one answer.

        waits: whether the host waits for the device at this step anyway, as several processes on GPUs must to agree;
            at other steps they say no.
        """
        if self._comm.world == 1:
            return self._asked
        if self._comm.device.type != "cpu" and not waits:
            return False
        asked = torch.full((1,), float(self._asked), device=self._comm.device)
        return bool(self._comm.all_reduce_(asked).item())
