"""The benches on a small model: contenders do the same job, measurements are described, reports hold together."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import budget, ceilings, end_to_end, gpu_check, harness, peers, timeline
from bench.job import Job, write_shards
from bench.ours import WideDeepContender
from widedeep.data import Reader
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.shards import ShardSet

SPEC = FeatureSpec(
    [CategoricalFeature("a", 20, 8), CategoricalFeature("b", 3, 4)],
    [NumericFeature(f"n{i}") for i in range(3)],
    label="y",
)
ROOT = Path(__file__).resolve().parents[1]
B = 256  # every row of both tables occurs, so that it plays no part who decays the mean squares of rows that do not


def job(precision="fp32"):
    model = WideDeep(SPEC, (16, 8), wide_init="uniform", seed=0)
    return Job(SPEC, (16, 8), model.named_arrays(), torch.device("cpu"), precision, dropout=0.0, lr=1e-2)


@pytest.fixture
def batches(tmp_path):
    write_shards(tmp_path / "rows", SPEC, 4 * B)
    return list(Reader(ShardSet.open(tmp_path / "rows"), B, mode="device", spec=SPEC).epoch(0))


COMPILED = [name for name in peers.PEERS if name.startswith(("torch-compile", "torch-reduce-overhead"))]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(pytest.param(n, "fp32", marks=[pytest.mark.slow] if n in COMPILED else []) for n in peers.PEERS),
        ("own-loop", "bf16"),
        ("own-loop", "fp16"),
        ("jax", "bf16"),
        ("jax", "fp16"),
    ],
)
def test_peers_do_the_same_job(name, precision, batches):
    """The same logits before and after some steps, dropout left out."""
    if missing := [module for module in peers.PEERS[name][0] if find_spec(module) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    ours, peer = WideDeepContender(job(), "reference"), peers.make(name, job(precision))
    tolerance = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}[precision]
    before = ours.logits(batches[0])
    np.testing.assert_allclose(peer.logits(batches[0]), before, atol=tolerance)
    for step, batch in enumerate(batches):
        for contender in (ours, peer):
            contender.train(batch, step)
            contender.synchronize()
    after = ours.logits(batches[0])
    assert np.abs(after - before).max() > 1
    np.testing.assert_allclose(peer.logits(batches[0]), after, atol=2 * tolerance)


def test_peers_that_a_device_does_not_have_by_default_are_named():
    for device, names in peers.DEFAULT.items():
        wanted, skipped = peers.chosen("all", device)
        assert {*wanted, *skipped} == {*peers.PEERS}
        assert {n for n, why in skipped.items() if f"--peers {n} measures it" in why} == {*peers.PEERS} - {*names}
    assert peers.chosen("torch-compile-dense", "cpu") == (["torch-compile-dense"], {})
    assert peers.chosen("none", "cpu") == ([], {})


def test_jax_skips_a_step_that_overflows(batches):
    jax = pytest.importorskip("jax")
    peer = peers.make("jax", job("fp16"))
    peer.train(batches[0], 0)
    before = jax.tree.map(np.asarray, (peer.params, peer.slots))
    batches[1].numeric[3, 1] = float("inf")
    peer.train(batches[1], 1)
    params, slots = jax.tree.map(np.asarray, (peer.params, peer.slots))
    assert slots.pop("scale") == before[1].pop("scale") / 2
    assert (slots.pop("good_steps"), before[1].pop("good_steps")) == (0, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, (params, slots), before))


def test_a_measurement_beside_its_ceilings():
    limits = ceilings.Ceilings(copy=2e12, product=7e14)
    info = ceilings.described(1e-3, flops=3.5e11, bytes=1e9, limits=limits)
    assert (info["us"], info["TFLOP/s"], info["GB/s"]) == (1000, 350, 1000)
    assert (info["fraction of product"], info["fraction of copy"]) == (0.5, 0.5)
    assert (info["ceiling TFLOP/s"], info["ceiling GB/s"]) == (700, 2000)
    assert set(ceilings.described(1e-3, 0, 0, limits)) == {"us"}


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "ROWS", {"cpu": 16})
    copy, product = ceilings.ceilings.__wrapped__("cpu", 3)
    assert 1e8 < copy < 1e13
    assert 1e7 < product < 1e15


def test_sustained_rates_are_held_against_sustained_ceilings(monkeypatch):
    """Calls in a row are timed where a kernel is, and where what it is compared with is, and nowhere else."""
    in_a_row = []
    monkeypatch.setattr(ceilings, "in_turn", lambda functions, *_, **__: in_a_row.append(functions[0]()) or [0.5])
    monkeypatch.setattr(ceilings, "ROWS", {"cpu": 16})
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr(budget, "Clock", lambda _, *options: ceilings.Clock("cpu", *options))
    monkeypatch.setattr(budget, "ceilings", lambda _, *options: ceilings.ceilings.__wrapped__("cpu", *options))
    budget.Budget(16, 3, False, False).add("copy", lambda: None, None, bytes=1.0)
    assert in_a_row == []
    report = budget.Budget(16, 3, False, True)
    report.add("copy", lambda: None, None, bytes=1 << 20)
    assert len(in_a_row) == 3
    assert report.limits.copy == 2 * (1 << 20) / 0.5
    assert report.lines[0].fraction == 0.5


def test_the_sum_of_a_steps_kernels_is_by_the_fastest_route():
    ms = {"batch gather": 1, "embedding forward": 2, "embedding update": 4, "head": 8, "layer wgrad": 16}
    ms |= {"layer forward, cublaslt": 100, "layer dgrad, cublaslt": 200, "finiteness of dx": 32}

    def of(**more):
        return budget.predicted_step([budget.Line(name, float(n), None, 0, "") for name, n in (ms | more).items()])

    rest = 1 + 2 + 4 + 8 + 5 * 16
    assert of() == (rest + 5 * 300 + 32, "cublaslt")
    ours = {"layer forward, sm90": 90, "layer dgrad, sm90": 91}
    assert of(**ours) == (rest + 5 * 181, "sm90")
    ours |= {"5 layers forward, sm90": 400, "5 layers dgrad, sm90": 401}
    assert of(**ours) == (rest + 801, "sm90-chain")


def test_kernels_stand_apart_from_their_times():
    lines = [budget.Line(name, 0.448, 2.1, 0.5, "product")._asdict() for name in ("head", "5 layers forward, sm90" * 2)]
    report = {"device": "a GPU", "torch": "2", "commit": "c", "batch": 1, "copy_TB/s": 1.0, "product_TFLOP/s": 1.0}
    report |= {"sum_of_kernels_ms": 6.0, "route": "sm90", "kernels": lines}
    for table in (gpu_check.kernels(json.dumps(report)), budget.text(report)):
        assert len(re.findall(r"\w +0\.448\b", table)) == 2


def test_rates_and_ratios_are_medians_over_rounds(monkeypatch):
    """By a clock in the test's hands. The median of the ratios is not the ratio of the medians, which would be 2."""
    now, rounds = [0.0], {"ours": (1.0, 4.0, 2.0), "peer": (3.0, 4.0, 10.0)}
    # Five steps come before the rounds; what half a second takes has two steps in a measurement.
    left = {name: iter([0.5] * 5 + [each for each in of for _ in range(2)]) for name, of in rounds.items()}

    def action(contender, batch, step):
        now[0] += next(left[contender.name])

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(harness, "endless", lambda *_: count())
    contenders = [SimpleNamespace(name=n, places=None, gemm=None, synchronize=lambda: None) for n in rounds]
    args = SimpleNamespace(device="cpu", steps=0, rounds=3)
    skipped = {}
    result = harness._measure(args, contenders, skipped, SimpleNamespace(global_batch=100, mode="device"), action)
    assert (skipped, [next(steps, None) for steps in left.values()]) == ({}, [None, None])
    rates = {"samples_per_s": 50, "slowest": 25, "fastest": 100, "ms_per_step": 2000}
    theirs = {"samples_per_s": 25, "slowest": 10, "fastest": 100 / 3, "ms_per_step": 4000, "ours_over_this": 3}
    assert result["contenders"] == [{"name": "ours", "steps": 2} | rates, {"name": "peer", "steps": 2} | theirs]
    assert (result["batch"], result["rounds"]) == (100, 3)


def test_whole_steps_are_reported(tmp_path, capsys):
    SPEC.save(tmp_path / "spec.yaml")
    arguments = ["--device", "cpu", "--batch", "64", "32", "--hidden", "16", "--steps", "1", "--rounds", "2"]
    arguments += ["--fspec_file", str(tmp_path / "spec.yaml"), "--peers", "torch", "--json"]
    for module, data in (("train", ["stream"]), ("infer", ["pinned", "constant"])):
        action = __import__(f"bench.{module}", fromlist=["action"]).action
        assert harness.main(module, action, [*arguments, "--data", *data]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [(r["batch"], r["rows_from"]) for r in report["results"]] == list(product([64, 32], data))
        for result in report["results"]:
            ours, peer = result["contenders"]
            assert ours["samples_per_s"] > 0
            assert peer["ours_over_this"] > 0
        assert report["skipped"] == {}
        assert all(f"rows from {each}" in harness.text(report) for each in data)
        assert "ours / this" in harness.text(report)
        assert "device_GiB" not in report["results"][0]
        report["results"][0]["device_GiB"] = 5.625  # as on a GPU
        assert "at most 5.6 GiB" in gpu_check.whole_steps(json.dumps(report))
        assert "5.62 GiB at most" in harness.text(report)


def test_a_run_that_is_cut_short_has_told_what_it_measured(tmp_path, capsys):
    SPEC.save(tmp_path / "spec.yaml")
    arguments = ["--device", "cpu", "--batch", "64", "32", "--hidden", "16", "--steps", "1", "--rounds", "1", "--json"]
    arguments += ["--fspec_file", str(tmp_path / "spec.yaml"), "--peers", "none"]

    def action(contender, batch, step):
        if batch.global_rows == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.main("training", action, arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    told = gpu_check.whole_steps("a log\n" + printed.err)
    assert told.startswith("B=64: ")
    assert "B=32" not in told


def test_a_constant_batch_is_called_one(tmp_path, capsys):
    SPEC.save(tmp_path / "spec.yaml")
    arguments = ["--device", "cpu", "--batch", "64", "--hidden", "16", "--steps", "1", "--rounds", "1", "--json"]
    arguments += ["--fspec_file", str(tmp_path / "spec.yaml"), "--peers", "none", "--data", harness.CONSTANT]
    seen = []
    assert harness.main("training", lambda contender, batch, step: seen.append(batch), arguments) == 0
    assert len({id(batch) for batch in seen}) == 1
    assert json.loads(capsys.readouterr().out)["results"][0]["rows_from"] == "constant"


@pytest.mark.parametrize("call", [1, 4, 6])
def test_a_peer_that_fails_is_named_and_stops_nobody(call, tmp_path, capsys):
    """In the first step, while it is calibrated, in a round."""
    SPEC.save(tmp_path / "spec.yaml")
    arguments = ["--device", "cpu", "--batch", "64", "32", "--hidden", "16", "--steps", "1", "--rounds", "2", "--json"]
    arguments += ["--fspec_file", str(tmp_path / "spec.yaml"), "--peers", "torch,torch-sparse"]
    calls = []

    def action(contender, batch, step):
        calls.append(contender.name)
        if contender.name == "torch" and calls.count("torch") == call:
            raise RuntimeError("out of\nmemory")

    assert harness.main("training", action, arguments) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["skipped"] == {"torch": "failed: out of memory"}
    assert calls.count("torch") == call
    for result in report["results"]:
        assert [c["name"] for c in result["contenders"]] == ["widedeep (fused)", "torch-sparse"]
    assert gpu_check.whole_steps(json.dumps(report)).endswith("; torch left out: failed: out of memory")


def test_no_rounds_are_refused(capsys):
    assert harness.main("training", None, ["--device", "cpu", "--rounds", "0"]) == 2
    assert "--rounds of 1 or more" in capsys.readouterr().err


def test_op_families_print_their_rates():
    """In the words that the check of a GPU looks for."""
    command = [sys.executable, "-m", "pytest", "-q", "bench/bench_batch.py", "-k", "cpu"]
    log = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, *lines = gpu_check.rates(log).splitlines()
    assert re.match(r"\d+ passed", first)
    assert len(lines) == int(first.split()[0])
    assert all(
        re.match(r"    batch.py::test_\S+ +[\d.,]+ us  [\d.,]+ GB/s \(\d+ % of a copy\)$", line) for line in lines
    )
    cut_short = log[: log.index("batch.py::test_gather[cpu-torch]")]
    assert gpu_check.rates(cut_short).splitlines() == ["1 measured", lines[0]]


def test_end_to_end(tmp_path, capsys):
    arguments = "--displays 300 --epochs 2 --device cpu --batch 256 --hidden 8 --embedding_dim 2 --lr 0.003 --workers 1"
    kept = tmp_path / "kept"
    assert end_to_end.main([*arguments.split(), "--out", str(kept), "--json"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert f"loss {report['epochs'][1]['loss_val']:.4f}, MAP@12" in gpu_check.whole_job("a log\n" + printed)
    assert report["rows"]["train"] + report["rows"]["test"] > 900
    assert len(report["epochs"]) == 2
    assert 0 < report["epochs"][0]["seconds"] < report["epochs"][1]["seconds"] < report["seconds"]["training"]
    assert 0 < report["epochs"][1]["streaming_map_val"] <= 1
    assert sum(report["preprocessing"].values()) <= report["seconds"]["preprocessing"]
    assert report["commit"] in end_to_end.text(report)
    assert end_to_end.main([*arguments.split(), "--out", str(kept)]) == 2
    assert "expected a new or empty directory" in capsys.readouterr().err
    raw = ["--data", str(kept / "raw"), "--out", str(tmp_path / "again"), "--json"]
    assert end_to_end.main([*arguments.split()[2:], *raw]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [e["loss_val"] for e in again["epochs"]] == [e["loss_val"] for e in report["epochs"]]
    (stage,) = (s for s in gpu_check.stages() if "bench.end_to_end" in s.command)
    assert end_to_end.options().parse_args(stage.command[3:]).json


def test_a_timeline_is_the_last_whole_step_in_order():
    def event(start, duration, name, stream=7, cat="kernel"):
        return {"ts": start, "dur": duration, "name": name, "cat": cat, "args": {"stream": stream}}

    events = [event(start, 9, f"void {timeline.FIRST_KERNEL}<order>") for start in (0, 100, 200)]
    events += [event(130, 40, "product", 8), event(112, 10, "sort"), event(175, 5, "Memset", cat="gpu_memset")]
    events += [event(105, 1, "cudaLaunchKernel", cat="cuda_runtime"), {"ph": "M", "name": "process_name"}]
    step = timeline.last_whole_step(timeline.launches({"traceEvents": events}))
    assert [launch.name.split()[-1] for launch in step] == [
        f"{timeline.FIRST_KERNEL}<order>",
        "sort",
        "product",
        "Memset",
    ]
    lines = timeline.text(step).splitlines()
    assert lines[3].split() == ["30.0", "40.0", "8.0", "8", "product"]
    assert lines[-1] == "step 80.0 us, sum of its kernels 64.0 us"
    with pytest.raises(ValueError, match="at least two steps"):
        timeline.last_whole_step(step)


def test_a_timeline_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["timeline", "train"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert timeline.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
