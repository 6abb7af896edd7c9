"""Pins a process to CPU cores near its GPU, or near one another: the original's choices under both releases' names.

Cores come from NVML for a GPU, else from the NUMA nodes that Linux lists; a machine with one node and no GPU gains
nothing from pinning, and the process says so and stays free.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import psutil

from widedeep.errors import InputError

NODES = Path("/sys/devices/system/node")
CORES = Path("/sys/devices/system/cpu")
SAME_AS = {
    "socket": "all",
    "socket_unique_interleaved": "unique_interleaved",
    "socket_unique_continuous": "unique_contiguous",
}


def pin(mode: str, local_rank: int, local_world: int, gpu: int | None) -> str:
    """Restricts this process (and the threads that it will start) to some cores.

    Args:
        mode: a value of `--affinity`.
        local_rank, local_world: this process among those of the machine.
        gpu: index of its GPU, or None.
    Returns:
        One line saying what was done, and what stops it from going by the GPU.
    Raises:
        InputError: fewer cores than processes.
    """
    mode = SAME_AS.get(mode, mode)
    if mode == "disabled":
        return "CPU affinity: disabled"
    if not hasattr(psutil.Process, "cpu_affinity"):
        return "CPU affinity: unchanged: this system has no way to set it"
    free = allowed()
    nodes = [node & free for node in numa_nodes() if node & free]
    near, unknown = gpu_cores(gpu, free) if gpu is not None else (set(), "")
    if not near and len(nodes) < 2:
        return f"CPU affinity: unchanged: this machine has a single NUMA node{unknown}"
    if not near and local_world < len(nodes):  # pinned to one node each they would leave others idle
        fewer = f"fewer processes ({local_world}) than NUMA nodes ({len(nodes)})"
        return f"CPU affinity: unchanged: {fewer}{unknown}"
    places = [node_of(near, nodes)] if near else nodes
    home = places[local_rank % len(places)]
    # Neighbours are the processes that share this home; with GPUs NVML does not say who they are, so all count.
    share = (local_rank, local_world) if near else neighbours(local_rank, local_world, len(places))
    mine = choose(mode, by_physical_core(home), *share)
    psutil.Process().cpu_affinity(mine)
    return f"CPU affinity: {mode}, cores {mine}{unknown}"


def allowed(process: psutil.Process | None = None) -> set[int]:
    """The logical cores that a process, by default this one, may use; empty where the system does not say."""
    if not hasattr(psutil.Process, "cpu_affinity"):
        return set()
    return set((process or psutil.Process()).cpu_affinity())


def cores() -> int:
    """How many logical cores this process may use: all of the machine where the system does not say."""
    return len(allowed()) or psutil.cpu_count() or 1


def share(processes: int) -> int:
    """How many logical cores are this process's own among `processes` that were started together.

    They share what their parent may use, from which `pin`, or whoever started them, may have given this one its part.
    """
    together = cores()
    with contextlib.suppress(psutil.Error):  # the parent is gone, or not ours to ask
        if parent := psutil.Process().parent():
            together = max(together, len(allowed(parent)))
    return min(cores(), max(1, together // processes))


def choose(mode: str, cores: Sequence[Sequence[int]], index: int, count: int) -> list[int]:
    """The logical cores of process `index` of `count` that share `cores` (a list of hyper-threads each)."""
    if mode == "all":
        mine = list(cores)
    elif mode == "single":
        mine = [cores[0][:1]]
    else:
        if len(cores) < count:
            raise InputError(f"--affinity {mode}: {count} processes share {len(cores)} CPU cores, expected one each")
        size = len(cores) // count
        if mode == "single_unique":
            mine = [cores[index][:1]]
        elif mode == "unique_interleaved":
            mine = list(cores[index : size * count : count])
        else:
            mine = list(cores[index * size : (index + 1) * size])
    return sorted(core for physical in mine for core in physical)


def neighbours(local_rank: int, local_world: int, places: int) -> tuple[int, int]:
    """Position among, and number of, the processes dealt round-robin to the place of `local_rank`."""
    place = local_rank % places
    return local_rank // places, len(range(place, local_world, places))


def parse_cores(text: str) -> set[int]:
    """`0-3,8` as {0, 1, 2, 3, 8}."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def numa_nodes() -> list[set[int]]:
    """Logical cores of each NUMA node; empty where the system lists none."""
    files = sorted(NODES.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:]))
    return [cores for cores in (parse_cores(path.read_text()) for path in files) if cores]


def node_of(near: set[int], nodes: list[set[int]]) -> set[int]:
    """NVML's cores, or the whole node that holds most of them: a container may show NVML fewer."""
    return max(nodes, key=lambda node: len(node & near)) if nodes else near


def by_physical_core(cores: set[int]) -> list[list[int]]:
    """Groups logical cores that are threads of one physical core, in the order of their first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for core in sorted(cores):
        siblings = CORES / f"cpu{core}" / "topology" / "thread_siblings_list"
        key = tuple(sorted(parse_cores(siblings.read_text()))) if siblings.exists() else (core,)
        groups.setdefault(key, []).append(core)
    return list(groups.values())


def gpu_cores(gpu: int, free: set[int]) -> tuple[set[int], str]:
    """Those of the free logical cores that are near a GPU by NVML; if none, the end of a sentence that says why."""
    import torch

    try:
        import pynvml
    except ImportError:
        return set(), "; the cores near the GPU are unknown without nvidia-ml-py: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(gpu).uuid}")
        words = pynvml.nvmlDeviceGetCpuAffinity(handle, (psutil.cpu_count() + 63) // 64)
    except pynvml.NVMLError as error:
        return set(), f"; the cores near the GPU are unknown: NVML says {error}"
    near = free & {64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}
    return near, "" if near else "; this process may not use the cores near its GPU"
