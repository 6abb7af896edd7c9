"""Ranks as threads of the test's process."""

import threading

import torch

from widedeep.dist import LocalComm


class ThreadComm(LocalComm):
    """Ranks as threads of this process."""

    def __init__(self, rank, world, shared, barrier):
        super().__init__("cpu")
        self.rank, self.world, self._shared, self._barrier = rank, world, shared, barrier

    def _exchange(self, tensor):
        self._shared[self.rank] = tensor.clone()
        self._barrier.wait()
        parts = [self._shared[r].clone() for r in range(self.world)]
        self._barrier.wait()
        return parts

    def all_reduce_(self, tensor):
        return tensor.copy_(sum(self._exchange(tensor)))

    def all_gather_rows(self, tensor, lengths=None):
        assert lengths is None or lengths[self.rank] == len(tensor)
        return torch.cat(self._exchange(tensor))

    def all_to_all_rows(self, tensor, sent, received):
        tensors, counts = self._exchange(tensor), self._exchange(torch.tensor(sent, device="cpu"))
        parts = [t.split(n.tolist())[self.rank] for t, n in zip(tensors, counts)]
        assert [len(part) for part in parts] == list(received)
        return torch.cat(parts)


def in_ranks(world, work):
    """Runs work(comm) in `world` threads; the results in the order of ranks."""
    shared, results, errors, barrier = [None] * world, [None] * world, [], threading.Barrier(world, timeout=60)

    def run(rank):
        try:
            results[rank] = work(ThreadComm(rank, world, shared, barrier))
        except BaseException as e:
            errors.append(e)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results
