"""The GPU's steps of several ranks, in processes of their own: on one GPU, where what they exchange goes through host
memory; with a GPU each through NCCL; and without a GPU, where the same code runs one op after the other.
"""

import pytest
import torch
from planted import planted_data
from ranks import run_ranks
from test_dist import FLAGS, assert_as_alone, whole_run

STEPS = """
import os, sys, torch
from host_comm import HostComm
from test_cuda_step import EVEN, HIDDEN, gpu_step
from test_sharded import whole
from test_step import LR, assert_same, batch_of, part_of
from widedeep.dist import GroupComm, connect
from widedeep.model import WideDeep
from widedeep.ops import linear_sm90
from widedeep.share import Share, is_table
from widedeep.step import StepConfig
from widedeep.steps.cuda_ranks import RanksCudaStep
from widedeep.steps.sharded import ShardedCudaStep

device = torch.device(sys.argv[1])
if sys.argv[2] == "a GPU each":
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    comm = connect(device)
    assert type(comm) is GroupComm
else:
    comm = HostComm(device)
hopper = device.type == "cuda" and linear_sm90.available(device)
for precision, rtol, atol in (("fp32", 1e-3, 2e-5), ("fp16", 2e-2, 5e-3)):
    # One route for all: what is the fastest is another question, and another number of rows another answer.
    config = StepConfig(precision, gemm="sm90" if hopper and precision == "fp16" else "cublaslt")
    alone, ranks = (gpu_step(config=config, device=device, comm=c) for c in (None, comm))
    assert type(ranks) is RanksCudaStep
    shared = WideDeep(EVEN, hidden=HIDDEN, dropout=0.3, seed=11, share=Share(comm.rank, comm.world)).to(device)
    sharded = ShardedCudaStep(shared, config, device, comm)
    for i in range(8):
        rows = 700 - 300 * (i % 3 == 2)
        batch = batch_of(EVEN, rows, seed=i, device=device)
        # Unequal parts; every fourth time the first rank has none.
        cuts = [rows * rank // comm.world for rank in range(comm.world + 1)]
        cuts[1] = 0 if i % 4 == 3 else cuts[1] - 90
        start, stop = cuts[comm.rank : comm.rank + 2]
        mine = part_of(batch, start, stop)
        want = alone.train(batch, i, LR)
        logits = alone.predict(batch)[start:stop]
        for step in (ranks, sharded):
            loss = comm.all_reduce_(step.train(mine, i, LR).reshape(1))[0]
            torch.testing.assert_close(loss, want, rtol=rtol, atol=atol)
            torch.testing.assert_close(step.predict(mine), logits, rtol=rtol, atol=10 * atol)
    arrays = whole(sharded)
    assert_same(alone, ranks, rtol=rtol, atol=atol)
    for name, a in (alone.model.named_arrays() | alone.state()).items() if comm.rank == 0 else ():
        if name not in ("route", "loss_scale", "good_steps"):
            torch.testing.assert_close(arrays[name].to(a.device), a, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)
    for step in (ranks, sharded):  # what all hold has the same bits everywhere
        for name, a in step.model.named_arrays().items():
            if step is ranks or not is_table(name):
                everywhere = comm.all_gather_rows(a.detach().reshape(1, -1))
                assert torch.equal(everywhere, everywhere[:1].expand_as(everywhere)), name
# Of the routes that each finds the fastest for itself all take the first one's.
auto = gpu_step(config=StepConfig("fp16"), device=device, comm=comm)
auto.train(part_of(batch, start, stop), 0, LR)
assert comm.all_gather_rows(auto.state()["route"].reshape(1).to(device)).unique().numel() == 1
comm.barrier()
comm.close()
print("done")
"""


def test_steps_of_processes_that_share_a_device(device):
    assert run_ranks(3, "-c", STEPS, device, "together", timeout=130) == ["done\n"] * 3


@pytest.mark.cuda
def test_steps_of_processes_with_a_gpu_each():
    if (world := torch.cuda.device_count()) < 2:
        pytest.skip("one GPU only")
    assert run_ranks(world, "-c", STEPS, "cuda", "a GPU each") == ["done\n"] * world


def test_runs_of_processes_that_share_a_device(device, tmp_path):
    data = planted_data(tmp_path / "set")
    program = ["tests/host_comm.py", *(flag for flag in FLAGS[2:] if flag != "--cpu" or device == "cpu")]
    alone = whole_run(1, data, tmp_path / "one", "--step", "fused", program=program)
    for place, flags in (("replicated", []), ("sharded", ["--embedding_parallel", "sharded"])):
        assert_as_alone(alone, whole_run(2, data, tmp_path / place, *flags, program=program))
