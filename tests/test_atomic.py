"""What may be replaced: an earlier output that holds nothing else and that the run does not read."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_tabular import CSV, write_spec

from preprocess.tabular import TabularConfig, run
from widedeep import atomic
from widedeep.atomic import write_errors
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import DATA_SET_OUTPUT, ShardSet, ShardWriter

OUTPUT = atomic.Output("marker", ("marker", "parts/*.part"))

# Replaces an output in a process of its own, which kills itself at the n-th place between two changes of names.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from widedeep import atomic
left = int(sys.argv[2])
if sys.argv[3] == "two renames":
    atomic._libc = None
def place():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
def between(real):
    def call(*args, **more):
        place()
        made = real(*args, **more)
        place()
        return made
    return call
Path.rename, atomic._exchange, shutil.rmtree = map(between, (Path.rename, atomic._exchange, shutil.rmtree))
with atomic.directory(Path(sys.argv[1]), atomic.Output("marker")) as out:
    (out / "marker").write_text("new")
"""


def replace(target, reads=()):
    with atomic.directory(target, OUTPUT, reads) as out:
        (out / "marker").write_text("new")


def make(directory, *files):
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("old")
    return directory


def test_an_earlier_output_is_replaced_whole(tmp_path):
    replace(make(tmp_path / "out", "marker", "parts/a.part"))
    assert (tmp_path / "out" / "marker").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["marker"]


def without_exchange(monkeypatch, number: int | None = None) -> None:
    """As on a system that lacks the call, or that answers it with an error."""

    def refuse(*_):
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(atomic, "_libc", SimpleNamespace(**{"renameat2": refuse} if number else {}))


def can_exchange(directory) -> bool:
    one, other = (make(directory / name, "marker") for name in ("one", "other"))
    return atomic._exchange(one, other)


@pytest.mark.parametrize("number", [None, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_a_system_that_cannot_exchange_names_renames_twice(tmp_path, monkeypatch, number):
    without_exchange(monkeypatch, number)
    assert not can_exchange(tmp_path / "probe")
    replace(make(tmp_path / "out", "marker", "parts/a.part"))
    assert (tmp_path / "out" / "marker").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["out", "probe"]
    assert os.listdir(tmp_path / "out") == ["marker"]


def test_an_exchange_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    without_exchange(monkeypatch, errno.EIO)
    with pytest.raises(RunError, match=r"out: Input/output error; what was there before is untouched$"):
        replace(make(tmp_path / "out", "marker"))
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "marker").read_text() == "old"


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_a_kill_at_any_place_of_a_replacement_leaves_one_of_the_two(tmp_path, how):
    """Under its name where names can be exchanged, else after the next run's mending; and nothing beside it."""
    if how == "exchange" and not can_exchange(tmp_path / "probe"):
        pytest.skip("this file system exchanges no names")
    seen = []
    for place in range(1, 20):
        target = make(tmp_path / str(place) / "out", "marker")
        done = subprocess.run([sys.executable, "-c", KILLED, target, str(place), how], capture_output=True)
        if not done.returncode:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        if how == "exchange":
            assert (target / "marker").is_file(), place
        with pytest.raises(RuntimeError), atomic.directory(target, OUTPUT):
            raise RuntimeError("the next run fails too")
        assert os.listdir(target.parent) == ["out"]
        seen.append((target / "marker").read_text())
    assert seen == sorted(seen, reverse=True)  # the old one up to a place, the new one from there on
    assert {"old", "new"} == set(seen)


@pytest.mark.parametrize("stranger", ["letter", "parts/a.txt", "model/marker", ".hidden", "parts/deep/a"])
def test_what_lies_beside_an_earlier_output_is_kept(tmp_path, stranger):
    target = make(tmp_path / "out", "marker", stranger)
    with pytest.raises(InputError, match=f"beside an earlier output it holds {stranger}"):
        replace(target)
    assert (target / stranger).read_text() == (target / "marker").read_text() == "old"


def test_a_link_within_is_not_an_output_of_ours(tmp_path):
    target = make(tmp_path / "out", "marker")
    (target / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(InputError, match="it holds elsewhere"):
        replace(target)


@pytest.mark.parametrize("read", ["parts/a.part", "parts", "."])
def test_what_the_run_reads_is_not_replaced(tmp_path, read):
    target = make(tmp_path / "out", "marker", "parts/a.part")
    (tmp_path / "link").symlink_to(target / read)
    for path in (target / read, tmp_path / "link"):
        with pytest.raises(InputError, match="this run reads"):
            replace(target, [path])
    replace(target, [make(tmp_path / "out.csv", "a") / "a"])


@pytest.mark.parametrize("name", ["out", "fold [1]", "a*b"])
def test_what_a_kill_left_is_mended(tmp_path, name):
    target = tmp_path / name
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = f".{name}.partial-{socket.gethostname()}-{gone.pid}"
    make(tmp_path, f"{left}/half", f"{left}-previous/marker", f".{name}.partial-elsewhere-1/half")
    with pytest.raises(RuntimeError), atomic.directory(target, OUTPUT):
        raise RuntimeError("the next run fails too")
    assert sorted(os.listdir(tmp_path)) == sorted([name, f".{name}.partial-elsewhere-1"])
    assert (target / "marker").read_text() == "old"


def test_errors_name_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path, "file"))
    with pytest.raises(InputError, match=r"^cannot write file/out: File exists$"):
        replace(Path("file/out"))
    with pytest.raises(InputError, match=r"^cannot write p\.csv: Read-only file system$"), write_errors(Path("p.csv")):
        raise OSError(errno.EROFS, "Failed to open local file '.p.csv.0a1b'. Detail: [errno 30] Read-only file system")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path, there):
    real = tmp_path / "big" / "data"
    if there:
        make(real, "marker")
    (tmp_path / "data").symlink_to(real)
    replace(tmp_path / "data")
    assert (tmp_path / "data").is_symlink()
    assert (real / "marker").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["big", "data"]
    assert os.listdir(tmp_path / "big") == ["data"]


def _project(path):
    path.mkdir()
    (path / "train.csv").write_text(CSV)
    features = {"user": {"embedding_dim": 4, "transform": "vocabulary"}, "click": {"transform": {"positive": ["yes"]}}}
    write_spec(path / "feature_spec.yaml", features, ["user"])
    return path


def test_preprocessing_keeps_the_files_of_a_project(tmp_path):
    project = _project(tmp_path / "project")
    before = {path: path.read_bytes() for path in project.iterdir()}
    config = {"spec": project, "inputs": [str(project / "train.csv")], "split": "last:2"}
    with pytest.raises(InputError, match=r"holds no train/manifest\.json"):
        run(TabularConfig(out=project, **config))
    assert {path: path.read_bytes() for path in project.iterdir()} == before

    out = tmp_path / "out"
    run(TabularConfig(out=out, **config))
    assert DATA_SET_OUTPUT.marker in {path.relative_to(out).as_posix() for path in out.rglob("*")}
    run(TabularConfig(out=out, **config))  # nothing of ours is taken for somebody else's
    with pytest.raises(InputError, match="this run reads"):
        run(TabularConfig(out=out, **config | {"stats": out}))
    make(out, "model/weights")
    with pytest.raises(InputError, match="it holds model/weights"):
        run(TabularConfig(out=out, **config))
    assert ShardSet.open(out / "train", verify=True).rows == 4


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_output_that_was_moved_aside_is_put_back(tmp_path, monkeypatch, error):
    target, real = make(tmp_path / "out", "marker"), Path.rename
    without_exchange(monkeypatch)

    def rename(self, to):
        if to == target and not self.name.endswith("-previous"):
            raise error
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((RunError, KeyboardInterrupt)):
        replace(target)
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "marker").read_text() == "old"


def test_an_output_that_cannot_be_put_back_is_named_and_put_back_by_the_next_run(tmp_path, monkeypatch):
    target, real = make(tmp_path / "out", "marker"), Path.rename
    without_exchange(monkeypatch)

    def rename(self, to):
        if to == target:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(RunError, match=r"Input/output error; what was there before is now (.*-previous)$") as told:
            replace(target)
    aside = Path(str(told.value).rpartition(" is now ")[2])
    assert (aside / "marker").read_text() == "old"
    with pytest.raises(RuntimeError), atomic.directory(target, OUTPUT):
        raise RuntimeError("the next run fails too")
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "marker").read_text() == "old"


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def write(target, text="new"):
    with atomic.file(target) as partial:
        partial.write_text(text)


def test_a_file_behind_a_link_is_replaced_and_not_the_link(tmp_path):
    for name, there in (("a", True), ("b", False)):
        real = tmp_path / "big" / name
        if there:
            make(tmp_path, f"big/{name}")
        (tmp_path / name).symlink_to(real)
        write(tmp_path / name)
        assert (tmp_path / name).readlink() == real
        assert real.read_text() == "new"
    assert sorted(os.listdir(tmp_path / "big")) == ["a", "b"]


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null"):
        with pytest.raises(InputError, match=f"cannot write .*/{name}: it is there, and no regular file$"):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]
    assert not Path(os.devnull).is_file()


def test_what_a_kill_left_of_a_file_goes_with_the_next(tmp_path, gone):
    start = f".p.csv.partial-{socket.gethostname()}"
    kept = [".p.csv.partial-elsewhere-1-0a1b2c3d", f"{start}-{os.getppid()}-0a1b2c3d"]
    make(tmp_path, "p.csv", f"{start}-{gone}-0a1b2c3d", f"{start}-{os.getpid()}-0a1b2c3d", *kept)
    with atomic.file(tmp_path / "p.csv") as first:  # the other one's is no leftover
        first.write_text("first")
        write(tmp_path / "p.csv")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "p.csv"])
    assert (tmp_path / "p.csv").read_text() == "first"


def test_what_a_host_writes_whose_name_begins_like_ours_is_no_leftover(tmp_path, gone):
    theirs = [
        f".out.partial-{socket.gethostname()}-{gone}-77",
        f".out.partial-{socket.gethostname()}-{gone}-77-previous",
    ]
    for name in theirs:
        make(tmp_path / name, "marker")
    replace(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "out"])


def test_what_another_users_run_is_writing_is_no_leftover(tmp_path, gone, monkeypatch):
    """Whose process may not be sent a signal."""

    def kill(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", kill)
    theirs = [f".out.partial-{socket.gethostname()}-{gone}", f".out.partial-{socket.gethostname()}-{gone}-0a1b2c3d"]
    make(tmp_path, f"{theirs[0]}/half", theirs[1])
    replace(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "out"])


def test_a_leftover_that_may_not_be_removed_is_no_reason_not_to_write(tmp_path, gone, monkeypatch):
    """Another user's, say, in a directory where everybody may remove only their own."""
    left, real = f".p.csv.partial-{socket.gethostname()}-{gone}-0a1b2c3d", Path.unlink

    def unlink(self, **told):
        if self.name == left:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(self, **told)

    monkeypatch.setattr(Path, "unlink", unlink)
    make(tmp_path, left)
    write(tmp_path / "p.csv")
    assert sorted(os.listdir(tmp_path)) == sorted([left, "p.csv"])


def test_an_output_may_be_put_back_by_another_run_at_the_same_time(tmp_path, gone, monkeypatch):
    left, real = f".out.partial-{socket.gethostname()}-{gone}-previous", Path.rename

    def rename(self, to):
        if self.name == left:
            real(self, to)
        return real(self, to)

    make(tmp_path / left, "marker")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RuntimeError), atomic.directory(tmp_path / "out", OUTPUT):
        raise RuntimeError("begun, and not ended")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_a_shard_set_in_a_hidden_directory_is_named_as_it_was_asked_for(tmp_path, monkeypatch, call):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_none():
        with ShardWriter(tmp_path / ".hidden", FeatureSpec.outbrain(), final="asked/train"):
            pass

    monkeypatch.setattr(Path, call, fail)
    with pytest.raises(RunError, match=r"^cannot write asked/train: No space left"):
        write_none()
