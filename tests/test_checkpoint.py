"""Checkpoints: what is read is what was written, damage is found and named, and nothing is lost on the way."""

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from widedeep import checkpoint
from widedeep.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoints,
    Progress,
    load_arrays,
    locate,
    read_arrays,
    read_progress,
)
from widedeep.errors import InputError, RunError
from widedeep.progress import ADDED, SEAL

ROOT = Path(__file__).resolve().parents[1]


def arrays(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    flat = torch.rand(10, generator=g)
    return {"deep.table.a": torch.rand(4, 3, generator=g), "wide.table.a": flat[:4], "wide.table.b": flat[4:]}


def slots(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed + 100)
    return {"last_step.a": torch.randint(0, 9, (4,), generator=g, dtype=torch.int32), "scale": torch.tensor(2.0**15)}


def save(checkpoints: Checkpoints, step: int, best: int | None = None, begun: str | None = None):
    """best: the step of the best one so far."""
    told = {"seed": 3, "rows": 100, "global_batch_size": 10, "epoch": 1, "best": 0.5, "begun": begun}
    progress = Progress(**told, step=step, position=step % 10, best_step=best)
    return checkpoints.save(arrays(step), slots(step), progress, {"config.yaml": "a: 1\n"})


def test_round_trip_gives_the_same_bits(tmp_path):
    path = save(Checkpoints(tmp_path), 17)
    into = {name: torch.full_like(t, float("nan")) for name, t in arrays(17).items()}
    load_arrays(path, MODEL, into)
    for name, want in arrays(17).items():
        assert torch.equal(into[name], want)
    for name, want in slots(17).items():
        assert torch.equal(read_arrays(path, OPTIMIZER)[name], want)
        assert read_arrays(path, OPTIMIZER)[name].dtype == want.dtype
    progress = read_progress(path)
    assert (progress.step, progress.epoch, progress.position, progress.best) == (17, 1, 7, 0.5)


def test_a_checkpoint_from_before_the_rows_were_noted_is_read(tmp_path):
    path = save(Checkpoints(tmp_path), 17)
    state = json.loads((path / STATE).read_text())
    for name in (*ADDED, SEAL):
        del state[name]
    (path / STATE).write_text(json.dumps(state))
    progress = read_progress(path)
    assert all(getattr(progress, name) is None for name in ADDED)


def test_all_files_have_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(Checkpoints(tmp_path), 17)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}


def test_keeps_the_last_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4, 5):
        save(checkpoints, step, best=2 if step >= 2 else None)
    assert [path.name for path in checkpoints.steps()] == ["step-2", "step-4", "step-5"]
    assert checkpoints.find("last").name == "step-5"
    assert checkpoints.find("best").name == "step-2"
    assert locate(tmp_path).name == locate(tmp_path / "checkpoint").name == "step-2"
    assert locate(tmp_path / "checkpoint" / "step-4").name == "step-4"
    assert locate(tmp_path, "last").name == "step-5"


def test_checkpoints_are_ordered_and_counted_by_their_steps(tmp_path):
    """Not by their names; one that is saved again, as at the end of an epoch, counts once."""
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (8, 9, 10, 100, 100, 100):
        save(checkpoints, step)
    assert [path.name for path in checkpoints.steps()] == ["step-9", "step-10", "step-100"]
    (checkpoints.directory / "last").unlink()
    assert checkpoints.find("last").name == checkpoints.find("best").name == "step-100"


def test_what_was_moved_aside_does_not_take_the_place_of_its_successor(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        path = save(checkpoints, 3)
        aside = path.with_name(".step-3.partial-elsewhere-77-previous")
        aside.mkdir()
        (aside / STATE).write_text("{}")
        checkpoints.prepare()
    assert read_progress(path).step == 3
    assert {each.name for each in path.parent.iterdir()} == {"last", "lock", "step-3"}


@pytest.mark.parametrize("place", [-1, 2**20 + 5, 4096])
def test_a_byte_anywhere_in_a_large_file_is_checked(tmp_path, place):
    progress = Progress(seed=3, rows=100, global_batch_size=10, step=1)
    path = Checkpoints(tmp_path).save({"w": torch.zeros(600_000)}, {}, progress, {})
    assert read_progress(path).step == 1
    content = bytearray((path / MODEL).read_bytes())
    content[place] ^= 1
    (path / MODEL).write_bytes(content)
    with pytest.raises(InputError, match=f"{MODEL}: damaged checkpoint: the file's xxh3-64 is"):
        read_progress(path)


def test_an_old_run_goes_only_when_the_new_one_has_saved(tmp_path):
    save(Checkpoints(tmp_path), 50, best=50)
    fresh = Checkpoints(tmp_path)
    assert fresh.find("last").name == "step-50"
    save(fresh, 10)
    assert [path.name for path in fresh.steps()] == ["step-10"]
    assert fresh.find("best").name == "step-10"  # the old run's best is no longer an answer


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    """Else a machine that loses its power may lose both."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    old = save(checkpoints, 1)
    events = []

    def fsync(handle, original=os.fsync):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        original(handle)

    def replace(source, target, original=os.replace):
        original(source, target)
        events.append(("rename", Path(target).name))

    def rename(self, target, original=Path.rename):
        original(self, target)
        events.append(("rename", Path(target).name))

    def rmtree(path, original=shutil.rmtree, **options):
        events.append(("remove", Path(path).name))
        original(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    new = save(checkpoints, 2, best=2)
    renamed = events.index(("rename", new.name))
    removed = next(i for i, (event, name) in enumerate(events) if name.startswith(f".{old.name}.") and event != "sync")
    written = {name for event, name in events[:renamed] if event == "sync"}
    assert written >= {path.name for path in new.iterdir()}
    assert any(name.startswith(f".{new.name}.") for name in written)
    index = events.index(("rename", "last"))
    assert events[index - 1][0] == "sync"
    assert index < events.index(("sync", checkpoints.directory.name)) < removed


def test_a_file_system_that_syncs_no_directories_will_do(tmp_path, monkeypatch):
    def fsync(handle):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    assert save(Checkpoints(tmp_path), 3).is_dir()


def test_a_disk_that_fails_late_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    old = save(checkpoints, 1)

    def fsync(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match="untouched"):
        save(checkpoints, 2)
    assert checkpoints.steps() == [old]
    assert read_progress(old).step == 1


def test_resumed_run_prunes_what_it_adopted(tmp_path):
    first = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        last = save(first, step, best=1)
    second = Checkpoints(tmp_path, keep_last=2)
    second.adopt(last)
    save(second, 4, best=1)
    assert [path.name for path in second.steps()] == ["step-1", "step-3", "step-4"]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, "config.yaml"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_named_with_the_older_checkpoint(tmp_path, name, damage):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        path = save(checkpoints, step) / name
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-5])
    elif damage == "flip":
        data[len(data) // 2] ^= 0x80  # never a character of JSON
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(InputError, match=rf"step-3/{name}: damaged checkpoint: the file.*step-2 instead"):
        read_progress(checkpoints.find("last"))


def test_no_flipped_bit_of_the_state_moves_a_run(tmp_path):
    """A 3 that became a 2 is JSON still, and another place in the data."""
    path = save(Checkpoints(tmp_path), 17)
    whole, before = (path / STATE).read_bytes(), read_progress(path)
    unmoved = 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << random.randrange(8)
        (path / STATE).write_bytes(data)
        with contextlib.suppress(InputError):
            assert read_progress(path) == before, data
            unmoved += 1
    assert unmoved < len(whole) * 0.1  # a flip in the name of the checksum, say


def test_another_model_is_refused(tmp_path):
    path = save(Checkpoints(tmp_path), 1)
    with pytest.raises(InputError, match=r"the model lacks the array 'wide\.table\.b'"):
        load_arrays(path, MODEL, {name: t for name, t in arrays(1).items() if name != "wide.table.b"})
    with pytest.raises(InputError, match=r"'deep.table.a' is float32 \[4, 3\], the model's is float32 \[5, 3\]"):
        load_arrays(path, MODEL, arrays(1) | {"deep.table.a": torch.zeros(5, 3)})
    with pytest.raises(InputError, match=r"'wide.table.b' is float32 \[6\], the model's is float64 \[6\]"):
        load_arrays(path, MODEL, arrays(1) | {"wide.table.b": torch.zeros(6, dtype=torch.float64)})
    with pytest.raises(InputError, match=r"the file lacks the array 'wide\.table\.c'"):
        load_arrays(path, MODEL, arrays(1) | {"wide.table.c": torch.zeros(6)})


FULL_DISK = """
import resource, sys
import torch
from widedeep.checkpoint import Checkpoints, Progress
from widedeep.errors import RunError
checkpoints = Checkpoints(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
progress = Progress(seed=1, rows=1, global_batch_size=1, step=9)
try:
    checkpoints.save({"big": torch.zeros(100_000)}, {}, progress, {})
except RunError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    before = save(Checkpoints(tmp_path), 1, best=1)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert "cannot write" in done.stdout
    assert "step-9" in done.stdout
    assert done.stderr == ""
    assert Checkpoints(tmp_path).find("last") == Checkpoints(tmp_path).find("best") == before
    read_progress(before)
    assert not [path for path in (tmp_path / "checkpoint").iterdir() if path.name.startswith(".")]


def test_checkpoint_without_its_state_is_named_and_not_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    newest = [save(checkpoints, step) for step in (1, 2)][1]
    (newest / STATE).unlink()
    with pytest.raises(InputError, match=r"step-2/state.json: .* is missing; remove .*step-2 to use step-1 instead"):
        checkpoints.find("last")
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert checkpoints.find("last").name == "step-1"


def test_a_checkpoint_is_written_beside_what_follows(device, tmp_path, monkeypatch):
    begins, may_go_on = threading.Event(), threading.Event()
    real = checkpoint.write_tensors

    def slow(path, tensors):
        begins.set()
        assert may_go_on.wait(60)
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    weights, slots = ({name: t.to(device) for name, t in arrays(seed).items()} for seed in (1, 2))
    progress = Progress(seed=1, rows=1, global_batch_size=1, step=9)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(weights, slots, progress, {}, beside=True)
        assert begins.wait(60)
        for t in (*weights.values(), *slots.values()) if device == "cuda" else ():
            t.zero_()  # the next step
        progress.step = 10
        assert checkpoints.steps() == []
        may_go_on.set()
    path = Checkpoints(tmp_path).find("best")
    assert read_progress(path).step == 9
    for name, want in ((MODEL, arrays(1)), (OPTIMIZER, arrays(2))):
        got = read_arrays(path, name)
        assert all(torch.equal(got[key], array) for key, array in want.items())


def test_a_failed_write_beside_is_raised_by_the_next_call_or_by_leaving(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", fails)
    told = (arrays(1), {}, Progress(seed=1, rows=1, global_batch_size=1, step=9), {})

    def use(then):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(*told, beside=True)
            then(checkpoints)

    for then in (lambda checkpoints: checkpoints.save(*told), lambda checkpoints: None):
        with pytest.raises(RunError, match="step-9: No space left"):
            use(then)
    with pytest.raises(ZeroDivisionError):  # what went wrong first
        use(lambda checkpoints: 1 / 0)
    assert Checkpoints(tmp_path).steps() == []


def test_one_run_at_a_time_writes_here(tmp_path):
    with Checkpoints(tmp_path) as first:
        first.prepare()
        first.prepare()
        with Checkpoints(tmp_path) as second, pytest.raises(InputError, match="another run is writing it"):
            second.prepare()
    with Checkpoints(tmp_path) as second:
        second.prepare()


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    others = tmp_path / "checkpoint" / ".step-5.partial-elsewhere-77"  # of a run that may be alive
    others.mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare()
        save(checkpoints, 1)
    assert checkpoints.find("last").name == "step-1"
    assert others.is_dir()


def test_what_a_kill_inside_a_save_left_is_mended(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        path = save(checkpoints, 3)
        path.rename(path.with_name(".step-3.partial-elsewhere-77-previous"))
        for name in (".step-3.partial-elsewhere-77", ".step-10.partial-an-old-host-5"):
            path.with_name(name).mkdir()
            path.with_name(name).joinpath(MODEL).write_text("half")
        checkpoints.prepare()
    assert checkpoints.find("last") == path
    assert read_progress(path).step == 3
    assert {each.name for each in path.parent.iterdir()} == {"last", "lock", "step-3"}


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"..", b"x" * 5000])
def test_a_damaged_index_is_a_stale_one(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare()
        save(checkpoints, 1, best=1)
        path = save(checkpoints, 2)
        (checkpoints.directory / "last").write_bytes(damage)
        assert checkpoints.find("last") == checkpoints.find("best") == path
        save(checkpoints, 3)
        assert checkpoints.find("last").name == "step-3"


def test_names_outlive_a_locale_that_lacks_them(tmp_path):
    """A spec is read as UTF-8, so it is written as that wherever the run was."""
    code = (
        "from widedeep.checkpoint import Checkpoints, Progress;"
        "import sys;"
        "told = Progress(seed=1, rows=1, global_batch_size=1);"
        "Checkpoints(sys.argv[1]).save({}, {}, told, {'feature_spec.yaml': 'l\\u00e4nd'})"
    )
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=ascii_only, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert (locate(tmp_path) / "feature_spec.yaml").read_text(encoding="utf-8") == "länd"
