"""`cupy.RawModule` on a machine without a GPU: a source for NVRTC, compiled as C++ and run by the CUDA emulator.

What `emulated` does for the launchers of csrc/kernels, for kernels that Python launches itself: arguments are checked
against the kernel's parameters, because nothing on the way does so on a GPU.
"""

import ctypes
import functools
import re
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from emulated import CACHE, EMULATOR, FLAGS, LINK, PART_FLAGS, PARTS, _compile, _stamp, translate

KERNEL = re.compile(r'extern "C" __global__ void (\w+)\((.*?)\)\s*\{', re.DOTALL)
TYPES = {
    "i64": np.int64, "u64": np.uint64, "u32": np.uint32, "u16": np.uint16, "u8": np.uint8, "int": np.int32,
    "double": np.float64, "float": np.float32,
}  # fmt: skip
_lock = threading.Lock()  # the emulator runs one launch at a time


class Parameter(NamedTuple):
    kind: str  # the C type
    pointer: bool
    written: bool  # what it points to is not const
    name: str


@functools.cache
def parameters(source: str) -> dict[str, list[Parameter]]:
    """By name of the kernel."""
    kernels = {}
    for name, text in KERNEL.findall(source):
        split = [re.fullmatch(r"(const )?(\w+)(\*?)(?: __restrict__)? (\w+)", p.strip()) for p in text.split(",")]
        kernels[name] = [Parameter(p[2], p[3] == "*", p[3] == "*" and not p[1], p[4]) for p in split]
    return kernels


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """The kernels as functions run_<kernel>(arguments, blocks, threads) -> CUDA error."""
    text = translate(source) + "\n#define CALL(name, ...) emulator::Call(#name, dim3(grid), dim3(block))(__VA_ARGS__)\n"
    for name, kernel in parameters(source).items():
        values = [
            f"static_cast<{p.kind}*>(a[{i}])" if p.pointer else f"*static_cast<{p.kind}*>(a[{i}])"
            for i, p in enumerate(kernel)
        ]
        text += f"""
extern "C" int run_{name}(void** a, unsigned grid, unsigned block) {{
  CALL({name}, [=] {{ {name}({", ".join(values)}); }});
  return cudaGetLastError();
}}"""
    sources = {name: (EMULATOR / name).read_text() for name in PARTS}
    sources["raw.cpp"] = '#include "cuda_runtime.h"\n' + text
    headers = [path.read_text() for path in sorted(EMULATOR.glob("*.h"))]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as made:
        folder = Path(made)
        for name, content in sources.items():
            (folder / name).write_text(content)
        objects = _compile(folder, sources, _stamp(FLAGS, PART_FLAGS, headers))
        subprocess.run([*LINK, *objects, "-o", folder / "raw.so"], check=True)
        loaded = ctypes.CDLL(str(folder / "raw.so"))
    loaded.emulator_allocate.restype = ctypes.c_void_p
    loaded.emulator_message.restype = ctypes.c_char_p
    return loaded


def launch(source: str, name: str, blocks: int, threads: int, values: list, seed: int = 0) -> None:
    """values: numpy arrays, which the kernel reads and writes, None for no array, numpy scalars. Threads run in any
    order.

    Raises:
        TypeError: a value has not the type of its parameter, or an array is not contiguous.
        RuntimeError: the kernel failed, or wrote around an array.
    """
    kernel = parameters(source)[name]
    if len(values) != len(kernel):
        raise TypeError(f"{name}: {len(values)} arguments for {len(kernel)} parameters")
    with _lock:
        lib, addresses, copies, kept = library(source), [], [], []
        lib.emulator_seed(ctypes.c_uint64(seed), ctypes.c_int64(132))
        for value, p in zip(values, kernel):
            if value is None and p.pointer:
                addresses.append(None)
                continue
            if isinstance(value, np.ndarray) is not p.pointer or value.dtype != TYPES[p.kind]:
                raise TypeError(f"{name}: {p.name} is {p.kind}{'*' * p.pointer}, got {type(value)} {value.dtype}")
            if p.pointer and not value.flags.c_contiguous:
                raise TypeError(f"{name}: {p.name} is not contiguous")
            if p.pointer:
                memory = lib.emulator_allocate(ctypes.c_size_t(value.nbytes))
                ctypes.memmove(memory, value.ctypes.data, value.nbytes)
                copies.append((memory, value))
                addresses.append(memory)
            else:
                kept.append(np.array(value))
                addresses.append(kept[-1].ctypes.data)
        error = getattr(lib, f"run_{name}")((ctypes.c_void_p * len(addresses))(*addresses), blocks, threads)
        clean = True
        for memory, value in copies:
            ctypes.memmove(value.ctypes.data, memory, value.nbytes)
            clean &= lib.emulator_release(ctypes.c_void_p(memory)) == 0
        if error or not clean:
            raise RuntimeError(f"{name}: {lib.emulator_message().decode() if error else 'a write around an array'}")
