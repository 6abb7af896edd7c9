"""How processes with GPUs take one each, join the others and leave them, with stand-ins for both; on any machine."""

import threading
from types import SimpleNamespace

import pytest
import torch

from widedeep import dist
from widedeep.dist import LocalComm
from widedeep.errors import InputError


@pytest.mark.parametrize(("local_rank", "gpus"), [(None, 1), ("0", 4), ("3", 4), ("4", 4), ("first", 4)])
def test_each_process_has_a_gpu_of_its_own(local_rank, gpus, monkeypatch):
    """Which is the current one when it joins the others."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(dist, "GroupComm", LocalComm)
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value) if local_rank else monkeypatch.delenv(name, raising=False)
    assert dist.choose_device(cpu=True) == torch.device("cpu")
    if local_rank == "4":
        with pytest.raises(
            InputError, match=r"number 4 on this machine, which has 4 GPUs: expected at most one process"
        ):
            dist.choose_device(cpu=False)
        return
    if local_rank == "first":
        with pytest.raises(InputError, match="LOCAL_RANK: expected a number as torchrun sets it, got 'first'"):
            dist.choose_device(cpu=False)
        return
    device = dist.choose_device(cpu=False)
    assert device == torch.device("cuda", int(local_rank or 0))
    assert dist.connect(device).device == device
    assert current == [device]


@pytest.fixture
def group(monkeypatch):
    """Nobody joins: what torch.distributed would be asked, by name of the function."""
    asked, leaving = {}, threading.Event()
    monkeypatch.setattr(group := torch.distributed, "rendezvous", lambda *_, **__: iter([(group.HashStore(), 0, 1)]))
    monkeypatch.setattr(
        group, "init_process_group", lambda backend, **settings: asked.update(settings, backend=backend)
    )
    monkeypatch.setattr(group, "get_backend", lambda: asked["backend"])
    monkeypatch.setattr(group, "destroy_process_group", lambda: asked.update(left="together"))
    never_ends = SimpleNamespace(abort=lambda: asked.update(left="alone") or leaving.wait(60))
    monkeypatch.setattr(group, "group", SimpleNamespace(WORLD=never_ends))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield asked
    leaving.set()


@pytest.mark.parametrize(("device", "backend", "left"), [("cuda:3", "nccl", "alone"), ("cpu", "gloo", "together")])
def test_gpus_are_joined_by_nccl_each_process_with_its_own(device, backend, left, group, monkeypatch):
    """And left at once after a failure: NCCL would wait for the others, so not for longer than a while."""
    monkeypatch.setattr(dist, "LEAVE", 0.1)
    comm = dist.GroupComm(torch.device(device))
    assert (group["backend"], group["timeout"]) == (backend, dist.TIMEOUT)
    assert group["device_id"] == (comm.device if backend == "nccl" else None)
    leaves = threading.Thread(target=comm.abort, daemon=True)
    leaves.start()
    leaves.join(30)
    assert not leaves.is_alive()
    assert group["left"] == left


@pytest.mark.parametrize(("device", "waits"), [("cuda:3", 1), ("cpu", 0)])
def test_who_passes_a_barrier_has_waited_for_its_gpu(device, waits, group, monkeypatch):
    """Where a collective is only queued."""
    done, zeros = [], torch.zeros
    comm = dist.GroupComm(torch.device(device))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: done.append("all"))
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    comm.barrier()
    assert done == ["all", *[comm.device] * waits]
