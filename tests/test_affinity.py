"""Which cores a process gets, on machines that are described rather than at hand."""

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from widedeep import affinity
from widedeep.affinity import choose, neighbours, node_of, parse_cores
from widedeep.errors import InputError

CORES = [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12]]  # five physical cores of two threads


def test_parse_cores():
    assert parse_cores("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert parse_cores("\n") == set()


@pytest.mark.parametrize(
    ("mode", "want"),
    [
        ("all", [[0, 1, 2, 3, 4, 8, 9, 10, 11, 12]] * 2),
        ("single", [[0], [0]]),
        ("single_unique", [[0], [1]]),
        ("unique_interleaved", [[0, 2, 8, 10], [1, 3, 9, 11]]),
        ("unique_contiguous", [[0, 1, 8, 9], [2, 3, 10, 11]]),
    ],
)
def test_choose(mode, want):
    assert [choose(mode, CORES, index, 2) for index in range(2)] == want


@pytest.mark.parametrize("mode", ["unique_interleaved", "unique_contiguous"])
def test_shares_are_disjoint_and_equal(mode):
    shares = [choose(mode, CORES, index, 3) for index in range(3)]
    assert {len(share) for share in shares} == {2}
    assert len({core for share in shares for core in share}) == 6


def test_more_processes_than_cores_is_an_error():
    with pytest.raises(InputError, match="6 processes share 5 CPU cores"):
        choose("single_unique", CORES, 0, 6)


def test_neighbours_cover_each_place_once():
    dealt = [neighbours(rank, 5, 2) for rank in range(5)]
    assert dealt == [(0, 3), (0, 2), (1, 3), (1, 2), (2, 3)]


def test_node_of_takes_the_node_with_most_cores_in_common():
    assert node_of({2, 3}, [{0, 1, 2}, {3, 2, 4}]) == {2, 3, 4}
    assert node_of({2, 3}, []) == {2, 3}


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A machine of two NUMA nodes of two cores each; the cores that the process has been given."""
    given = [0, 1, 2, 3]

    class Process:
        def cpu_affinity(self, cores=None):
            given[:] = given if cores is None else cores
            return list(given)

    for node, cores in (("node0", "0-1"), ("node1", "2-3")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cores)
    monkeypatch.setattr(affinity, "NODES", tmp_path)
    monkeypatch.setattr(affinity, "CORES", tmp_path / "none")
    monkeypatch.setattr(psutil, "Process", Process)
    return given


def test_fewer_processes_than_nodes_are_left_alone(two_nodes):
    assert "fewer processes (1) than NUMA nodes (2)" in affinity.pin("socket_unique_interleaved", 0, 1, None)
    assert two_nodes == [0, 1, 2, 3]


@pytest.mark.parametrize(("rank", "world", "want"), [(0, 2, [0, 1]), (1, 2, [2, 3]), (2, 3, [1]), (1, 3, [2, 3])])
def test_processes_share_the_nodes(two_nodes, rank, world, want):
    affinity.pin("socket_unique_interleaved", rank, world, None)
    assert two_nodes == want
    assert affinity.allowed() == set(want)
    assert affinity.cores() == len(want)


@pytest.mark.parametrize(
    ("own", "parents", "processes", "want"),
    [(16, 16, 4, 4), (4, 16, 4, 4), (6, 96, 8, 6), (48, 96, 8, 12), (2, 2, 4, 1), (16, 4, 1, 16)],
)
def test_cores_of_the_parent_are_shared_out_once(monkeypatch, own, parents, processes, want):
    """A process that is pinned to its share has it; one that is pinned to a node still shares that."""
    monkeypatch.setattr(affinity, "allowed", lambda process=None: set(range(parents if process else own)))
    assert affinity.share(processes) == want


def test_a_process_alone_has_every_core_that_it_may_use():
    assert affinity.share(1) == affinity.cores()


def test_without_a_word_of_the_parent_cores_are_shared_out(monkeypatch):
    def allowed(process=None):
        if process:
            raise psutil.NoSuchProcess(process.pid)
        return set(range(16))

    monkeypatch.setattr(affinity, "allowed", allowed)
    assert affinity.share(4) == 4


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """NVML that knows what its `cores` says, a set or an error."""
    told = SimpleNamespace(cores=set())

    def cores_of(handle, words):
        if isinstance(told.cores, Exception):
            raise told.cores
        return [sum(1 << core for core in told.cores)]

    stand_in = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCpuAffinity=cores_of)
    stand_in.nvmlDeviceGetHandleByUUID = str
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid="some"))
    return told


def test_a_gpu_draws_its_process_to_its_node(two_nodes, nvml):
    nvml.cores = {3}
    assert affinity.pin("all", 0, 2, gpu=0) == "CPU affinity: all, cores [2, 3]"
    assert two_nodes == [2, 3]


@pytest.mark.parametrize(
    ("cores", "why"),
    [(NVMLError("Not Supported"), "unknown: NVML says Not Supported"), ({8}, "may not use the cores near its GPU")],
)
def test_cores_that_nvml_cannot_give_go_by_rank_and_that_is_said(two_nodes, nvml, cores, why):
    nvml.cores = cores
    said = affinity.pin("all", 0, 2, gpu=0)
    assert said.startswith("CPU affinity: all, cores [0, 1]; ")
    assert said.endswith(why)
    assert affinity.pin("all", 0, 1, gpu=0).endswith(why)  # unchanged


def test_without_the_package_of_nvml_cores_go_by_rank_and_that_is_said(two_nodes, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert affinity.pin("all", 1, 2, gpu=0).endswith("unknown without nvidia-ml-py: pip install nvidia-ml-py")
    assert two_nodes == [2, 3]
    assert "nvidia-ml-py" not in affinity.pin("all", 1, 2, gpu=None)
