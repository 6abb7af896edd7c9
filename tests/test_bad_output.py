"""Places that cannot be written, through the command line: an exit code, one sentence that names the place, and nothing
lost.
"""

import errno
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import contents, main, train_words
from test_bad_input import OUTBRAIN, SPEC

from preprocess.outbrain import store
from preprocess.synthetic import generate
from widedeep import logs, predict, shard_part
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.restore import save_model


def writers(root: Path, out: Path) -> dict[str, list]:
    """A command for each kind of output, into `out`."""
    data, model = root / "data", root / "model"
    score = ["--model", model, "--dataset_path", data, "--cpu"]
    return {
        "synth": ["synth", "--displays", "50", "--out", out / "s"],
        "outbrain": ["preprocess", "outbrain", "--data_path", OUTBRAIN, "--out", out / "o"],
        "model": train_words(data, out, "--results_dir", root / "elsewhere"),
        "results": train_words(data, out, "--model_dir", root / "elsewhere"),
        "predict": ["predict", *score, "--out", out / "p.parquet"],
        "predict csv": ["predict", *score, "--out", out / "p.csv"],
        "evaluate": ["evaluate", *score, "--out", out / "e.json"],
        "export": ["export", "--model", model, "--format", "pt2", "--out", out / "x"],
        "report": ["report", root / "results", "--out", out / "r.html"],
    }


no_plots = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
NAMES = ("synth", "outbrain", "model", "results", "predict", "predict csv", "evaluate", "export")
NAMES += (pytest.param("report", marks=no_plots),)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_below_a_file(copy, refuse, name):
    (copy / "file").write_text("here first")
    refuse(writers(copy, copy / "file")[name], 2, str(copy / "file"))
    assert (copy / "file").read_text() == "here first"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("name", NAMES)
def test_an_output_without_permission(copy, refuse, name):
    (copy / "locked").mkdir(mode=0o500)
    refuse(writers(copy, copy / "locked")[name], 2, str(copy / "locked"))
    assert not list((copy / "locked").iterdir())


FULL_DISK = """
import resource, sys
from widedeep import cli
# Every file may have 200 bytes: the system then answers as a full disk does, in the middle of a write.
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(copy, name):
    out = copy / "full"
    out.mkdir()
    before = contents(copy)
    words = list(map(str, writers(copy, out)[name]))
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *words], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in lines if str(out) in line or str(copy / "elsewhere") in line] == lines[-1:]
    after = contents(copy)
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("command", ["outbrain", "tabular"])
def test_a_full_disk_under_shards_names_the_place_that_was_asked_for(tmp_path, monkeypatch, refuse, command):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spec, table, out = tmp_path / "spec.yaml", tmp_path / "t.csv", tmp_path / "out"
    spec.write_text(yaml.safe_dump(SPEC))
    table.write_text("colour,size,bought\n1,2.5,0\n4,1,1\n")
    given = {"outbrain": ["--data_path", OUTBRAIN], "tabular": [table, "--spec", spec, "--split", "last:1"]}
    monkeypatch.setattr(shard_part, "open", full, raising=False)
    refuse(["preprocess", command, *given[command], "--out", out], 1, f"cannot write {out}/train: No space left")


def test_paths_that_are_no_text(copy, refuse):
    """Libraries that open no such file must not find that out when a training is done."""
    odd = copy / os.fsdecode(b"\xff")
    refuse(train_words(copy / "data", odd), 2, "expected a path in UTF-8")
    assert not odd.exists()
    (copy / "model").rename(odd)
    score = ["--dataset_path", copy / "data", "--cpu"]
    refuse(["evaluate", "--model", odd, *score], 2, "expected a path in UTF-8")
    refuse(["evaluate", "--model", next((odd / "checkpoint").glob("step-*")), *score], 2, "expected a path in UTF-8")
    model = WideDeep(FeatureSpec.load(copy / "data"), (4,))
    with pytest.raises(InputError, match="expected a path in UTF-8"):
        save_model(model, odd / "mine")
    data = (copy / "data").rename(copy / os.fsdecode(b"d\xff"))
    assert main(["describe", str(data), "--out", str(copy / "d.html")]) == 0
    assert "d\\udcff" in (copy / "d.html").read_text()


class Late(io.FileIO):
    """A file of a disk that says only at the end that it is full, as network file systems may."""

    def close(self):
        if not self.closed:
            super().close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["predict", "predict csv", "synth"])
def test_a_disk_that_is_found_full_when_a_file_is_closed(copy, refuse, monkeypatch, name):
    words = [*writers(copy, copy / "full")[name], *["--truth"] * (name == "synth")]
    monkeypatch.setattr(generate if name == "synth" else predict, "open", Late, raising=False)
    refuse(words, 1, f"cannot write {copy / 'full'}", "No space left")
    assert not list((copy / "full").iterdir())


@pytest.mark.parametrize("call", ["log", "metadata"])
def test_a_log_that_fails_is_named_whatever_is_written(copy, refuse, monkeypatch, call):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(logs.DlllLines, call, fail)
    refuse(train_words(copy / "data", copy / "new"), 1, f"cannot write {copy / 'new'}", "No space left")


CUT_OFF = """
import resource, sys
import numpy as np
from pathlib import Path
from preprocess.outbrain.store import save_array
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save_array(Path(sys.argv[1]), np.arange(6))
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.mark.parametrize("room", [128, 175])
def test_an_array_cut_off_by_a_full_disk(tmp_path, room):
    """Even one that is smaller than its header, or that lacks its last byte alone."""
    done = subprocess.run([sys.executable, "-c", CUT_OFF, tmp_path / "a.npy", str(room)], capture_output=True)
    assert done.returncode == errno.EFBIG, done.stderr.decode()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array",
    [np.arange(6)[::2], np.empty((0, 3), np.float16), np.array(True), np.ones((2, 3)).T, np.arange(4, dtype=">i2")],
)
def test_an_array_is_written_as_numpy_writes_it(tmp_path, array):
    store.save_array(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", np.asarray(array, order="C"))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
