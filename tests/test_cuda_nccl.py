"""NCCL with one process: the captured step beside its watchdog thread, and the step of several ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

PROGRAM = """
import torch
from test_cuda_step import EVEN, gpu_step
from test_step import LR, assert_same, batch_of
from widedeep.dist import GroupComm, connect
from widedeep.step import StepConfig
from widedeep.steps.cuda import CudaStep
from widedeep.steps.cuda_ranks import RanksCudaStep
from widedeep.steps.sharded import ShardedCudaStep

device = torch.device("cuda", 0)
comm = connect(device)
assert isinstance(comm, GroupComm) and comm.world == 1
for precision in ("fp32", "fp16"):
    alone = gpu_step(config=StepConfig(precision), device=device)
    captured = gpu_step(config=StepConfig(precision), device=device, comm=comm)
    ranks = gpu_step(config=StepConfig(precision), device=device)
    ranks = RanksCudaStep(ranks.model, ranks.config, device, comm)
    sharded = gpu_step(config=StepConfig(precision), device=device)
    sharded = ShardedCudaStep(sharded.model, sharded.config, device, comm)
    assert type(captured) is CudaStep
    for i in range(12):
        batch = batch_of(EVEN, 96 - 47 * (i % 3 == 2), seed=i, device=device)
        losses = [step.train(batch, i, LR) for step in (alone, captured, ranks, sharded)]
        comm.all_reduce_(losses[1])  # the watchdog has something to watch while the next shape is captured
        assert torch.equal(losses[1], losses[0]), (precision, i)
        torch.testing.assert_close(losses[2], losses[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(losses[3], losses[0], rtol=1e-3, atol=1e-4)
    assert len(captured.graphs) == 2
    assert_same(alone, captured, rtol=0, atol=0)
    assert_same(alone, ranks, rtol=1e-3, atol=1e-3)
    assert_same(alone, sharded, rtol=1e-3, atol=1e-3)
comm.barrier()
comm.close()
print("done")
"""


def test_one_process():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = Path(__file__).resolve().parent
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")
