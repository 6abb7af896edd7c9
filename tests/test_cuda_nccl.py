"""NCCL with one process: the captured step beside its watchdog thread, and the step of several ranks; and what becomes
of a process that fails.
"""

import pytest
import torch
from ranks import run_ranks, start_ranks

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


FAILS = """
import torch
from widedeep import run
from widedeep.config import TrainConfig
from widedeep.errors import InputError

def action(config, comm):
    total = comm.all_reduce_(torch.ones(1 << 20, device=comm.device))
    if comm.rank == 0:
        raise InputError("this process has something to say")
    comm.all_reduce_(total)  # waits for the first process
    torch.cuda.synchronize()

try:
    run.launch(TrainConfig().updated(affinity="disabled"), action)
except InputError as error:
    print(error)
"""


def test_one_process():
    (said,) = run_ranks(1, "-c", PROGRAM, timeout=120)
    assert said.endswith("done\n")  # NCCL may have told its version before


def test_a_process_that_fails_says_so_and_ends_whoever_waits_for_it():
    first, *others = start_ranks(min(2, torch.cuda.device_count()), "-c", FAILS)
    try:
        said, errors = first.communicate(timeout=90)
        assert first.returncode == 0, errors
        assert said.endswith("this process has something to say\n"), said  # NCCL may have told its version before
        assert all(process.poll() is None for process in others)
    finally:
        for process in (first, *others):
            process.kill()
