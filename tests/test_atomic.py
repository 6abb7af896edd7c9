"""What may be replaced: an earlier output that holds nothing else and that the run does not read."""

import errno
import os
import socket
import subprocess
from pathlib import Path

import pytest
from test_tabular import CSV, write_spec

from preprocess.tabular import TabularConfig, run
from widedeep import atomic
from widedeep.atomic import write_errors
from widedeep.errors import InputError
from widedeep.shards import DATA_SET_OUTPUT, ShardSet

OUTPUT = atomic.Output("marker", ("marker", "parts/*.part"))


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
