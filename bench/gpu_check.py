"""Everything that only a GPU can tell, in one run of less than nine minutes: `python -m bench.gpu_check`.

Builds; tests and sanitizes, all beside each other, since most of that is waiting for the host; then measures, one
stage after the other. Each stage is a process of its own under its own time limit, so that a kernel that hangs or
faults costs its stage alone; where the Hopper products fail their tests, the rest goes without them. Ends with one
table: stage, result, seconds, numbers. Logs: <out>/<stage>.log.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from bench.stages import FINE, LEFT_OUT, ROOT, TIME_IS_UP, Runner, Stage, last_line, row

PY = sys.executable
# Each by name as it begins: a log that is cut short then names those that failed, and the one that did not end.
TESTS = [PY, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "cuda"]

# What was built, and whether it loads beside this torch on this GPU: without that no later stage can tell anything.
BUILD_STAGE = "build"
LOADS_STAGE, LOADS = (
    "loads",
    "from widedeep import _load; import torch; i = _load.build_info(); there = torch.cuda.is_available(); "
    "print('torch', torch.__version__, 'built with', i['cuda_version'], i['cuda_archs'], 'cublaslt', i['cublaslt'], "
    "'on', torch.cuda.get_device_name() if there else 'no CUDA device', "
    "'' if _load.has_cuda_kernels else 'kernels not loaded'); raise SystemExit(not (_load.has_cuda_kernels and there))",
)
HOPPER_STAGE, HOPPER = "Hopper layers", "sm90 or hopper or two_routes or one_launch"
# Tests with stages of their own: they take long, are many, wait for another process, compile at first use, or want the
# memory.
OPS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_ops_*.py"))]
MODEL = [f"tests/test_{name}.py" for name in ("autocast", "model", "model_tools", "wide_only", "optim")]
SIZES = "tests/test_cuda_limits.py"
ALONE = ("cuda_linear", "cuda_step", "cuda_fp16", "cuda_nccl", "cuda_ranks", "preprocess_cuda", "xp")
ELSEWHERE = [*OPS, *MODEL, SIZES, *(f"tests/test_{name}.py" for name in ALONE)]

TOOLS = ["memcheck", "racecheck", "initcheck"]
# Small cases of every kernel, by name of a stage: what of which files. The sanitizer makes them some hundred
# times slower.
SANITIZED = {
    "layers": ("129-72-136 and 0.3", "test_cuda_linear.py"),
    "chain": ("small_hopper_chain", "test_cuda_linear.py"),
    "embedding": ("67-small or 67-middle or padding", "test_ops_embedding.py test_wide_only.py"),
    "others": (
        "7-33 or 7-13 or 129-256 or duplicates or check_finite and nan or rmsprop_dense and True-copy or shape1 "
        "or loss_scale_follows or settle or transpose_matches or 333-0-1 or 500-40-33 or 200-5000",
        "test_ops_head.py test_ops_optim.py test_ops_linear.py test_ops_batch.py test_ops_metrics.py "
        "test_ops_loss_scale.py",
    ),
    "step": ("padding_changes_nothing and one-hot", "test_cuda_step.py"),
    "preprocessing": (
        "nulls and (33 or 257) or buckets and 257 or ages and 257 or look_ups and 1000 or taken and float32 "
        "or similarities",
        "test_xp.py",
    ),
}
NOT_SANITIZED = [("racecheck", "layers")]
WHY_NOT_SANITIZED = (
    "the tool stops in the library's products in half types (failed to handle a hardware exception);"
    " `step` shows it our passes over one in float32"
)


def tests(log: str) -> str:
    """The last line of pytest, the first failures, and why tests were skipped. Of a log without that line how many
    passed, and the test that was begun last."""
    ends = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*?)\s*=*$", log, re.M)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.M)[:3]
    results = "PASSED|FAILED|ERROR|SKIPPED"
    if not ends and (begun := re.findall(rf"^(\S+\.py::.*?)(?: ({results})\b.*| *)$", log, re.M)):
        ends = [f"{sum(result == 'PASSED' for _, result in begun)} passed, the last begun: {begun[-1][0]}"]
        failed = [name for name, result in begun if result in ("FAILED", "ERROR")][:3]
    skipped = dict.fromkeys(re.findall(r"^SKIPPED \[\d+\] \S+: (.*)", log, re.M))
    return "; ".join([*ends[-1:], *failed, *(f"skipped: {why}" for why in skipped)])


def sanitized(log: str) -> str:
    """How many cases ran, what the tool sums up, and where most of its findings are."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    places = Counter(re.findall(r"=\s+(?:at|and|Error: Race).* in (\S+:\d+)", log)).most_common(3)
    return "; ".join([tests(log), *summary[-1:], *(f"{place} ({n})" for place, n in places)])


def whole_steps(log: str) -> str:
    """Samples/s of ours, the route it took, where its rows were, the ratio to each peer, and who was left out; as far
    as the bench came."""
    report = json.loads(log[log.rindex('{"bench"') :].splitlines()[0])
    parts = []
    for result in report["results"]:
        ours, *peers = result["contenders"]
        ratios = ", ".join(f"{p['ours_over_this']:.2f} x {p['name']}" for p in peers)
        rate = f"B={result['batch']}: {ours['samples_per_s'] / 1e6:.2f} M/s ({ours['ms_per_step']:.2f} ms)"
        rows = f"rows from {result['rows_from']}"
        memory = f"at most {result['device_GiB']:.1f} GiB" if "device_GiB" in result else ""
        through = f"through {result['gemm']}" if result["gemm"] else ""
        parts.append(" ".join(part for part in (rate, through, rows, memory, ratios) if part))
    return "; ".join([*parts, *(f"{name} left out: {why}" for name, why in report["skipped"].items())])


def whole_job(log: str) -> str:
    """Seconds from raw files to the last evaluation, and what it found."""
    report = json.loads(log[log.index('{"bench"') :].splitlines()[0])
    spent, last = report["seconds"], report["epochs"][-1]
    seconds = f"preprocessing {spent['preprocessing']:.1f} s, training {spent['training']:.1f} s"
    loss, score = (last[name] if last[name] is not None else math.nan for name in ("loss_val", "streaming_map_val"))
    return f"{seconds}: loss {loss:.4f}, MAP@12 {score:.4f}"


def rates(log: str) -> str:
    """How many ops were timed, and what each took (`bench/conftest.py`); as far as the bench came."""
    table = re.findall(r"^\S+\.py::.* [\d.,]+ us\b.*$", log, re.M)
    ended = tests(log) if re.search(r"^=*\s*\d+ (?:passed|failed|error)", log, re.M) else f"{len(table)} measured"
    return "\n".join([ended, *(f"    {line.rstrip()}" for line in table)])


def kernels(log: str) -> str:
    report = json.loads(log[log.index('{"device"') :].splitlines()[0])
    lines = [f"copy {report['copy_TB/s']:.2f} TB/s, product {report['product_TFLOP/s']:.0f} TFLOP/s"]
    names = 2 + max(len(k["name"]) for k in report["kernels"])
    for k in report["kernels"]:
        target = f" / {k['target']:.2f}" if k["target"] else ""
        lines.append(f"    {k['name']:{names}}{k['ms']:.3f}{target} ms, {100 * k['fraction']:.0f} % of {k['ceiling']}")
    lines.append(f"    sum of a step's kernels {report['sum_of_kernels_ms']:.2f} ms, layers by {report['route']}")
    return "\n".join(lines)


def bench(what: str, *options: str) -> list[str]:
    return [PY, "-m", f"bench.{what}", "--device", "cuda", "--json", "--rounds", "3", *options]


def sanitizer(tool: str, cases: str) -> list[str]:
    places = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places)) or "compute-sanitizer"
    chosen, files = SANITIZED[cases]
    # initcheck wants to see who wrote what our kernels read; the others look at ours alone. Those of preprocessing,
    # compiled when they are used, have plain names.
    ours = [] if tool == "initcheck" or cases == "preprocessing" else ["--kernel-name", "kns=widedeep"]
    place = TOOLS.index(tool) * len(SANITIZED) + list(SANITIZED).index(cases)
    port = 49152 + 16 * place  # of its own: they run at once, and each takes some from there on
    options = [f"--tool={tool}", "--error-exitcode=9", f"--port={port}", "--target-processes=application-only"]
    options += ["--print-limit=40", "--num-callers-host=8", *ours]
    # Without its cache of memory torch gives every tensor an allocation of its own, whose ends the sanitizer knows.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, *options, *TESTS, "-k", chosen]
    return command + [f"tests/{name}" for name in files.split()]


def stages() -> list[Stage]:
    """The most telling first, in case the time is up before the last."""
    build = [PY, "setup.py", "-q", "egg_info", "build_ext", "--inplace"]  # neither a network nor a right to install
    fp16, tf32 = ["--precision", "fp16"], ["--precision", "tf32"]
    both, fewer = ["--batch", "131072", "16384"], ["--rounds", "2"]
    host = ["--batch", "131072", "--data", "pinned", "stream"]
    predicts = "torch-reduce-overhead-dense"
    trained = f"torch,torch-compile-dense,{predicts},own-loop"
    large = ["--batch", "131072", *fewer]
    families = [PY, "-m", "pytest", "-q", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("bench/bench_*.py")))]
    job = ["--displays", "20000", "--epochs", "2", "--batch", "16384", "--device", "cuda", "--json", *fp16]
    rest = ["tests", *(f"--ignore={path}" for path in ELSEWHERE)]
    linear = "tests/test_cuda_linear.py"
    beside = {
        "layers": [*TESTS, "-k", f"not ({HOPPER})", linear],
        HOPPER_STAGE: [*TESTS, "-k", HOPPER, linear],
        "step": [*TESTS, "tests/test_cuda_step.py", "tests/test_cuda_fp16.py"],
        "ops": [*TESTS, *OPS],
        "model": [*TESTS, *MODEL],
        "rest": [*TESTS, *rest],
        "preprocessing": [*TESTS, "tests/test_xp.py", "tests/test_preprocess_cuda.py"],
        "nccl": [*TESTS, "tests/test_cuda_nccl.py"],
        "ranks": [*TESTS, "-k", "test_steps", "tests/test_cuda_ranks.py"],
        "runs of ranks": [*TESTS, "-k", "not test_steps", "tests/test_cuda_ranks.py"],
    }
    cases = [pair for pair in itertools.product(TOOLS, SANITIZED) if pair not in NOT_SANITIZED]
    sanitizers = {" ".join(pair): sanitizer(*pair) for pair in cases}
    return [
        # Without these two nothing else runs: there is nothing to save time for. The second reads all of torch from a
        # disk that may be cold.
        Stage(BUILD_STAGE, build, math.inf, last_line),
        Stage(LOADS_STAGE, [PY, "-c", LOADS], math.inf, last_line),
        *(Stage(name, command, 150, tests, beside=True) for name, command in beside.items()),
        *(Stage(name, command, 150, sanitized, beside=True) for name, command in sanitizers.items()),
        Stage("kernels", [PY, "-m", "bench.budget", "--json"], 60, kernels),
        Stage("training fp16", bench("train", *fp16, *both, "--peers", "jax"), 90, whole_steps),
        Stage("training from the host", bench("train", *fp16, *host, "--peers", "none"), 70, whole_steps),
        Stage("inference fp16", bench("infer", *fp16, *both, "4096", "--peers", "jax", *fewer), 70, whole_steps),
        Stage("training tf32", bench("train", *tf32, "--batch", "131072", "--peers", "none"), 45, whole_steps),
        Stage("sizes", [*TESTS, SIZES], 40, tests),  # up to 60 GiB, which beside others might not be free
        Stage("registers", [PY, "cmake/ptxas_report.py", "build"], 10, last_line),
        Stage("doctor", [PY, "-m", "widedeep", "doctor"], 30, last_line),
        Stage("timeline", [PY, "-m", "bench.timeline", "train"], 40, last_line),
        Stage("end to end", [PY, "-m", "bench.end_to_end", *job], 60, whole_job),
        Stage("training beside torch", bench("train", *fp16, *large, "--peers", trained), 100, whole_steps),
        Stage("inference beside torch", bench("infer", *fp16, *large, "--peers", predicts), 50, whole_steps),
        Stage("op families", [*families, "-k", "cuda", "--benchmark-columns=median"], 90, rates),
    ]


def summary(rows: list[dict]) -> str:
    lines = [f"{'stage':24}{'result':>14}{'seconds':>9}  numbers"]
    lines += [f"{r['stage']:24}{r['result']:>14}{r['seconds']:9.1f}  {r['numbers']}" for r in rows]
    return "\n".join(lines)


def chosen(words: list[str] | None) -> list[Stage]:
    """The stages whose names begin with one of the words.

    Raises:
        SystemExit: none begins with one of them.
    """
    every = stages()
    if unknown := [word for word in words or () if not any(stage.name.startswith(word) for stage in every)]:
        sys.exit(f"--only: expected first words of {', '.join(s.name for s in every)}, got {', '.join(unknown)}")
    return [stage for stage in every if is_named(stage.name, words)]


def is_named(stage: str, words: list[str] | None) -> bool:
    return not words or any(stage.startswith(word) for word in words)


def trusted(result: str, log: Path) -> bool:
    """Whether benches may take the Hopper products, by their tests. That the time was up before the last of these says
    nothing against them.
    """
    late = result == TIME_IS_UP and not re.search(r" (FAILED|ERROR)\b", log.read_text(errors="replace"))
    return result == "ok" or late


def check(wanted: list[Stage], run: Runner) -> None:
    for _, group in itertools.groupby(wanted, key=lambda stage: stage.beside or stage.name):
        told = {each["stage"]: each["result"] for each in run.run(list(group))}
        if HOPPER_STAGE in told and not trusted(told[HOPPER_STAGE], run.log(HOPPER_STAGE)):
            os.environ["WIDEDEEP_SM90"] = "0"
            print("the rest goes without the Hopper products", file=sys.stderr, flush=True)
        if any(told.get(name, "ok") != "ok" for name in (BUILD_STAGE, LOADS_STAGE)):
            # Nothing, or what an earlier build has left: not what is to be checked.
            run.add([row(stage.name, "not run") for stage in wanted[len(run.rows) :]])
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="where logs and summary.json go")
    parser.add_argument("--seconds", type=int, default=530, help="for all stages together")
    parser.add_argument("--only", nargs="+", help="first words of the stages to run, each in all the time left")
    args = parser.parse_args()
    wanted, run = chosen(args.only), Runner(args.out, args.seconds, unlimited=bool(args.only))
    # KeyboardInterrupt, as for Ctrl-C. SIGINT itself is ignored in what a script has started in the background.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check(wanted, run)
        not_sanitized = filter(lambda name: is_named(name, args.only), map(" ".join, NOT_SANITIZED))
        run.add([row(name, LEFT_OUT, WHY_NOT_SANITIZED) for name in not_sanitized])
    except KeyboardInterrupt:
        return 130
    finally:
        print(summary(run.rows))
    return int(any(each["result"] not in FINE for each in run.rows))


if __name__ == "__main__":
    sys.exit(main())
