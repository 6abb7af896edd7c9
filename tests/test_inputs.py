"""A file that changes while a run reads it ends the run: passes over different rows do not fit together."""

import os
import shutil

import pytest
import test_tabular_inputs
import test_tfrecord
from test_outbrain_resume import SMALL

from preprocess import outbrain, tabular, tfrecord
from preprocess.stages import Stages
from widedeep.errors import InputError


def outbrain_run(tmp_path):
    data = shutil.copytree(SMALL, tmp_path / "data")
    return data / "events.csv", lambda: outbrain.run(outbrain.OutbrainConfig(data, tmp_path / "out"))


def tabular_run(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(test_tabular_inputs.csv_bytes(test_tabular_inputs.rows()))
    spec = test_tabular_inputs.write_spec(tmp_path / "spec.yaml")
    return path, lambda: tabular.run(tabular.TabularConfig(spec, tmp_path / "out", [path], split="last:50"))


def tabular_run_with_test_files(tmp_path):
    tabular_run(tmp_path)
    path = shutil.copy(tmp_path / "a.csv", tmp_path / "b.csv")
    config = tabular.TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", [tmp_path / "a.csv"], [path])
    return path, lambda: tabular.run(config)


def records_run(tmp_path):
    test_tfrecord.write_directory(tmp_path / "data")
    config = tfrecord.TFRecordConfig(tmp_path / "data", tmp_path / "out")
    return tmp_path / "data" / "eval" / "part-r-00000", lambda: tfrecord.run(config)


def longer_at_the_same_moment(path):
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


EDITS = {
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "other": lambda path: os.utime(path, ns=(0, 0)),
    "longer at the same moment": longer_at_the_same_moment,
    "a moment later": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns ^ 1)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("begin", [outbrain_run, tabular_run, tabular_run_with_test_files, records_run])
def test_a_file_that_changes_during_a_run_is_named(begin, edit, tmp_path, monkeypatch):
    path, run = begin(tmp_path)
    report = Stages.to_dict  # is called when all is read

    def edited(stages):
        EDITS[edit](path)
        return report(stages)

    monkeypatch.setattr(Stages, "to_dict", edited)
    with pytest.raises(InputError, match=rf"{path.name}: changed while it was read, expected a file that stays"):
        run()
    assert [name for name in os.listdir(tmp_path) if "out" in name] == []
