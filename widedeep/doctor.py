"""`widedeep doctor`: what is installed, what was built, what is missing and what to do about it."""

import importlib.metadata as metadata
import json as jsonlib
import platform
import shutil
import sys
from typing import Any

REQUIRED = ("torch", "numpy", "pyarrow", "pyyaml", "jsonargparse", "rich", "safetensors", "xxhash", "psutil")
# distribution -> (what it serves, how to get it)
OPTIONAL = {
    "matplotlib": ("plots of `widedeep report`", "pip install 'widedeep[report]'"),
    "onnxscript": ("`widedeep export` to onnx and triton", "pip install 'widedeep[onnx]'"),
    "onnxruntime": ("the comparison that ends `widedeep export` to onnx and triton", "pip install 'widedeep[onnx]'"),
    "tensorboard": ("`--tensorboard`", "pip install 'widedeep[tensorboard]'"),
    "distributed": ("`--engine dask`", "pip install 'widedeep[dask]'"),
    "cupy-cuda13x": ("preprocessing on a GPU", "pip install 'widedeep[gpu]'"),
    "nvidia-ml-py": ("CPU cores near each GPU (`--affinity`)", "pip install 'widedeep[gpu]'"),
}
FOR_GPUS = ("cupy-cuda13x", "nvidia-ml-py")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _cupy() -> str | None:
    """What stops cupy from compiling kernels on a GPU; None if nothing does."""
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # each layer below has kinds of its own
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _advice(facts: dict) -> list[str]:
    """One sentence for each thing that is missing and can be mended."""
    advice = [f"{name} is not installed: pip install {name}" for name, found in facts["required"].items() if not found]
    build, devices = facts["build"], facts["devices"]
    if "error" in build:
        return [*advice, "the compiled part does not load: pip install -e . builds it again"]
    if devices and not facts["cuda_kernels"]:
        reason = build["cuda_note"] or "this torch is a CPU build, or libwidedeep_cuda.so was built for another torch"
        advice.append(f"a GPU is present but the CUDA kernels are not in use: {reason}")
    if devices and facts["cuda_kernels"]:
        names = [arch.split("-")[0] for arch in build["cuda_archs"].split(",")]
        built = [int(name.rstrip("af")) for name in names if name[:1].isdigit()]  # CMake takes words too: native, all
        for device in devices:
            if int(device["capability"].replace(".", "")) < min(built, default=0):
                advice.append(
                    f"{device['name']} has capability {device['capability']}, below every architecture built "
                    f"({build['cuda_archs']}): install again with "
                    "WIDEDEEP_CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=<yours>"
                )
    if build["cuda_archs"] and not build["cublaslt"]:
        advice.append("the CUDA build lacks cuBLASLt: pip install 'widedeep[cuda13]', then pip install -e . again")
    for name, (serves, remedy) in OPTIONAL.items():
        if facts["optional"][name] is None and (devices or name not in FOR_GPUS):
            advice.append(f"{name} is not installed, which {serves} need: {remedy}")
    if fault := facts.get("cupy_fault"):
        advice.append(f"cupy is installed but preprocessing cannot use it ({fault}): pip install 'widedeep[gpu]'")
    return advice


def diagnose() -> dict:
    """Everything `widedeep doctor` knows, ready for JSON."""
    facts: dict[str, Any] = {
        "widedeep": _version("widedeep"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "required": {name: _version(name) for name in REQUIRED},
        "optional": {name: _version(name) for name in OPTIONAL},
        "nvcc": shutil.which("nvcc"),
        "devices": _devices() if _version("torch") else [],
    }
    if facts["devices"] and facts["optional"]["cupy-cuda13x"]:
        facts["cupy_fault"] = _cupy()
    try:
        from widedeep import _load

        facts |= {"build": _load.build_info(), "cuda_kernels": _load.has_cuda_kernels}
        facts["bf16"] = _load.bf16_products()
    except (ImportError, OSError) as error:
        facts |= {"build": {"error": str(error).splitlines()[0]}, "cuda_kernels": False}
    facts["advice"] = _advice(facts)
    facts["healthy"] = all(facts["required"].values()) and "error" not in facts["build"]
    return facts


def _print(facts: dict) -> None:
    """In plain text: rich may be what is missing."""
    rows = [("widedeep", f"{facts['widedeep']} on Python {facts['python']}, {facts['platform']}")]
    rows.append(("packages", ", ".join(f"{name} {found or 'MISSING'}" for name, found in facts["required"].items())))
    present = [f"{name} {found}" for name, found in facts["optional"].items() if found]
    rows.append(("extras", ", ".join(present) or "none"))
    build = facts["build"]
    if "error" in build:
        rows.append(("compiled part", f"does not load: {build['error']}"))
    else:
        rows.append(("CPU kernels", f"{build['compiler']}, -march={build['cpu_arch']}, {build['cpu_gemm']}"))
        rows.append(("bf16 on CPU", facts["bf16"]))
        cuda = f"CUDA {build['cuda_version']} for {build['cuda_archs']}" if build["cuda_archs"] else "not built"
        if build["cuda_archs"]:
            cuda += ", cuBLASLt" if build["cublaslt"] else ", without cuBLASLt"
            cuda += ", loaded" if facts["cuda_kernels"] else ", not loaded: this torch is a CPU build"
        rows.append(("CUDA kernels", cuda + (f": {build['cuda_note']}" if build["cuda_note"] else "")))
    for device in facts["devices"]:
        rows.append(("GPU", f"{device['name']}, capability {device['capability']}, {device['memory_gib']} GiB"))
    if not facts["devices"]:
        rows.append(("GPU", "none found: training runs on the CPU"))
    for name, value in rows:
        print(f"{name:<14}{value}")
    for line in facts["advice"]:
        print(f"- {line}")


def run(json: bool) -> int:
    """Prints the diagnosis; returns 0 when everything required is there, else 1."""
    facts = diagnose()
    if json:
        jsonlib.dump(facts, sys.stdout, indent=2)
        print()
    else:
        _print(facts)
    return 0 if facts["healthy"] else 1
