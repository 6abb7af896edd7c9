"""One worker a GPU: a worker process sees one device alone, chosen before it touches any."""

import os
from collections.abc import Sequence

from preprocess.xp import array_module


def visible(device: str) -> tuple[str, ...]:
    """The devices that this process may use, as CUDA_VISIBLE_DEVICES names them; none with device "cpu".

    Raises:
        InputError: device "cuda" without cupy or without a GPU.
    """
    if device == "cpu":
        return ()
    count = array_module(device).cuda.runtime.getDeviceCount()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")[:count]) if named else tuple(map(str, range(count)))


def choose(devices: Sequence[str], worker: int) -> None:
    """Leaves this process device `worker` modulo their number; more workers than devices share."""
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
