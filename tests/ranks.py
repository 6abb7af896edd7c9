"""Starts the processes of a distributed run for a test, as torchrun does, and collects what they say."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment() -> dict[str, str]:
    """Ours, with this checkout's packages, whatever is installed, and one thread a process."""
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def start_ranks(world: int, *arguments: object) -> list[subprocess.Popen]:
    """Starts `python *arguments` as `world` processes on this machine."""
    env = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]


def run_ranks(world: int, *arguments: object, timeout: float = 240) -> list[str]:
    """Runs `python *arguments` as `world` processes on this machine; returns each one's stdout, by rank.

    Raises:
        AssertionError: one failed, or not all have ended in time; with what each has said to stderr.
    """
    processes, end, results, late = start_ranks(world, *arguments), time.monotonic() + timeout, [], ""
    try:
        for process in processes:
            results.append(process.communicate(timeout=max(0.0, end - time.monotonic())))
    except subprocess.TimeoutExpired:
        late = f"not done after {timeout} seconds\n"
    finally:
        for process in processes:
            process.kill()
    results += [process.communicate() for process in processes[len(results) :]]
    ended = [(rank, process.returncode, err) for rank, (process, (_, err)) in enumerate(zip(processes, results))]
    failed = [f"rank {rank} ended with {code}:\n{err}" for rank, code, err in ended if code]
    assert not failed, late + "\n".join(failed)
    return [out for out, _ in results]
