"""Collectives of several gloo processes, and whole runs of 2 and 3 processes against one."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from commands import command_line
from planted import planted_data
from ranks import ROOT, environment, run_ranks, start_ranks
from safetensors.torch import load_file

from widedeep import dist, run
from widedeep.checkpoint import Checkpoints, read_progress
from widedeep.config import TrainConfig
from widedeep.dist import LocalComm
from widedeep.errors import InputError, RunError

COLLECTIVES = """
import json, torch
from widedeep.dist import choose_device, connect
comm = connect(choose_device(cpu=True))
total = comm.all_reduce_(torch.full((3,), float(comm.rank + 1)))
mine = torch.arange(comm.rank * 2, dtype=torch.int64).view(-1, 2) + 100 * comm.rank   # rank rows of two: none on rank 0
comm.barrier()
print(json.dumps([comm.rank, comm.world, total.tolist(), comm.all_gather_rows(mine).tolist(),
                  comm.all_gather_rows(torch.tensor([comm.rank == 1])).tolist()]))
comm.close()
"""


def test_collectives_of_three_processes():
    answers = [json.loads(out) for out in run_ranks(3, "-c", COLLECTIVES)]
    rows = [[100, 101], [200, 201], [202, 203]]
    for rank, answer in enumerate(answers):
        assert answer == [rank, 3, [6.0] * 3, rows, [False, True, False]]


def test_ranks_that_do_not_end_are_told_with_what_they_said():
    says = "import os, sys, time; print('I am', os.environ['RANK'], file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(AssertionError, match=r"(?s)not done after 3 seconds.*I am 0.*I am 1"):
        run_ranks(2, "-c", says, timeout=3)


def test_one_process_alone():
    comm = LocalComm("cpu")
    x = torch.rand(3, 2)
    assert comm.all_gather_rows(x) is x
    assert comm.all_reduce_(x) is x
    assert (comm.rank, comm.world) == (0, 1)


@pytest.mark.parametrize("error", [None, InputError("no"), KeyboardInterrupt()])
def test_who_fails_leaves_without_the_others(error, monkeypatch):
    """They may wait for this process, and it for them, if it left together with them."""
    left = []

    class Group(LocalComm):
        def close(self):
            left.append("together")

        def abort(self):
            left.append("alone")

    def action(config, comm):
        if error:
            raise error
        return 5

    monkeypatch.setattr(run, "connect", Group)
    config = TrainConfig().updated(cpu=True, affinity="disabled")
    if error:
        with pytest.raises(type(error)):
            run.launch(config, action)
    else:
        assert run.launch(config, action) == 5
    assert left == ["alone" if error else "together"]


def test_a_lost_process_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    told = "[/a/b/pair.cc:537] Read error [127.0.0.1]:41615: Connection reset by peer. Check the logs. GLHF!\nmore"
    with pytest.raises(RunError) as caught, dist._lost_worker():
        raise RuntimeError(told)
    expected = "process 1 lost contact with the others: Read error [127.0.0.1]:41615: Connection reset by peer"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "value", "wanted"), [("RANK", "2", r"a number below 2 \(WORLD_SIZE\)"), ("LOCAL_RANK", "x", "a number as")]
)
def test_an_environment_that_torchrun_does_not_set_is_refused(name, value, wanted, monkeypatch):
    for variable, number in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, number)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"^environment variable {name}: expected {wanted}.*, got '?{value}'?$"):
        dist.connect(torch.device("cpu"))


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE"])
def test_processes_of_another_launcher_are_no_runs_of_their_own(name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "8")
    config = TrainConfig().updated(cpu=True, affinity="disabled")
    with pytest.raises(InputError, match=rf"{name}: 8 processes .* expected `torchrun --nproc_per_node 8 -m widedeep`"):
        run.launch(config, lambda config, comm: comm.world)
    monkeypatch.setenv(name, "1")
    assert run.launch(config, lambda config, comm: comm.world) == 1


def test_an_id_past_its_table_in_data_that_were_checked_is_a_defect():
    def action(config, comm):
        raise RuntimeError("op: feature 1 has id 7 in batch row 2, expected -1 (padding) or 0 to 6")

    config = TrainConfig().updated(cpu=True, affinity="disabled", dataset_path="d")
    with pytest.raises(RuntimeError, match=r"^op: feature 1"):
        run.launch(config, action)
    with pytest.raises(InputError, match=r"^d: damaged data: feature 1 has id 7, expected -1 .* 6; rerun with"):
        run.launch(config.updated(verify=False), action)


def test_a_lost_worker_is_one_sentence():
    script = """
import os, sys
from widedeep.dist import choose_device, connect
from widedeep.errors import RunError
comm = connect(choose_device(cpu=True))
if comm.rank == 1:
    os._exit(0)
try:
    comm.barrier()
except RunError as error:
    print(error)
os._exit(0)
"""
    said = run_ranks(2, "-c", script)[0]
    assert said.startswith("process 0 lost contact with the others")
    assert said.count("lost contact") == 1


FLAGS = shlex.split(
    "-m widedeep train --cpu --global_batch_size 64 --eval_batch_size 150 --num_epochs 2 --deep_warmup_epochs 1"
    " --seed 5 --threads 1 --deep_hidden_units 16 8 --deep_dropout 0.3 --deep_learning_rate 0.002 --log_every 7"
)


def whole_run(world: int, data: Path, out: Path, *flags: str, program=FLAGS) -> tuple[dict, dict, list[dict]]:
    """(weights and slots, evaluation, logged values) of `world` processes; 32 steps, the last of each epoch ragged."""
    command_line()
    places = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out]
    run_ranks(world, *program, *places, *flags)
    path = Checkpoints(out / "model").find("last")
    arrays = load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return arrays, json.loads((out / "evaluation.json").read_text()), lines


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def alone(data, one):
    return whole_run(1, data, one, "--step", "reference")


SHARDED = ("--embedding_parallel", "sharded")


@pytest.mark.parametrize(
    ("world", "flags"),
    [(2, ("--step", "reference")), (3, ("--step", "fused")), (2, SHARDED), (4, SHARDED)],
    ids=["2-reference", "3-fused", "2-sharded", "4-sharded"],
)
def test_ranks_give_the_result_of_one_process(data, alone, tmp_path, world, flags):
    run = whole_run(world, data, tmp_path, *flags)
    assert_as_alone(alone, run)
    lines, want_lines = run[-1], alone[-1]
    assert [line["step"] for line in lines] == [line["step"] for line in want_lines]
    for line, other in zip(lines, want_lines):
        assert line.get("loss") == pytest.approx(other.get("loss"), abs=1e-4)


@pytest.mark.parametrize(
    ("before", "after"), [((3, SHARDED), (1, ())), ((1, ()), (2, SHARDED)), ((2, ()), (3, SHARDED))]
)
def test_a_run_goes_on_with_its_tables_shared_out_otherwise(data, alone, tmp_path, before, after):
    """A checkpoint holds whole tables, whoever wrote it; it stops inside an epoch here."""
    world, flags = before
    stop = ["--checkpoint_every_steps", "11", "--keep_last", "9"]
    whole_run(world, data, tmp_path, *stop, *flags)
    for path in ("step-16", "step-22", "step-32"):
        shutil.rmtree(tmp_path / "model" / "checkpoint" / path)
    world, flags = after
    assert_as_alone(alone, whole_run(world, data, tmp_path, "--use_checkpoint", *flags))


def test_another_number_of_processes_is_named(data, one, alone, tmp_path):
    shutil.copytree(one / "model", tmp_path / "model")
    places = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path]
    said = run_ranks(2, *FLAGS, *places, "--use_checkpoint", "--num_epochs", "3")[0]
    assert "not as before: --num_epochs 3 (was 2), --step auto (was reference), 2 processes (was 1)\n" in said


def assert_as_alone(alone: tuple[dict, dict, list[dict]], run: tuple[dict, dict, list[dict]]) -> None:
    (want, want_evaluation, _), (got, evaluation, _) = alone, run
    assert want.keys() == got.keys()
    for name, array in want.items():
        if name.startswith("last_step") or name == "step":
            continue  # a row's rms may be settled at another step and stand for the same value
        moved = 2e-4 if "rms" not in name else 1e-3
        torch.testing.assert_close(
            got[name], array, rtol=moved, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    limits = {"loss": 1e-5, "auc": 1e-4, "map": 1e-3, "map_all": 1e-3, "gauc": 1e-3, "binary_accuracy": 1e-9}
    for key, limit in limits.items():
        assert evaluation[key] == pytest.approx(want_evaluation[key], abs=limit), key


ONE_DISK_EACH = """
import contextlib, os, sys
from widedeep import cli
place = sys.argv.index("--model_dir") + 1
sys.argv[place] += os.environ["RANK"]
with contextlib.redirect_stderr(sys.stdout):
    print(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("seed", [[], ["--seed", "5"]])
def test_processes_that_find_different_checkpoints_do_not_train_together(data, one, alone, tmp_path, seed):
    shutil.copytree(one / "model", tmp_path / "model0")
    places = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path]
    flags = [*FLAGS[2:], "--num_epochs", "3", "--step", "reference", "--use_checkpoint"]
    at = flags.index("--seed")
    del flags[at : at + 2]
    for out in run_ranks(2, "-c", ONE_DISK_EACH, *flags, *seed, *places):
        assert "process 1 found no checkpoint in" in out
        assert "process 0 step-32: it must be on a disk that all share" in out
        assert out.endswith("\n2\n")


def test_evaluation_does_not_depend_on_the_number_of_processes(data, one, alone):
    score = ["evaluate", "--model", one / "model", "--dataset_path", data, "--cpu", "--json", "--checkpoint", "last"]
    for flags, limit in ((("--step", "reference"), 1e-9), (SHARDED, 1e-6)):
        two = json.loads(run_ranks(2, "-m", "widedeep", *score, *flags, "--eval_batch_size", "70")[0])
        for key, value in alone[1].items():
            if key != "calibration":
                assert two[key] == pytest.approx(value, abs=limit), key


def test_torchrun_starts_it(data, tmp_path):
    command_line()
    places = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *FLAGS]
    subprocess.run([sys.executable, *map(str, [*torchrun, *places])], check=True, capture_output=True, cwd=ROOT)
    assert read_progress(Checkpoints(tmp_path / "model").find("last")).step == 32


TERMINATED = """
import os, signal, sys
from widedeep import cli, train
real, seen = train.LossWatch.add, []
def add(self, loss):
    seen.append(loss)
    if (os.environ["RANK"], len(seen)) == ("1", 20):
        os.kill(os.getpid(), signal.SIGTERM)
    real(self, loss)
train.LossWatch.add = add
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("flags", [(), SHARDED], ids=["replicated", "sharded"])
def test_all_end_with_a_checkpoint_when_one_is_asked_to_end(data, alone, tmp_path, flags):
    command_line()
    places = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path, *flags]
    processes = start_ranks(2, "-c", TERMINATED, *FLAGS[2:], *places)
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    left = Checkpoints(tmp_path / "model").find("last")
    assert read_progress(left).step == 20
    assert said[0][0].endswith(f"stopped at step 20: --use_checkpoint goes on from {left}\n")
    assert_as_alone(alone, whole_run(2, data, tmp_path, "--use_checkpoint", *flags))


KILLED_ONCE = """
import os, signal, sys
from widedeep import cli, train
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    train.evaluate = killed
sys.exit(cli.main())
"""


def test_processes_that_torchrun_starts_again_find_each_other_and_go_on(data, tmp_path):
    """Not those that died: with --standalone the store that names them is the old one."""
    command_line()
    (tmp_path / "killed.py").write_text(KILLED_ONCE)
    places = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path / "results"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    words = [*torchrun, tmp_path / "killed.py", *FLAGS[2:], *places, "--use_checkpoint", "--checkpoint_every_steps", 5]
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=True)
    assert "continuing" in done.stdout
    assert read_progress(Checkpoints(tmp_path / "model").find("last")).step == 32


KILLS_TORCHRUN = """
import os, signal, sys, time
from widedeep import cli, train
real, seen = train.LossWatch.add, []
def add(self, loss):
    seen.append(loss)
    if (os.environ["RANK"], len(seen)) == ("1", 20):
        os.kill(parent := os.getppid(), signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
    real(self, loss)
train.LossWatch.add = add
sys.exit(cli.main())
"""


def test_processes_whose_torchrun_is_killed_end_with_a_checkpoint(data, alone, tmp_path):
    command_line()
    (tmp_path / "kills.py").write_text(KILLS_TORCHRUN)
    places = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "kills.py"]
    command = [sys.executable, *map(str, [*torchrun, *FLAGS[2:], *places])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Checkpoints(tmp_path / "model").find("last")  # its processes are gone: they held the ends of our pipes
    assert (step := read_progress(left).step) in (20, 21)  # the signal may come a moment after the new parent
    assert done.stdout.endswith(f"stopped at step {step}: --use_checkpoint goes on from {left}\n")
    assert_as_alone(alone, whole_run(2, data, tmp_path, "--use_checkpoint"))


STARTED_AGAIN = """
import os, sys, torch
from widedeep.dist import connect
port, *counts = sys.argv[1:]
os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
os.environ["TORCHELASTIC_RESTART_COUNT"] = counts[int(os.environ["RANK"])]
print(connect(torch.device("cpu")).all_reduce_(torch.ones(1)).item(), flush=True)
os._exit(0)  # without a farewell to the others
"""


def test_processes_of_machines_that_count_restarts_differently_find_each_other():
    """Only the machine on which a process died counts; the store, on the first one, stays."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for counts in [(0, 0), (0, 1), (0, 1)]:
        assert run_ranks(2, "-c", STARTED_AGAIN, store.port, *counts, timeout=60) == ["2.0\n"] * 2


def test_processes_that_do_not_come_are_told(monkeypatch):
    monkeypatch.setattr(dist, "JOIN", timedelta(seconds=0.1))
    store = torch.distributed.HashStore()
    store.set("join/2", "of an earlier one")
    with pytest.raises(RuntimeError, match="2 of 3 processes have not come"):
        dist.agree_on_prefix(store, rank=0, world=3)
