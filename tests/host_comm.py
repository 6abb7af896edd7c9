"""Processes that share one GPU, which NCCL refuses: what they exchange goes through host memory and gloo. All else is
as it is with a GPU each.

`python tests/host_comm.py train ...` is the command line of such a process.
"""

import os
import sys

import torch

from widedeep import dist


class HostComm(dist.GroupComm):
    """The processes of `torchrun`, with tensors of any device."""

    def __init__(self, device):
        super().__init__(torch.device("cpu"))
        self.device = device

    def all_reduce_(self, tensor):
        return tensor.copy_(super().all_reduce_(tensor.cpu()))

    def all_gather_rows(self, tensor, lengths=None):
        return super().all_gather_rows(tensor.cpu(), lengths).to(tensor.device)

    def all_to_all_rows(self, tensor, sent, received):
        return super().all_to_all_rows(tensor.cpu(), sent, received).to(tensor.device)


if __name__ == "__main__":
    from widedeep import cli

    dist.GroupComm = HostComm
    os.environ["LOCAL_RANK"] = "0"  # the first GPU, whoever asks
    sys.exit(cli.main(sys.argv[1:]))
