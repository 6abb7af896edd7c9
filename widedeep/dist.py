"""The processes of a run: who is who, and the four collectives that training and evaluation need.

`torchrun` starts one process for each device and says so in the environment; without it a run is one process. nccl
joins GPUs, gloo CPUs.
"""

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from widedeep.devices import exact_device
from widedeep.errors import InputError, RunError

JOIN = timedelta(minutes=10)  # until all have come; a launcher that died is noticed then
TIMEOUT = timedelta(minutes=30)  # the first process may write a checkpoint of many gigabytes while the others wait
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE")  # say how many processes there are
LEAVE = 20  # seconds at most until a process that failed says so
PR_SET_PDEATHSIG = 1  # of prctl(2)


class LocalComm:
    """One process: every collective is the identity."""

    rank = 0
    world = 1
    local_rank = 0
    local_world = 1

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = exact_device(device)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the processes, in place; returns it."""
        return tensor

    def all_gather_rows(self, tensor: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """[n, ...] of each process, n its own, to [sum of n, ...] in the order of ranks, the same on every process.

        Args:
            lengths: n of each process, where the caller knows them: nobody asks the others, nor the device, for them.
        """
        return tensor

    def all_to_all_rows(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """[sum of sent, ...], so many rows for each process, to [sum of received, ...], so many from each."""
        return tensor

    def barrier(self) -> None:
        """Waits for all processes."""

    def close(self) -> None:
        """Leaves the group, together with the others."""

    def abort(self) -> None:
        """Leaves the group after a failure: at once, for the others may be waiting for this process."""


class GroupComm(LocalComm):
    """The processes that torchrun started."""

    def __init__(self, device: torch.device):
        import torch.distributed as group

        super().__init__(device)
        self._group = group
        self.rank, self.world = _environment("RANK"), _environment("WORLD_SIZE")
        self.local_rank, self.local_world = _environment("LOCAL_RANK"), _environment("LOCAL_WORLD_SIZE")
        if self.rank >= self.world:  # which would wait for ranks that are not there
            raise InputError(
                f"environment variable RANK: expected a number below {self.world} (WORLD_SIZE), got {self.rank}"
            )
        backend = "nccl" if device.type == "cuda" else "gloo"
        with _lost_worker():
            store, rank, world = next(group.rendezvous("env://", timeout=JOIN))
            store = group.PrefixStore(agree_on_prefix(store, rank, world), store)
            card = device if device.type == "cuda" else None
            group.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT, device_id=card)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        with _lost_worker():
            self._group.all_reduce(tensor)
        return tensor

    def all_gather_rows(self, tensor: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        tensor = tensor.contiguous()
        with _lost_worker():
            if lengths is None:
                counts = torch.empty(self.world, 1, dtype=torch.int64, device=tensor.device)
                self._group.all_gather(list(counts), torch.full_like(counts[0], len(tensor)))
                lengths = counts.view(-1).tolist()
            if min(lengths) == max(lengths):
                padded = tensor
            else:  # collectives want equal shapes: the shorter ones are padded, and cut again below
                padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
                padded[: len(tensor)] = tensor
            parts = [torch.empty_like(padded) for _ in range(self.world)]
            self._group.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths)])

    def all_to_all_rows(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        output = tensor.new_empty(sum(received), *tensor.shape[1:])
        with _lost_worker():
            self._group.all_to_all_single(output, tensor.contiguous(), list(received), list(sent))
        return output

    def barrier(self) -> None:
        self.all_reduce_(torch.zeros(1, device=self.device))
        if self.device.type == "cuda":
            with _lost_worker():
                torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self._group.destroy_process_group()

    def abort(self) -> None:
        if self._group.get_backend() != "nccl":  # which alone waits for the others when it is left
            return self.close()
        leaving = threading.Thread(target=self._group.group.WORLD.abort, daemon=True)  # type: ignore[union-attr]  # set since it was joined
        leaving.start()
        leaving.join(LEAVE)


def agree_on_prefix(store: Any, rank: int, world: int) -> str:
    """A prefix for keys that only these processes know. torchrun may keep its store, with the addresses of those that
    died, when it starts processes again; the restarts that it counts differ between machines.

    Raises:
        RuntimeError: not all have come within `JOIN`.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"join/{rank}", own)
        prefix = store.get(f"welcome/{own}").decode()  # waits
        store.set(f"{prefix}/{rank}", "")
        return prefix
    end = time.monotonic() + JOIN.total_seconds()
    missing = list(range(1, world))
    while missing := [other for other in missing if not store.check([f"{own}/{other}"])]:
        if time.monotonic() > end:
            raise RuntimeError(f"{len(missing)} of {world} processes have not come")
        for other in missing:
            if store.check([f"join/{other}"]):  # perhaps still of one that died, until its successor has come
                store.set(f"welcome/{store.get(f'join/{other}').decode()}", own)
        time.sleep(0.02)
    return own


def choose_device(cpu: bool) -> torch.device:
    """The GPU of this process if there is one and `cpu` does not forbid it, else the CPU.

    Raises:
        InputError: more processes on this machine than GPUs, or LOCAL_RANK is not as torchrun sets it.
    """
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    index = _environment("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    if index >= torch.cuda.device_count():
        raise InputError(
            f"torchrun started a process number {index} on this machine, which has {torch.cuda.device_count()} GPUs: "
            "expected at most one process for each GPU, or --cpu"
        )
    return torch.device("cuda", index)


def connect(device: torch.device) -> LocalComm:
    """Joins the processes of this run; alone unless torchrun's environment says otherwise.

    Raises:
        InputError: another launcher started several processes: each would be a run of its own; or the environment is
            none that torchrun sets.
    """
    is_group = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    for name in () if is_group else OTHER_LAUNCHERS:
        if (count := os.environ.get(name, "")).isdigit() and int(count) > 1:
            raise InputError(
                f"environment variable {name}: {count} processes were started by mpiexec or horovodrun, and each"
                f" would be a run of its own: expected `torchrun --nproc_per_node {count} -m widedeep` in its place"
            )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if is_group and "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_torchrun()
    return GroupComm(device) if is_group else LocalComm(device)


def _end_with_torchrun() -> None:
    """Has Linux send this process SIGTERM when torchrun is gone: one that is killed (SIGKILL, out of memory) ends none
    of its processes, and they would train on, in the way of a restart.

    The signal comes at the end of the thread that started this process: torchrun's main one, which waits for it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))


def _environment(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise InputError(f"environment variable {name}: expected a number as torchrun sets it, got {value!r}")
    return int(value)


@contextlib.contextmanager
def _lost_worker() -> Iterator[None]:
    """A collective that fails means that another process is gone: its own message says why, ours says who noticed."""
    try:
        yield
    except RuntimeError as error:
        # gloo puts its source in front and advice behind
        text = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise RunError(f"process {os.environ.get('RANK', 0)} lost contact with the others: {text}") from error
