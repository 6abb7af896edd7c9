"""Directories in the place of files, as Spark and others write tables."""

import pytest
import yaml
from commands import main
from test_tabular_inputs import outputs, rows, write_spec
from test_unlabelled import TRAIN

from preprocess.inputs import files_of
from preprocess.tabular import TabularConfig, infer_spec, run
from widedeep.errors import InputError

PARTS = ["part-00000-9b1.snappy.parquet", "part-00001-9b1.snappy.parquet", "part-00002-9b1.snappy.parquet"]


def write_parts(directory, table):
    """As Spark does, in another order than that of the names, with files beside that are not of the table."""
    import pyarrow.parquet as pq

    directory.mkdir()
    size = len(table) // len(PARTS) + 1
    for i in (2, 0, 1):
        pq.write_table(table.slice(i * size, size), directory / PARTS[i])
        (directory / f".{PARTS[i]}.crc").write_bytes(b"crc")
    (directory / "_SUCCESS").touch()
    (directory / "_committed").mkdir()
    return directory


def test_a_directory_stands_for_the_files_in_it_by_name(tmp_path):
    table = rows(100)
    train, test = write_parts(tmp_path / "train.parquet", table[:70]), write_parts(tmp_path / "test", table[70:])
    assert files_of([train, "other.csv"]) == [*(train / name for name in PARTS), *files_of(["other.csv"])]
    spec = write_spec(tmp_path / "spec.yaml")
    run(TabularConfig(spec=spec, inputs=[train], test=[test], out=tmp_path / "by directory"))
    files = {"inputs": [train / name for name in PARTS], "test": [test / name for name in PARTS]}
    run(TabularConfig(spec=spec, out=tmp_path / "by file", **files))
    assert outputs(tmp_path / "by directory") == outputs(tmp_path / "by file")
    assert infer_spec([train], "click") == infer_spec(files["inputs"], "click")


def test_what_is_no_directory_of_files_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: expected files in this directory, found none"):
        files_of([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"aaa\.csv: cannot be read: File name too long"):
        files_of([tmp_path / f"{'a' * 300}.csv"])
    write_parts(tmp_path / "table", rows(30))
    (tmp_path / "table" / "day=1").mkdir()
    spec, out = write_spec(tmp_path / "s.yaml"), tmp_path / "out"
    with pytest.raises(InputError, match="table: expected a directory of files alone, got the directory day=1 in it"):
        run(TabularConfig(spec=spec, inputs=[tmp_path / "table"], split="none", out=out))


@pytest.mark.parametrize("place", ["x", "deep/x", ".hidden"])
@pytest.mark.parametrize("given", ["inputs", "test"])
def test_an_output_among_the_inputs_is_refused(tmp_path, monkeypatch, capsys, given, place):
    """It would be one of them in the next run."""
    table, spec = write_parts(tmp_path / "table", rows(60)), write_spec(tmp_path / "spec.yaml")
    (tmp_path / "link").symlink_to(table)
    write_parts(tmp_path / "other", rows(30))
    monkeypatch.chdir(tmp_path)
    words = ["table", "--split", "none"] if given == "inputs" else ["other", "--test", "table"]
    before = sorted(table.rglob("*"))
    for out in (f"table/{place}", f"link/{place}", f"{table}/{place}"):
        assert main(["preprocess", "tabular", *words, "--spec", str(spec), "--out", out]) == 2
        assert (
            f"widedeep: cannot write {out}: it lies in table, whose files this run reads\n" in capsys.readouterr().err
        )
    assert sorted(table.rglob("*")) == before
    monkeypatch.chdir(table)
    assert main(["preprocess", "tabular", "..", "--split", "none", "--spec", str(spec), "--out", "x"]) == 2
    assert "cannot write x: it lies in .., whose files this run reads" in capsys.readouterr().err
    own, plain = table.parent / "own.yaml", yaml.safe_load(spec.read_text())
    chunk = {"type": "parquet", "features": [*plain["feature_spec"]], "files": ["table"]}
    own.write_text(yaml.safe_dump(plain | {"source_spec": {"train": [chunk], "test": [chunk]}}))
    assert main(["preprocess", "tabular", "--spec", str(own), "--out", "x"]) == 2
    assert f"cannot write x: it lies in {table}, whose files this run reads" in capsys.readouterr().err
    assert main(["spec", "infer", "../table", "--out", "x.yaml"]) == 2
    assert "cannot write x.yaml: it lies in ../table, whose files this run reads" in capsys.readouterr().err
    for _ in range(2):  # beside single files of a directory there is room for an output
        assert main(["preprocess", "tabular", PARTS[0], "--split", "none", "--spec", str(spec), "--out", "x"]) == 0


def test_raw_rows_of_a_directory_are_scored(tmp_path, capsys):
    table = rows(120)
    raw, spec = write_parts(tmp_path / "raw", table), write_spec(tmp_path / "spec.yaml")
    run(TabularConfig(spec=spec, inputs=[raw], split="last:0.2", out=tmp_path / "d"))
    places = ["--model_dir", str(tmp_path / "m"), "--results_dir", str(tmp_path / "r")]
    assert main(["train", "--dataset_path", str(tmp_path / "d"), *places, *TRAIN.split()]) == 0
    score = ["predict", "--model", str(tmp_path / "m"), "--dataset_path", str(tmp_path / "d"), "--cpu", "--rows"]
    for name, words in {"a.csv": [raw], "b.csv": [raw / part for part in PARTS]}.items():
        assert main([*score, *map(str, words), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    capsys.readouterr()
    before = (raw / PARTS[1]).read_bytes()
    assert main([*score, str(raw), "--out", str(raw / PARTS[1])]) == 2
    assert "expected another file than those of --rows" in capsys.readouterr().err
    assert (raw / PARTS[1]).read_bytes() == before
    assert main([*score, str(raw), "--out", str(raw / "scores.csv")]) == 2
    assert (
        f"cannot write {raw / 'scores.csv'}: it lies in {raw}, whose files this run reads\n" in capsys.readouterr().err
    )
    assert not (raw / "scores.csv").exists()
    assert main([*score, str(raw / PARTS[0]), "--out", str(raw / "scores.csv")]) == 0
