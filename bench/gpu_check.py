"""Everything that only a GPU can tell, in one run of less than nine minutes: `python -m bench.gpu_check`.

Builds, tests, measures and sanitizes, each stage in a process of its own under its own time limit, so that a kernel
that hangs or faults costs its stage alone; where the Hopper products fail their tests, the rest goes without them.
Ends with one table: stage, result, seconds, numbers. Logs: <out>/<stage>.log.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PY = sys.executable
TESTS = [PY, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
SANITIZED = "test_cuda_linear.py test_cuda_step.py test_ops_embedding.py test_ops_head.py test_ops_optim.py"
# Small cases of a step's kernels; the sanitizer makes them some hundred times slower.
SMALL = (
    "(129-72-136 and 0.3 or 67-small or 7-33 or duplicates or padding or one_launch and 777 and False) and not golden"
)

# What was built, and whether it loads beside this torch on this GPU: without that no later stage can tell anything.
LOADS_STAGE, LOADS = (
    "loads",
    "from widedeep import _load; import torch; i = _load.build_info(); there = torch.cuda.is_available(); "
    "print('torch', torch.__version__, 'built with', i['cuda_version'], i['cuda_archs'], 'cublaslt', i['cublaslt'], "
    "'on', torch.cuda.get_device_name() if there else 'no CUDA device', "
    "'' if _load.has_cuda_kernels else 'kernels not loaded'); raise SystemExit(not (_load.has_cuda_kernels and there))",
)
HOPPER_STAGE, HOPPER = "Hopper layers", "sm90 or hopper or two_routes or one_launch"
# Tests with stages of their own: they take long, wait for another process, or compile at first use.
ELSEWHERE = "test_cuda_linear.py test_cuda_step.py test_cuda_nccl.py test_preprocess_cuda.py test_xp.py"


class Stage(NamedTuple):
    name: str
    command: list[str]
    limit: int  # seconds
    numbers: Callable[[str], str]


def tests(log: str) -> str:
    """The last line of pytest, and the first failures."""
    ends = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*?)=*$", log, re.M)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.M)[:3]
    return "; ".join([*ends[-1:], *failed])


def sanitized(log: str) -> str:
    return (
        "; ".join(re.findall(r"ERROR SUMMARY: (.*)|RACECHECK SUMMARY: (.*)", log)[-1:][0]) if "SUMMARY" in log else ""
    )


def whole_steps(log: str) -> str:
    """Samples/s of ours, and the ratio to each peer."""
    report = json.loads(log[log.index('{"bench"') :].splitlines()[0])
    parts = []
    for result in report["results"]:
        ours, *peers = result["contenders"]
        ratios = ", ".join(f"{p['ours_over_this']:.2f} x {p['name']}" for p in peers)
        rate = f"B={result['batch']}: {ours['samples_per_s'] / 1e6:.2f} M/s ({ours['ms_per_step']:.2f} ms)"
        memory = f"at most {result['device_GiB']:.1f} GiB" if "device_GiB" in result else ""
        parts.append(" ".join(part for part in (rate, memory, ratios) if part))
    return "; ".join(parts)


def whole_job(log: str) -> str:
    """Seconds from raw files to the last evaluation, and what it found."""
    report = json.loads(log[log.index('{"bench"') :].splitlines()[0])
    spent, last = report["seconds"], report["epochs"][-1]
    seconds = f"preprocessing {spent['preprocessing']:.1f} s, training {spent['training']:.1f} s"
    return f"{seconds}: loss {last['loss_val']:.4f}, MAP@12 {last['streaming_map_val']:.4f}"


def kernels(log: str) -> str:
    report = json.loads(log[log.index('{"device"') :].splitlines()[0])
    lines = [f"copy {report['copy_TB/s']:.2f} TB/s, product {report['product_TFLOP/s']:.0f} TFLOP/s"]
    for k in report["kernels"]:
        target = f" / {k['target']:.2f}" if k["target"] else ""
        lines.append(f"    {k['name']:28}{k['ms']:.3f}{target} ms, {100 * k['fraction']:.0f} % of {k['ceiling']}")
    lines.append(f"    sum of a step's kernels {report['sum_of_kernels_ms']:.2f} ms, layers by {report['route']}")
    return "\n".join(lines)


def last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def bench(what: str, *options: str) -> list[str]:
    return [PY, "-m", f"bench.{what}", "--device", "cuda", "--json", "--rounds", "3", *options]


def sanitizer(tool: str) -> list[str]:
    files = [f"tests/{name}" for name in SANITIZED.split()]
    places = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places)) or "compute-sanitizer"
    # Without its cache of memory torch gives every tensor an allocation of its own, whose ends the sanitizer knows.
    return [
        "env",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        program,
        f"--tool={tool}",
        "--error-exitcode=9",
        *TESTS,
        "-x",
        "-k",
        SMALL,
        *files,
    ]


def stages() -> list[Stage]:
    """The most telling first, in case the time is up before the last."""
    build = [
        PY,
        "setup.py",
        "-q",
        "egg_info",
        "build_ext",
        "--inplace",
    ]  # needs neither a network nor a right to install
    fp16, tf32 = ["--precision", "fp16"], ["--precision", "tf32"]
    large, both = ["--batch", "131072"], ["--batch", "131072", "16384"]
    alone = ["--peers", "none"]
    job = ["--displays", "20000", "--epochs", "2", "--batch", "16384", "--device", "cuda", "--json", *fp16]
    return [
        Stage("build", build, 170, last_line),
        Stage(LOADS_STAGE, [PY, "-c", LOADS], 30, last_line),
        Stage("layers", [*TESTS, "-k", f"not ({HOPPER})", "tests/test_cuda_linear.py"], 60, tests),
        Stage(HOPPER_STAGE, [*TESTS, "-k", HOPPER, "tests/test_cuda_linear.py"], 45, tests),
        Stage("step", [*TESTS, "tests/test_cuda_step.py"], 90, tests),
        Stage("kernels", [PY, "-m", "bench.budget", "--json"], 60, kernels),
        Stage("timeline", [PY, "-m", "bench.timeline", "train"], 40, last_line),
        Stage("training fp16", bench("train", *fp16, *both, *alone), 60, whole_steps),
        Stage("inference fp16", bench("infer", *fp16, *both, "4096", *alone), 45, whole_steps),
        Stage("end to end", [PY, "-m", "bench.end_to_end", *job], 60, whole_job),
        Stage("ops", [*TESTS, "tests", *(f"--ignore=tests/{name}" for name in ELSEWHERE.split())], 90, tests),
        Stage("preprocessing", [*TESTS, "tests/test_xp.py", "tests/test_preprocess_cuda.py"], 60, tests),
        Stage("nccl", [*TESTS, "tests/test_cuda_nccl.py"], 40, tests),
        Stage("memcheck", sanitizer("memcheck"), 60, sanitized),
        Stage("racecheck", sanitizer("racecheck"), 60, sanitized),
        Stage("initcheck", sanitizer("initcheck"), 60, sanitized),
        Stage(
            "training beside peers",
            bench("train", *fp16, *large, "--peers", "torch-reduce-overhead,jax"),
            90,
            whole_steps,
        ),
        Stage("training tf32", bench("train", *tf32, *large, *alone), 40, whole_steps),
        Stage("registers", [PY, "cmake/ptxas_report.py", "build"], 10, last_line),
    ]


def run(stage: Stage, limit: float, log: Path) -> tuple[str, float]:
    """(result in words, seconds). All that the stage started ends with it. Tests of which none passed are not ok."""
    start = time.monotonic()
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            out.write(str(error))
            return "not there", time.monotonic() - start
        try:
            code = process.wait(limit)
            result = "ok" if code == 0 else f"failed ({code})"
            if code == 0 and "pytest" in stage.command and not re.search(r"\b\d+ passed\b", log.read_text()):
                result = "none ran"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = "time is up"
    return result, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="where logs and summary.json go")
    parser.add_argument("--seconds", type=int, default=520, help="for all stages together")
    parser.add_argument("--only", nargs="+", help="names of the stages to run, each in all the time left")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, rows, loads = time.monotonic() + args.seconds, [], True
    for stage in stages():
        if args.only and stage.name not in args.only:
            continue
        left = end - time.monotonic()
        log = args.out / f"{stage.name.replace(' ', '-')}.log"
        if left < 5 or not loads:
            rows.append(
                {"stage": stage.name, "result": "no time left" if loads else "not run", "seconds": 0.0, "numbers": ""}
            )
            continue
        result, seconds = run(stage, left if args.only else min(stage.limit, left), log)
        if stage.name == HOPPER_STAGE and result != "ok":
            os.environ["WIDEDEEP_SM90"] = "0"
        loads &= stage.name != LOADS_STAGE or result == "ok"
        text = log.read_text(errors="replace")
        try:
            numbers = stage.numbers(text) if result == "ok" or stage.numbers is tests else last_line(text)
        except (ValueError, KeyError, IndexError):
            numbers = last_line(text)
        rows.append({"stage": stage.name, "result": result, "seconds": round(seconds, 1), "numbers": numbers})
        print(f"{stage.name}: {result}, {seconds:.0f} s", file=sys.stderr, flush=True)
    (args.out / "summary.json").write_text(json.dumps(rows, indent=1))
    print(f"{'stage':24}{'result':>14}{'seconds':>9}  numbers")
    for row in rows:
        print(f"{row['stage']:24}{row['result']:>14}{row['seconds']:9.1f}  {row['numbers']}")
    return int(any(row["result"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
