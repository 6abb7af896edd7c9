"""What a training that is killed, or whose disk fails, at an unlucky moment leaves behind, and what becomes of it."""

import contextlib
import errno
import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest
from commands import main
from planted import planted_data
from safetensors import SafetensorError
from test_checkpoint import save
from test_resume import words

from widedeep import resume, tensors
from widedeep.checkpoint import MODEL, STATE, Checkpoints, locate, read_arrays, read_progress
from widedeep.errors import InputError, RunError
from widedeep.journal import Journal
from widedeep.logs import RunLog
from widedeep.progress import SEAL, seal
from widedeep.train import LossWatch

STEPS = 7  # of an epoch: 200 rows by 32


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted_data(tmp_path_factory.mktemp("data") / "set", train=200)


def test_half_of_a_checkpoint_that_was_being_removed_is_none(tmp_path, monkeypatch):
    """A kill may come when some of its files are gone, and the rest is not to be used, nor to stay."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    removed = []

    def rmtree(path, **_):
        removed.append(path)
        (path / MODEL).unlink()

    save(checkpoints, 1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", rmtree)
        save(checkpoints, 2)
    assert [path.name for path in checkpoints.steps()] == ["step-2"]
    assert (removed[0] / STATE).is_file()
    with checkpoints:
        checkpoints.prepare()
    assert {each.name for each in checkpoints.directory.iterdir()} == {"last", "lock", "step-2"}


def test_a_model_directory_may_be_a_link_to_one_that_is_not_there_yet(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "large" / "model")
    with Checkpoints(tmp_path / "model") as checkpoints:
        checkpoints.prepare()
        save(checkpoints, 1)
    assert (tmp_path / "large" / "model" / "checkpoint" / "step-1" / STATE).is_file()


def stop(*_):
    raise KeyboardInterrupt


@contextlib.contextmanager
def stop_at(monkeypatch, name: str):
    """As a kill does that comes when this checkpoint is whole and `last` does not name it yet."""
    real = Checkpoints._point

    def point(self, *told):
        return stop() if name in told else real(self, *told)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_point", point)
        yield


def found(checkpoints: Checkpoints) -> tuple[str, str]:
    return checkpoints.find("last").name, checkpoints.find("best").name


def test_a_best_checkpoint_that_last_does_not_name_yet_is_not_of_the_run(tmp_path, monkeypatch):
    """Which goes on from an earlier one, and may come to other scores."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, best=1)
    with stop_at(monkeypatch, "step-3"), pytest.raises(KeyboardInterrupt):
        save(checkpoints, 3, best=3)
    assert found(checkpoints) == ("step-2", "step-1")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.adopt(checkpoints.find())
    for step in (3, 4, 5):
        save(checkpoints, step, best=1)
        assert found(checkpoints) == (f"step-{step}", "step-1")
    assert [path.name for path in checkpoints.steps()] == ["step-1", "step-4", "step-5"]


def test_a_checkpoint_that_is_saved_again_as_the_best_is_the_best_at_once(tmp_path, monkeypatch):
    """As at the end of an epoch, inside which it was the last."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, best=1)
    with stop_at(monkeypatch, "step-2"), pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2, best=2)
    assert found(checkpoints) == ("step-2", "step-2")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_was_stopped_before_it_replaced_another_has_no_part_in_it(tmp_path, monkeypatch, step):
    old = Checkpoints(tmp_path)
    for s in (1, 2):
        save(old, s, best=1, begun="yesterday")
    with stop_at(monkeypatch, f"step-{step}"), pytest.raises(KeyboardInterrupt):
        save(Checkpoints(tmp_path), step, best=step, begun="today")
    assert found(old) == ("step-2", "step-2" if step < 3 else "step-1")


def test_a_run_that_was_stopped_when_it_had_replaced_another_has_no_best_of_that(tmp_path, monkeypatch):
    for step in (1, 2):
        save(Checkpoints(tmp_path), step, best=step, begun="yesterday")
    monkeypatch.setattr(Checkpoints, "_prune", stop)
    with pytest.raises(KeyboardInterrupt):
        save(Checkpoints(tmp_path), 1, begun="today")
    assert found(Checkpoints(tmp_path)) == ("step-1", "step-1")


def make_older(directory: Path, best: str) -> None:
    """As checkpoints were when an index named the best one."""
    for path in directory.glob("step-*"):
        state = json.loads((path / STATE).read_text())
        plain = {key: value for key, value in state.items() if key not in (SEAL, "best_step")}
        (path / STATE).write_text(json.dumps(plain | {SEAL: seal(plain)}))
    (directory / "best").write_text(f"{best}\n")


@pytest.mark.parametrize(
    ("index", "best"), [("step-1", "step-1"), ("step-3", "step-3"), ("step-9", "step-3"), ("", "step-3")]
)
def test_the_best_checkpoint_of_an_older_run_stays_the_best(tmp_path, index, best):
    """But one that is not there, or not yet, is none."""
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        last = save(checkpoints, step, best=2)
    make_older(checkpoints.directory, index)
    assert found(checkpoints) == ("step-3", best)
    step = read_progress(last).best_step
    assert step == (int(best[5:]) if index == best else None)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.adopt(last)
    save(checkpoints, 4, best=step)
    save(checkpoints, 5, best=step)
    assert not (checkpoints.directory / "best").exists()
    assert found(checkpoints) == ("step-5", best if step else "step-5")


def test_a_run_that_goes_on_with_other_flags_after_a_kill_has_the_best_of_its_own_epochs(data, tmp_path, monkeypatch):
    flags = words(data, tmp_path, "fused", "--num_epochs", "2", "--checkpoint_every_steps", "99")
    first, second = (f"step-{epochs * STEPS}" for epochs in (1, 2))
    with stop_at(monkeypatch, second):
        assert main(flags) == 130
    before = read_progress(tmp_path / "model" / "checkpoint" / second)
    assert before.metrics[before.score] == before.best > 0
    real = Journal.epoch
    monkeypatch.setattr(Journal, "epoch", lambda *told: real(*told) | {before.score: 0.0})
    assert main([*flags, "--use_checkpoint", "--deep_learning_rate", "1"]) == 0
    checkpoints = Checkpoints(tmp_path / "model")
    assert found(checkpoints) == (second, first)
    last, best = (read_progress(checkpoints.find(which)) for which in ("last", "best"))
    assert last.best == best.best == best.metrics[before.score] > last.metrics[before.score]


def test_an_error_without_a_number_is_one_of_the_disk(tmp_path, monkeypatch):
    def save_file(*_):
        raise SafetensorError("Error while serializing: I/O error: failed to write the buffered data")

    monkeypatch.setattr(tensors, "save_file", save_file)
    with pytest.raises(RunError, match=r"step-1: Input/output error; what was there before is untouched$"):
        save(Checkpoints(tmp_path), 1)


@pytest.mark.parametrize("kind", [RuntimeError, OSError, SafetensorError])
def test_a_disk_that_fails_while_a_checkpoint_is_read_is_named(tmp_path, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("unable to mmap: Input/output error (5)")

    path = save(Checkpoints(tmp_path), 1)
    monkeypatch.setattr(tensors, "safe_open", fail)
    with pytest.raises(InputError, match=f"^{path / MODEL}: cannot be read: unable to mmap"):
        read_arrays(path, MODEL)


@pytest.mark.parametrize(
    ("number", "damaged"), [(errno.EACCES, False), (errno.EMFILE, False), (errno.EIO, True), (errno.EISDIR, True)]
)
def test_a_checkpoint_that_may_not_be_read_is_not_said_to_be_damaged(tmp_path, monkeypatch, number, damaged):
    """Who believed it would remove one that is whole."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    path, real = save(checkpoints, 2), Path.open

    def fail(self, *told, **more):
        if self.name == MODEL:
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *told, **more)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(InputError) as told:
        read_progress(path)
    assert ("damaged" in str(told.value)) == ("remove" in str(told.value)) == damaged
    if not damaged:
        assert str(told.value) == f"{path / MODEL}: cannot be read: {os.strerror(number)}"


def test_an_index_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def fail(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # as of read(2): without the name

    save(Checkpoints(tmp_path), 1)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(InputError, match=f"^{tmp_path / 'checkpoint' / 'last'}: cannot be read: Input/output error$"):
        locate(tmp_path)


def test_a_lock_that_cannot_be_closed_hides_no_error(tmp_path):
    class Lock:
        def close(self):
            raise OSError("of no importance")

    def fail():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints._lock = Lock()
            raise RunError("worth telling")

    with pytest.raises(RunError, match="worth telling"):
        fail()


def records(path: Path) -> list[dict]:
    return [json.loads(line.removeprefix("DLLL ")) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("rows", ["groups", "none"])
def test_a_run_killed_behind_its_last_checkpoint_gets_the_summary_of_its_log(data, tmp_path, monkeypatch, rows):
    if rows == "none":  # of the test set: the loss is all that an epoch ends with
        data = planted_data(tmp_path / "set", train=200, test=0)
    with monkeypatch.context() as patched:
        patched.setattr("widedeep.journal.Journal.finish", stop)
        assert main(words(data, tmp_path, "fused")) == 130
    for _ in range(2):  # and gets it once
        assert main(words(data, tmp_path, "fused", "--use_checkpoint")) == 0
        for name in ("metrics.jsonl", "log.json"):
            assert [r["step"] for r in records(tmp_path / "results" / name) if r.get("step") == []] == [[]]
        metrics = records(tmp_path / "results" / "metrics.jsonl")
        key = "loss_val" if rows == "groups" else "loss"
        assert metrics[-1]["step"] == []
        assert metrics[-1][key] == metrics[-2][key]


@pytest.mark.parametrize(("every", "at"), [(7, "evaluation"), (3, "step")])
def test_the_records_of_a_run_that_goes_on_are_those_of_one_run(data, tmp_path, monkeypatch, every, at):
    """One clock, each evaluation once, progress that begins where it was, and a TensorBoard that forgets the rest."""
    bars, events, real = [], [], RunLog.progress

    def progress(self, *told):
        bars.append(told)
        return real(self, *told)

    class Events:
        def __init__(self, directory, first_step):
            events.append((directory, first_step))

        log = metadata = close = lambda *told: None

    monkeypatch.setattr(RunLog, "progress", progress)
    monkeypatch.setattr("widedeep.logs.TensorBoard", Events)
    flags = words(data, tmp_path, "fused", "--num_epochs", "2", "--checkpoint_every_steps", str(every), "--log_every")
    flags += ["1", "--tensorboard"]
    calls = count(1)
    with monkeypatch.context() as patched:
        if at == "step":
            add = LossWatch.add
            patched.setattr(LossWatch, "add", lambda *told: stop() if next(calls) == 6 else add(*told))
        else:
            patched.setattr("widedeep.train.note_score", stop)
        assert main(flags) == 130
    done = read_progress(Checkpoints(tmp_path / "model").find("last")).step
    assert done == (7 if at == "evaluation" else 3)
    metrics = tmp_path / "results" / "metrics.jsonl"
    lines = [json.loads(line) | {"seconds": 1000.0} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([*flags, "--use_checkpoint"]) == 0
    assert events == [(tmp_path / "model" / "event_files", first) for first in (0, done + 1)]
    resumed = [] if at == "evaluation" else [("epoch 1/2", 200, 3 * 32)]
    assert bars == [("epoch 1/2", 200, 0), *resumed, ("epoch 2/2", 200, 0)]
    for name in ("metrics.jsonl", "log.json"):
        told = [record for record in records(tmp_path / "results" / name) if len(record.get("step", "")) == 2]
        names = [record["step"][0] for record in told if "loss_val" in record.get("data", record)]
        assert names == [STEPS, 2 * STEPS]
        assert [record["step"][0] for record in told if "loss" in record.get("data", record)] == [*range(1, 15)]
    assert all(record["seconds"] >= 1000 for record in records(metrics))


def test_a_run_that_another_one_overtook_is_refused(data, tmp_path, monkeypatch, capsys):
    """Both found no checkpoint; the other one was done before this one had its lock."""
    assert main(words(data, tmp_path / "other", "fused")) == 0
    real = resume.Run.open

    def slowly(*told):
        shutil.copytree(tmp_path / "other" / "model", tmp_path / "model")
        return real(*told)

    monkeypatch.setattr(resume.Run, "open", slowly)
    assert main(words(data, tmp_path, "fused", "--seed", "6")) == 2
    assert "another run has just written it" in capsys.readouterr().err
    theirs, ours = (out / "model" / "checkpoint" for out in (tmp_path / "other", tmp_path))
    found = sorted(path.relative_to(theirs) for path in theirs.rglob("*"))
    assert found == sorted(path.relative_to(ours) for path in ours.rglob("*"))
    assert all((theirs / path).read_bytes() == (ours / path).read_bytes() for path in found if (ours / path).is_file())


def test_records_of_another_run_get_no_summary(data, tmp_path):
    assert main(words(data, tmp_path, "fused")) == 0
    metrics = tmp_path / "results" / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:-1]))
    summary = tmp_path / "results" / "data_summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"begun": "yesterday"}))
    before = metrics.read_bytes()
    assert main(words(data, tmp_path, "fused", "--use_checkpoint")) == 0
    assert metrics.read_bytes() == before
