"""A killed run of the Outbrain preprocessing continues where it was, and leaves the same bytes as one that was not."""

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import main
from outbrain_checks import files

from preprocess.outbrain import OutbrainConfig, pipeline, resume, run
from widedeep import atomic
from widedeep.errors import InputError, RunError

SMALL = Path(__file__).parent / "data" / "outbrain"
STAGES = ["events", "documents", "promoted_content", "categories", "topics", "entities", "clicks", "transform train"]
STAGES += ["transform test"]

# Runs in a process of its own, which kills itself before the n-th call of a function, or for -n after it. A further
# word: names are exchanged by two renames.
KILLED = """
import os, pkgutil, signal, sys
from preprocess import csv_io
from preprocess.outbrain import OutbrainConfig, run
from widedeep import atomic
if sys.argv[5:]:
    atomic._libc = None
csv_io.BLOCK_BYTES = 40
place, function = sys.argv[3].rsplit(".", 1)
place, calls = pkgutil.resolve_name(place), int(sys.argv[4])
real = getattr(place, function)
def counted(*args, **kwargs):
    global calls
    calls -= 1
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    made = real(*args, **kwargs)
    calls += 2 * (calls < 0)
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return made
setattr(place, function, counted)
run(OutbrainConfig(sys.argv[1], sys.argv[2], workers=1, rows_per_shard=5, chunk_rows=4, multihot=True))
"""


def kill(data: Path, out: Path, function: str, call: int, *more: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, data, out, function, str(call), *more], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.fixture
def config(tmp_path):
    """Of a run that will find an earlier output in its place."""
    data = shutil.copytree(SMALL, tmp_path / "data")
    run(OutbrainConfig(data, tmp_path / "out", seed=5))
    return OutbrainConfig(data, tmp_path / "out", rows_per_shard=5, multihot=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(OutbrainConfig(SMALL, out, rows_per_shard=5, multihot=True))
    return files(out)


@pytest.mark.parametrize(
    ("function", "call", "finished"),
    [
        ("preprocess.outbrain.tables.read_events", 1, 0),
        ("preprocess.outbrain.tables.read_promoted", 1, 2),
        ("preprocess.outbrain.clicks.scan", 3, 6),
        ("preprocess.outbrain.transform.run", 2, 7),
        ("preprocess.outbrain.pipeline.ShardWriter.finish", 2, 8),
        ("widedeep.atomic.commit", 3, 9),
    ],
)
def test_a_killed_run_continues_at_the_last_finished_stage(config, whole, function, call, finished):
    before = files(config.out)
    kill(config.data_path, config.out, function, call)
    assert files(config.out) == before
    report = run(config)
    assert report["resumed_stages"] == STAGES[:finished]
    assert list(report["stages"]) == STAGES
    assert files(config.out) == whole
    assert sorted(p.name for p in config.out.parent.iterdir()) == ["data", "out"]


def test_the_command_says_that_it_continued(config, capsys):
    kill(config.data_path, config.out, "preprocess.outbrain.clicks.scan", 3)
    words = ["preprocess", "outbrain", "--data_path", str(config.data_path), "--out", str(config.out)]
    words += ["--rows_per_shard", "5", "--multihot"]
    assert main(words) == 0
    assert "continued a run that was stopped after entities" in capsys.readouterr().out
    assert main(words) == 0
    assert "continued" not in capsys.readouterr().out


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "read-only")])
def test_a_place_that_cannot_be_written_is_named_as_it_was_asked_for(config, monkeypatch, fault):
    """Not by its absolute path, nor where a link leads."""
    monkeypatch.chdir(config.out.parent)
    Path("link").symlink_to("elsewhere")

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr("preprocess.outbrain.resume.Journal.add", fail)
    with pytest.raises((InputError, RunError), match=r"^cannot write link: "):
        run(dataclasses.replace(config, out=Path("link")))


def test_an_output_moved_aside_when_the_kill_came_is_put_back(config, whole):
    before = files(config.out)
    # Both shard sets, the old output, the new one.
    kill(config.data_path, config.out, "pathlib.Path.rename", 4, "two renames")
    assert not config.out.exists()
    with pytest.raises(InputError, match="expected statistics"):
        run(dataclasses.replace(config, stats=config.data_path))
    assert files(config.out) == before
    run(config)
    assert files(config.out) == whole


def test_an_output_that_was_just_exchanged_when_the_kill_came_is_not_exchanged_again(config, whole):
    """The earlier one is then where the journal says that the new one is."""
    before, part = files(config.out), config.out.with_name(".out.part")
    kill(config.data_path, config.out, "widedeep.atomic._exchange", -1)
    if files(config.out) == before:
        pytest.skip("this file system exchanges no names")
    assert (files(config.out), files(part / "out")) == (whole, before)
    assert run(config)["resumed_stages"] == []
    assert files(config.out) == whole
    assert not part.exists()


def test_an_output_that_cannot_be_put_back_is_not_removed(config, whole, monkeypatch):
    before, real = files(config.out), Path.rename
    monkeypatch.setattr(atomic, "_libc", None)

    def rename(self, to):
        if Path(to) == config.out:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(RunError, match=r"Permission denied; what was there before is now (.*)$") as told:
            run(config)
    assert files(Path(str(told.value).rpartition(" is now ")[2])) == before
    run(config)
    assert files(config.out) == whole


def test_an_output_behind_a_link_that_cannot_be_renamed_is_named_as_it_was_asked_for(config, monkeypatch):
    real = Path.rename

    def rename(self, to):
        if Path(to) == config.out:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, to)

    shutil.rmtree(config.out, ignore_errors=True)
    link = config.out.with_name("link")
    link.symlink_to(config.out)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match=f"^cannot write {link}: No space left on device"):
        run(dataclasses.replace(config, out=link))


@pytest.mark.parametrize("change", ["seed", "rows_per_shard", "input", "boot"])
def test_a_stale_journal_is_ignored(config, change, tmp_path, monkeypatch):
    kill(config.data_path, config.out, "preprocess.outbrain.transform.run", 2)
    if change == "input":
        path = config.data_path / "documents_meta.csv"
        path.write_text(path.read_text().replace("100,50,60", "100,51,60"))
        os.utime(path, ns=(0, 0))
    elif change == "boot":
        monkeypatch.setattr(resume, "_boot", lambda: "another")
    else:
        config = dataclasses.replace(config, **{change: 7})
    assert run(config)["resumed_stages"] == []
    run(dataclasses.replace(config, out=tmp_path / "fresh"))
    assert files(config.out) == files(tmp_path / "fresh")


OTHER = {"flavour": "spark", "multihot": False, "numeric": "float16", "rows_per_shard": 7, "seed": 3, "device": "cuda"}
FREE = {"data_path", "out", "stats", "engine", "workers", "scheduler", "memory_limit", "chunk_rows"}  # files count


def test_a_journal_is_of_all_that_the_output_depends_on(config, tmp_path):
    """Every setting, the inputs and the statistics that are given, by their sizes and times."""
    files = sorted(config.data_path.iterdir())
    given = tmp_path / "given"
    given.mkdir()
    (given / "statistics.json").write_text("{}")
    config = dataclasses.replace(config, stats=given)
    names = {field.name for field in dataclasses.fields(config)}
    assert names == {*OTHER, *FREE}
    key = pipeline._key(config, files)
    assert key == pipeline._key(config, files)
    for name, value in OTHER.items():
        changed = dataclasses.replace(config, multihot=False, **({name: value} if name != "multihot" else {}))
        base = dataclasses.replace(config, multihot=name == "multihot")
        assert pipeline._key(changed, files) != pipeline._key(base, files), name
    assert pipeline._key(config, files[1:]) != key
    for path in (files[0], given / "statistics.json"):
        was = path.stat()
        os.utime(path, ns=(0, was.st_mtime_ns + 1))
        assert pipeline._key(config, files) != key
        os.utime(path, ns=(0, was.st_mtime_ns))
        assert pipeline._key(config, files) == key


def test_workers_and_memory_may_change_before_a_run_continues(config, whole):
    kill(config.data_path, config.out, "preprocess.outbrain.transform.run", 2)
    report = run(dataclasses.replace(config, workers=2, memory_limit=2**30))
    assert report["resumed_stages"] == STAGES[:7]
    assert files(config.out) == whole


def test_a_damaged_journal_is_ignored(config, whole):
    kill(config.data_path, config.out, "preprocess.outbrain.transform.run", 2)
    (config.out.parent / ".out.part" / "journal.json").write_text('{"key": ')
    assert run(config)["resumed_stages"] == []
    assert files(config.out) == whole


def test_a_journal_that_another_run_did_not_take_is_gone(tmp_path, monkeypatch):
    """That one was killed before its first stage was done; its directories may have the numbers of those before."""
    monkeypatch.setattr(resume.Journal, "_inode", lambda self: 7)
    resume.Journal(tmp_path, {"seed": 1}).add("events", {})
    assert resume.Journal(tmp_path, {"seed": 1}).stages == {"events": {}}
    for seed in (2, 1):
        assert resume.Journal(tmp_path, {"seed": seed}).stages == {}


def test_two_runs_do_not_write_one_output(config):
    before = files(config.out)
    part = config.out.parent / ".out.part"
    part.mkdir()
    with open(part / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing it"):
            run(config)
    assert files(config.out) == before
    assert part.is_dir()
