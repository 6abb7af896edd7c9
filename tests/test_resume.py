"""A training killed inside an epoch, when continued, ends with the same bits as one that was never stopped."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import yaml
from commands import main
from planted import planted_data
from safetensors.torch import load_file

from widedeep import train
from widedeep.checkpoint import Checkpoints, read_progress
from widedeep.progress import SEAL

FLAGS = shlex.split(
    "--cpu --global_batch_size 32 --eval_batch_size 128 --num_epochs 3 --deep_warmup_epochs 1"
    " --seed 5 --deep_dropout 0.2 --deep_hidden_units 16 8 --deep_learning_rate 0.01 --checkpoint_every_steps 7"
    " --log_every 10 --threads 1"
)


def words(data: Path, out: Path, step: str, *more: str) -> list[str]:
    places = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out / "results"]
    return ["train", *map(str, places), *FLAGS, "--step", step, *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted_data(tmp_path_factory.mktemp("data") / "set")


def final_arrays(out: Path) -> dict:
    path = Checkpoints(out / "model").find("last")
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def stop_inside_second_epoch(data: Path, out: Path, step: str, how: signal.Signals) -> tuple[int, str]:
    """Starts training as a process of its own and sends it a signal when a checkpoint lies inside the second epoch;
    returns its exit code, and what it said.
    """
    # Slowed down, so that the kill comes inside the epoch; the arithmetic is untouched.
    script = (
        "import sys, time, widedeep.train as t; real = t.LossWatch.add\n"
        "def add(self, loss): time.sleep(0.02); real(self, loss)\n"
        "t.LossWatch.add = add\n"
        "from widedeep import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words(data, out, step)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and process.poll() is None:
            steps = [int(path.name[5:]) for path in Checkpoints(out / "model").steps()]
            if steps and max(steps) > 36:  # an epoch has 32 steps: 42 is the first mid-epoch checkpoint of the second
                break
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
        os.kill(process.pid, how)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("step", "how"), [("reference", "KILL"), ("fused", "KILL"), ("fused", "TERM")])
def test_killed_run_continues_with_the_same_bits(data, tmp_path, step, how):
    assert main(words(data, tmp_path / "whole", step)) == 0
    killed = tmp_path / "killed"
    code, said = stop_inside_second_epoch(data, killed, step, signal.Signals[f"SIG{how}"])
    found = Checkpoints(killed / "model").find("last")
    left = read_progress(found)
    if how == "TERM":  # which waits for the step, and a checkpoint of it
        assert code == 143
        assert said.endswith(f"stopped at step {left.step}: --use_checkpoint goes on from {found}\n")
    assert left.epoch == 1
    assert 0 < left.position < 32
    assert main(words(data, killed, step, "--use_checkpoint")) == 0
    want, got = final_arrays(tmp_path / "whole"), final_arrays(killed)
    assert want.keys() == got.keys()
    for name, array in want.items():
        assert array.equal(got[name]), name
    whole, continued = (
        json.loads((out / "results" / "evaluation.json").read_text()) for out in (tmp_path / "whole", killed)
    )
    assert whole == continued
    logged = [
        [json.loads(line)["step"] for line in (out / "results" / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path / "whole", killed)
    ]
    assert logged[0] == logged[1]


@pytest.mark.parametrize(("epoch", "code"), [(1, 143), (3, 0)], ids=["first", "last"])
def test_a_run_that_is_ended_in_an_evaluation_makes_no_further_step(data, tmp_path, monkeypatch, epoch, code):
    real, evaluations = train.evaluate, count(1)

    def evaluate(*told):
        if next(evaluations) == epoch:
            signal.raise_signal(signal.SIGTERM)
        return real(*told)

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert main(words(data, tmp_path, "fused")) == code
    left = read_progress(Checkpoints(tmp_path / "model").find("last"))
    assert (left.step, left.epoch, left.position) == (32 * epoch, epoch, 0)
    assert left.metrics["auc_val"] > 0


def test_a_run_whose_checkpoints_are_written_beside_it_ends_the_same(data, tmp_path, monkeypatch):
    """As on a GPU."""
    assert main(words(data, tmp_path / "whole", "fused", "--num_epochs", "2")) == 0
    real = Checkpoints.save

    def save(self, arrays, optimizer, *told, beside):
        copies = [{name: t.clone() for name, t in part.items()} for part in (arrays, optimizer)]
        return real(self, *copies, *told, beside=True)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert main(words(data, tmp_path / "beside", "fused", "--num_epochs", "2")) == 0
    names = [[path.name for path in Checkpoints(tmp_path / out / "model").steps()] for out in ("whole", "beside")]
    assert names[0] == names[1]
    for which in ("best", *names[0]):
        want, got = (Checkpoints(tmp_path / out / "model").find(which) for out in ("whole", "beside"))
        assert read_progress(want).metrics == read_progress(got).metrics
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (want / file).read_bytes() == (got / file).read_bytes()


def test_finished_run_is_left_alone(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference")) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    log = (tmp_path / "results" / "log.json").read_bytes()
    assert main(words(data, tmp_path, "reference", "--use_checkpoint")) == 0
    out = capsys.readouterr().out
    assert "finished already" in out
    assert "continuing" not in out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    assert (tmp_path / "results" / "log.json").read_bytes() == log


def test_records_of_another_run_are_not_continued(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference", "--num_epochs", "1")) == 0
    other = ["--model_dir", str(tmp_path / "other"), "--overwrite", "--num_epochs", "1"]
    assert main(words(data, tmp_path, "reference", *other)) == 0
    before = (tmp_path / "results" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    goes_on = ["--use_checkpoint", "--num_epochs", "2"]
    assert main(words(data, tmp_path, "reference", *goes_on)) == 2
    assert "results: holds the records of a run that began at 20" in capsys.readouterr().err
    assert (tmp_path / "results" / "metrics.jsonl").read_bytes() == before
    elsewhere = ["--results_dir", str(tmp_path / "elsewhere")]
    assert main(words(data, tmp_path, "reference", *goes_on, *elsewhere)) == 0


@pytest.mark.parametrize("step", ["reference", "fused"])
def test_a_new_run_begins_with_the_weights_of_another(data, tmp_path, capsys, step):
    """On other rows, another batch size and a learning rate that leaves the deep part as it is."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(words(data, first, step, "--num_epochs", "1")) == 0
    other = planted_data(tmp_path / "other", train=500)
    new = ["--initial_checkpoint", str(first / "model"), "--num_epochs", "1", "--global_batch_size", "64"]
    new += ["--seed", "6", "--deep_learning_rate", "0"]
    capsys.readouterr()
    assert main(words(other, second, step, *new)) == 0
    assert f"beginning with the weights of {first / 'model'}" in capsys.readouterr().out
    before, after = final_arrays(first), final_arrays(second)
    assert before["deep.layer.0.weight"].equal(after["deep.layer.0.weight"])
    assert not before["wide.table.ad"].equal(after["wide.table.ad"])
    assert (after["accum.wide.table.ad"] >= before["accum.wide.table.ad"]).all()
    assert int(after["updates"]) == int(before["updates"]) + 8
    progress = read_progress(Checkpoints(second / "model").find("last"))
    assert (progress.step, progress.epoch, progress.seed, progress.rows) == (8, 1, 6, 500)
    # A run that is continued has no more use for it.
    shutil.rmtree(first)
    assert main(words(other, second, step, *new[:2], "--use_checkpoint", *new[2:])) == 0


def test_weights_that_a_new_run_cannot_begin_with_are_refused(data, tmp_path, capsys):
    assert main(words(data, tmp_path / "first", "reference", "--num_epochs", "1")) == 0
    sizes = tmp_path / "sizes.json"
    sizes.write_text('{"ad": 6, "site": 4, "tags": 4}')
    new = ["--initial_checkpoint", str(tmp_path / "first" / "model"), "--num_epochs", "1"]
    capsys.readouterr()
    assert main(words(data, tmp_path / "second", "reference", *new, "--embedding_sizes_file", str(sizes))) == 2
    assert "was trained with embedding dim 8 of ad, not 6" in capsys.readouterr().err
    evaluated = ["--use_checkpoint", "--evaluate", "--model_dir", new[1]]
    for given in (new, evaluated):
        assert main(words(data, tmp_path / "second", "reference", *given, "--deep_hidden_units", "16")) == 2
        assert "was trained with --deep_hidden_units 16 8, not 16\n" in capsys.readouterr().err
    assert main(words(data, tmp_path / "second", "reference", "--initial_checkpoint", str(tmp_path / "none"))) == 2
    assert "none: expected a checkpoint, or a model directory" in capsys.readouterr().err
    for other in ("--evaluate", "--benchmark"):
        assert main(words(data, tmp_path / "second", "reference", *new, other)) == 2
        assert f"--initial_checkpoint begins a training, but {other} is given too" in capsys.readouterr().err


def test_a_run_that_is_interrupted_says_what_is_left(data, tmp_path, capsys, monkeypatch):
    def interrupt(self, loss):
        raise KeyboardInterrupt

    assert main(words(data, tmp_path, "reference", "--num_epochs", "1")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("widedeep.train.LossWatch.add", interrupt)
        capsys.readouterr()
        assert main(words(data, tmp_path, "reference", "--num_epochs", "2", "--use_checkpoint")) == 130
        assert "stopped at step 32: --use_checkpoint goes on from" in capsys.readouterr().out
        told = "stopped at step 0: it has no checkpoint to go on from; --checkpoint_every_steps saves"
        assert main([*words(data, tmp_path / "fresh", "reference"), "--checkpoint_every_steps", "1000"]) == 130
        assert told.partition(";")[0] + "\n" in capsys.readouterr().out
        again = [word for word in words(data, tmp_path, "reference", "--overwrite") if word not in ("7",)]
        again.remove("--checkpoint_every_steps")
        assert main(again) == 130  # the checkpoint that is there is of the run that this one is to replace
        assert told in capsys.readouterr().out


def test_more_epochs_continue_a_finished_run(data, tmp_path):
    assert main(words(data, tmp_path, "reference")) == 0
    assert main(words(data, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "4")) == 0
    assert read_progress(Checkpoints(tmp_path / "model").find("last")).epoch == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "6"], "was trained with --seed 5, not 6"),
        (["--global_batch_size", "64"], "was trained with 32 global_batch_size, not 64"),
        (["--training_set_size", "500"], "was trained with 32 steps per epoch (--training_set_size), not 15"),
        (["--deep_hidden_units", "16", "4"], "was trained with --deep_hidden_units 16 8, not 16 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(data, tmp_path, capsys, change, said):
    assert main(words(data, tmp_path, "reference")) == 0
    capsys.readouterr()
    assert main(words(data, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "4", *change)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.splitlines()[-1].startswith("widedeep: ")


def test_checkpoints_are_not_overwritten_unasked(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference")) == 0
    capsys.readouterr()
    assert main(words(data, tmp_path, "reference")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(words(data, tmp_path, "reference", "--overwrite", "--num_epochs", "1")) == 0
    assert [path.name for path in Checkpoints(tmp_path / "model").steps()] == ["step-28", "step-32"]


def test_missing_checkpoint_warns_in_training_and_stops_evaluation(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference", "--evaluate", "--use_checkpoint")) == 2
    assert "expected a checkpoint to evaluate" in capsys.readouterr().err
    assert main(words(data, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "1")) == 0
    assert "no checkpoint to continue" in capsys.readouterr().out


def test_a_run_stopped_before_its_first_checkpoint_is_continued_into_its_own_results(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "reference", "--num_epochs", "1")) == 0
    (tmp_path / "model").rename(tmp_path / "lost")
    elsewhere = ["--model_dir", str(tmp_path / "other")]
    assert main(words(data, tmp_path, "reference", "--num_epochs", "1", "--use_checkpoint", *elsewhere)) == 2
    assert "evaluation.json is there: give --overwrite" in capsys.readouterr().err
    assert main(words(data, tmp_path, "reference", "--num_epochs", "1", "--use_checkpoint")) == 0
    assert "no checkpoint to continue, starting afresh" in capsys.readouterr().out


def test_a_checkpoint_of_tensorflow_is_not_passed_over(data, tmp_path, capsys):
    """A model directory of the original: its run cannot be continued, and shall not begin anew without a word."""
    theirs = tmp_path / "model" / "checkpoint"
    theirs.mkdir(parents=True)
    for name in ("checkpoint", "ckpt-9120.index", "ckpt-9120.data-00000-of-00001"):
        (theirs / name).write_bytes(b"model")
    command = words(data, tmp_path, "reference")
    said = "ckpt-9120.index: expected a checkpoint of widedeep, found TensorFlow's, which it cannot read"
    score = ["evaluate", "--model", str(tmp_path / "model"), "--dataset_path", str(data), "--cpu"]
    for refused in ([*command, "--use_checkpoint"], [*command, "--use_checkpoint", "--evaluate"], score):
        assert main(refused) == 2
        assert said in capsys.readouterr().err
    assert main([*command, "--num_epochs", "1"]) == 0
    assert (theirs / "ckpt-9120.index").read_bytes() == b"model"
    assert main([*command, "--num_epochs", "1", "--use_checkpoint"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main([*score, "--checkpoint", "step-9"]) == 2
    assert "expected the checkpoint best, last or one of step-" in capsys.readouterr().err


def test_flags_that_change_the_weights_are_named(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "fused", "--num_epochs", "1")) == 0
    goes_on = ["--use_checkpoint", "--num_epochs", "1", "--precision", "fp32"]  # as without
    capsys.readouterr()
    assert main(words(data, tmp_path, "fused", *goes_on, "--eval_batch_size", "64", "--threads", "2")) == 0
    assert "not as before" not in capsys.readouterr().out
    assert main(words(data, tmp_path, "fused", *goes_on, "--deep_dropout", "0.5", "--combiner", "mean")) == 0
    said = "not as before: --deep_dropout 0.5 (was 0.2), --combiner mean (was not given)\n"
    assert said in capsys.readouterr().out


def test_a_feature_spec_that_makes_another_function_of_the_weights_is_named(data, tmp_path, capsys):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    spec = yaml.safe_load((other / "feature_spec.yaml").read_text())
    assert spec["channel_spec"]["numerical"] == ["age", "price"]
    spec["feature_spec"]["tags"]["combiner"] = "sum"
    spec["channel_spec"]["numerical"] = ["price", "age"]
    (other / "feature_spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    assert main(words(data, tmp_path, "reference", "--num_epochs", "1")) == 0
    goes_on = ["--use_checkpoint", "--num_epochs", "1"]
    said = "numeric features price, age (was age, price), combiner of tags sum (was mean)\n"
    capsys.readouterr()
    assert main(words(other, tmp_path, "reference", *goes_on, "--evaluate")) == 0
    assert f"not as trained: {said}" in capsys.readouterr().out
    assert main(words(other, tmp_path, "reference", *goes_on)) == 0
    assert f"not as before: {said}" in capsys.readouterr().out
    assert main(words(data, tmp_path, "reference", *goes_on, "--evaluate")) == 0
    assert main(words(data, tmp_path, "reference", *goes_on)) == 0
    assert "not as" not in capsys.readouterr().out


def test_another_kind_of_device_and_of_sharing_is_named(data, tmp_path, capsys):
    assert main(words(data, tmp_path, "fused", "--num_epochs", "1")) == 0
    state = Checkpoints(tmp_path / "model").find("last") / "state.json"
    told = json.loads(state.read_text()) | {"device": "cuda"}
    del told[SEAL]
    state.write_text(json.dumps(told))
    again = ["--num_epochs", "1", "--use_checkpoint", "--embedding_parallel", "sharded"]
    capsys.readouterr()
    assert main(words(data, tmp_path, "fused", *again)) == 0
    assert "not as before: --embedding_parallel sharded (was replicated), on cpu (was cuda)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "products", "named"), [("reference", "own", True), ("fused", "library", True), ("fused", "own", False)]
)
def test_a_number_of_threads_that_changes_bits_is_named(data, tmp_path, capsys, monkeypatch, step, products, named):
    """Not that of our own products, whose sums have an order of their own."""
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", products)
    precision = ["--precision", "bf16"] * (step == "fused")
    assert main(words(data, tmp_path, step, "--num_epochs", "1", *precision)) == 0
    again = words(data, tmp_path, step, "--num_epochs", "2", "--use_checkpoint", *precision)
    capsys.readouterr()
    assert main([*again, "--threads", "2"]) == 0
    assert ("2 threads (was 1)" in capsys.readouterr().out) == named
    assert read_progress(Checkpoints(tmp_path / "model").find("last")).threads == (2 if named else None)
    if step == "reference":  # to a step whose bits do not depend on them
        assert main(words(data, tmp_path, "fused", "--num_epochs", "3", "--use_checkpoint")) == 0
        assert ", --step fused (was reference)\n" in capsys.readouterr().out


def test_other_rows_continue_only_a_whole_epoch(data, tmp_path, capsys):
    other = planted_data(tmp_path / "other", ads=5)
    assert main(words(data, tmp_path, "reference", "--num_epochs", "1")) == 0
    whole = Path(shutil.copytree(tmp_path / "model", tmp_path / "whole" / "model"))
    shutil.rmtree(tmp_path / "model" / "checkpoint" / "step-32")  # leaves step-28
    again = planted_data(tmp_path / "again")
    fewer = planted_data(tmp_path / "fewer", train=1001)  # as many steps
    capsys.readouterr()
    assert main(words(fewer, whole.parent, "reference", "--use_checkpoint", "--num_epochs", "2")) == 2
    assert "was trained with 1003 rows, not 1001: it cannot be continued" in capsys.readouterr().err
    assert main(words(other, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "1")) == 2
    assert "step-28: was trained with other rows than those of" in capsys.readouterr().err
    assert main(words(again, tmp_path, "reference", "--use_checkpoint", "--num_epochs", "1")) == 0
    assert "not as before" not in capsys.readouterr().out
    assert main(words(other, whole.parent, "reference", "--use_checkpoint", "--num_epochs", "2")) == 0
    assert "not as before: --num_epochs 2 (was 1), rows of the train set\n" in capsys.readouterr().out
    assert main(words(other, whole.parent, "reference", "--use_checkpoint", "--num_epochs", "2")) == 0
    assert "not as before" not in capsys.readouterr().out


def test_a_run_under_way_is_left_alone(data, tmp_path, capsys):
    with Checkpoints(tmp_path / "model") as under_way:
        under_way.prepare()
        assert main(words(data, tmp_path, "reference")) == 2
        assert "another run is writing it" in capsys.readouterr().err
    assert main(words(data, tmp_path, "reference", "--num_epochs", "1")) == 0


def test_a_checkpoint_that_a_kill_left_moved_aside_is_continued(data, tmp_path, capsys):
    flags = ["--num_epochs", "1", "--keep_last", "1"]
    assert main(words(data, tmp_path, "reference", *flags)) == 0
    only = Checkpoints(tmp_path / "model").find("last")
    only.rename(only.with_name(f".{only.name}.partial-elsewhere-77-previous"))
    assert main(words(data, tmp_path, "reference", *flags, "--use_checkpoint")) == 0
    assert "finished already" in capsys.readouterr().out
