"""Collectives of several gloo processes, and whole runs of 2 and 3 processes against one."""

import json

import torch

from ranks import run_ranks
from widedeep.dist import LocalComm

COLLECTIVES = """
import json, torch
from widedeep.dist import choose_device, connect
comm = connect(choose_device(cpu=True))
total = comm.all_reduce_(torch.full((3,), float(comm.rank + 1)))
mine = torch.arange(comm.rank * 2, dtype=torch.int64).view(-1, 2) + 100 * comm.rank   # rank rows of two: none on rank 0
comm.barrier()
print(json.dumps([comm.rank, comm.world, total.tolist(), comm.all_gather_rows(mine).tolist(),
                  comm.all_gather_rows(torch.tensor([comm.rank == 1])).tolist()]))
comm.close()
"""


def test_collectives_of_three_processes():
    answers = [json.loads(out) for out in run_ranks(3, "-c", COLLECTIVES)]
    rows = [[100, 101], [200, 201], [202, 203]]
    for rank, answer in enumerate(answers):
        assert answer == [rank, 3, [6.0] * 3, rows, [False, True, False]]


def test_one_process_alone():
    comm = LocalComm("cpu")
    x = torch.rand(3, 2)
    assert comm.all_gather_rows(x) is x
    assert comm.all_reduce_(x) is x
    assert (comm.rank, comm.world) == (0, 1)


def test_a_lost_worker_is_one_sentence(tmp_path):
    script = """
import os, sys
from widedeep.dist import choose_device, connect
from widedeep.errors import RunError
comm = connect(choose_device(cpu=True))
if comm.rank == 1:
    os._exit(0)
try:
    comm.barrier()
except RunError as error:
    print(error)
os._exit(0)
"""
    assert run_ranks(2, "-c", script)[0].startswith("process 0 lost contact with the others")
