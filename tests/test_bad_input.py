"""Bad input through the command line: an exit code, one sentence that names the place, and nothing lost."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import main
from planted import planted_data

from preprocess.outbrain import store
from preprocess.synthetic import generate
from widedeep import logs, predict, shard_manifest, shard_part
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.restore import save_model

OUTBRAIN = Path(__file__).parent / "data" / "outbrain"
FLAGS = shlex.split(
    "--cpu --global_batch_size 64 --num_epochs 1 --deep_warmup_epochs 0 --seed 5 --threads 1 --deep_hidden_units 8"
    " --step reference --affinity disabled"
)


@pytest.fixture
def refuse(capfd) -> Callable[..., str]:
    """Runs a command that must fail with a code and one sentence; returns the sentence."""

    def run(words: list, code: int, *said: str) -> str:
        capfd.readouterr()
        assert main(list(map(str, words))) == code
        err = capfd.readouterr().err
        assert err.startswith("widedeep: ")
        assert err.count("\n") == 1, err
        for text in said:
            assert text in err
        return err

    return run


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def train_words(data: Path, out: Path, *more: str) -> list:
    return [
        "train",
        "--dataset_path",
        data,
        "--model_dir",
        out / "model",
        "--results_dir",
        out / "results",
        *FLAGS,
        *more,
    ]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A data set and a finished run of it, to be copied."""
    root = tmp_path_factory.mktemp("good")
    planted_data(root / "data", train=700, test=100)
    assert main(list(map(str, train_words(root / "data", root)))) == 0
    return root


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


# Raw Outbrain files


@pytest.fixture
def raw(tmp_path) -> Path:
    return Path(shutil.copytree(OUTBRAIN, tmp_path / "raw"))


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("clicks_train.csv", lambda lines: ["display_id,ad_id", *lines[1:]], ["clicked"]),
        ("clicks_train.csv", lambda lines: [*lines[:3], "2,10", *lines[3:]], ["line 4"]),
        ("clicks_train.csv", lambda lines: [*lines[:3], "2,ten,1", *lines[3:]], ["line 4", "ten"]),
        ("clicks_train.csv", lambda lines: [*lines[:3], "2,10,7", *lines[3:]], ["line 4", "7"]),
        ("clicks_train.csv", lambda lines: lines[:1], ["row"]),
        ("clicks_train.csv", lambda lines: [], ["empty"]),
        ("events.csv", lambda lines: [lines[0].replace("timestamp", "time"), *lines[1:]], ["timestamp"]),
        ("events.csv", lambda lines: [*lines[:2], "7,u"], ["line 3"]),
        ("promoted_content.csv", lambda lines: [*lines[:2], "x,1,1,1"], ["line 3", "x"]),
        ("documents_topics.csv", lambda lines: [*lines[:2], "1,2,high"], ["line 3", "high"]),
    ],
)
def test_raw_outbrain_files(raw, tmp_path, refuse, name, change, said):
    out = tmp_path / "out"
    assert main(["preprocess", "outbrain", "--data_path", str(raw), "--out", str(out)]) == 0
    before = contents(out)
    edit(raw / name, change)
    refuse(["preprocess", "outbrain", "--data_path", raw, "--out", out], 2, name, *said)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_missing_raw_file(raw, tmp_path, refuse):
    (raw / "events.csv").unlink()
    refuse(["preprocess", "outbrain", "--data_path", raw, "--out", tmp_path / "out"], 2, "events.csv")
    assert not (tmp_path / "out").exists()


# Tables of one's own

SPEC = {
    "feature_spec": {
        "colour": {"cardinality": 5},
        "size": {},
        "bought": {},
    },
    "channel_spec": {
        "onehot_categorical": ["colour"],
        "multihot_categorical": [],
        "numerical": ["size"],
        "label": ["bought"],
        "map": [],
    },
}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["colour,size,bought", "1,2.5,0", "5,1,1"], ["line 3", "colour", "5"]),
        (["colour,size,bought", "1,2.5,0", "2,wide,1"], ["line 3", "size", "wide"]),
        (["colour,size,bought", "1,2.5,0", "2,1"], ["line 3"]),
        (["colour,size,bought", "1,2.5,0", "2,1,maybe"], ["line 3", "bought", "maybe"]),
        (["colour,bought", "1,0"], ["size"]),
        ([], ["empty"]),
    ],
)
def test_tables(tmp_path, refuse, rows, said):
    spec, table, out = tmp_path / "spec.yaml", tmp_path / "t.csv", tmp_path / "out"
    spec.write_text(yaml.safe_dump(SPEC))
    words = ["preprocess", "tabular", table, "--spec", spec, "--out", out, "--split", "last:1"]
    table.write_text("colour,size,bought\n1,2.5,0\n4,1,1\n")
    assert main(list(map(str, words))) == 0
    before = contents(out)
    table.write_text("".join(f"{row}\n" for row in rows))
    refuse(words, 2, "t.csv", *said)
    assert contents(out) == before


# Data sets


def damaged(data: Path, how: str) -> list[str]:
    """Damages a data set; returns what the sentence must say."""
    shard, spec = data / "train" / "part-00001.shard", data / "feature_spec.yaml"
    values = yaml.safe_load(spec.read_text())
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-64])
        return ["part-00001.shard"]
    if how == "flipped":
        content = bytearray(shard.read_bytes())
        content[100] ^= 4
        shard.write_bytes(content)
        return ["part-00001.shard", "'ad'"]
    if how == "missing":
        shard.unlink()
        return ["part-00001.shard"]
    if how == "empty manifest":
        (data / "test" / "manifest.json").write_text("")
        return ["manifest.json"]
    if how == "other cardinality":
        values["feature_spec"]["ad"]["cardinality"] = 51
        spec.write_text(yaml.safe_dump(values, sort_keys=False))
        return ["'ad'", "50", "51"]
    if how == "missing column":
        values["feature_spec"]["mood"] = {"cardinality": 3, "embedding_dim": 4}
        values["channel_spec"]["onehot_categorical"].append("mood")
        for chunks in values["source_spec"].values():
            chunks[0]["features"].append("mood")
        spec.write_text(yaml.safe_dump(values, sort_keys=False))
        return ["'mood'"]
    if how == "empty spec":
        spec.write_text("")
        return ["feature_spec.yaml"]
    if how == "no spec":
        spec.unlink()
        return ["feature_spec.yaml"]
    raise AssertionError(how)


DAMAGES = (
    "truncated",
    "flipped",
    "missing",
    "empty manifest",
    "other cardinality",
    "missing column",
    "empty spec",
    "no spec",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_data_sets(copy, refuse, how):
    said = damaged(copy / "data", how)
    before = contents(copy / "model") | contents(copy / "results")
    refuse(train_words(copy / "data", copy, "--overwrite"), 2, *said)
    assert contents(copy / "model") | contents(copy / "results") == before


def test_a_data_set_of_other_features_is_not_scored(copy, refuse):
    manifest = copy / "data" / "test" / "manifest.json"
    values = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "xxh3_64"}
    next(column for column in values["columns"] if column["name"] == "ad")["cardinality"] = 51
    manifest.write_text(shard_manifest.seal(values))
    out = copy / "p.parquet"
    out.write_text("earlier")
    words = ["predict", "--model", copy / "model", "--dataset_path", copy / "data", "--out", out, "--cpu"]
    refuse(words, 2, str(copy / "data" / "test"), "column 'ad' has cardinality 51, the feature spec says 50")
    shutil.rmtree(copy / "data" / "test")
    refuse(words, 2, str(copy / "data" / "test"))
    assert out.read_text() == "earlier"


# Checkpoints


def test_a_damaged_checkpoint(copy, refuse):
    weights = next((copy / "model" / "checkpoint").glob("step-*")) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    words = ["--model", copy / "model", "--dataset_path", copy / "data", "--cpu"]
    refuse(["evaluate", *words], 2, "model.safetensors", "damaged")
    refuse(["predict", *words, "--out", copy / "p.csv"], 2, "model.safetensors", "damaged")
    refuse(train_words(copy / "data", copy, "--use_checkpoint"), 2, "model.safetensors", "damaged")


def test_no_checkpoint(copy, refuse):
    shutil.rmtree(copy / "model")
    words = ["--model", copy / "model", "--dataset_path", copy / "data", "--cpu"]
    refuse(["evaluate", *words], 2, "model", "checkpoint")
    refuse(["evaluate", "--model", copy / "data", "--dataset_path", copy / "data", "--cpu"], 2, "checkpoint")


@pytest.mark.parametrize("which", ["step-7", "newest"])
def test_a_checkpoint_that_is_not_there_beside_those_that_are(copy, refuse, which):
    there = next((copy / "model" / "checkpoint").glob("step-*")).name
    words = ["--model", copy / "model", "--dataset_path", copy / "data", "--cpu"]
    refuse(["evaluate", *words, "--checkpoint", which], 2, "expected", "last", there, which)


# Predictions


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["empty"]),
        ("label,prob\n", ["rows"]),
        ("label,score\n1,0.5\n", ["'prob'"]),
        ("label,prob\n1,0.5\n0,much\n", ["line 3", "much"]),
        ("label,prob\n1,0.5\n0,1.5\n", ["line 3", "1.5"]),
        ("label,prob\n1,0.5\n2,0.5\n", ["line 3", "2"]),
        ("label,prob\n1,0.5\n0\n", ["line 3"]),
    ],
)
def test_predictions(tmp_path, refuse, text, said):
    path = tmp_path / "p.csv"
    path.write_text(text)
    refuse(["metrics", "--predictions", path], 2, "p.csv", *said)


def test_predictions_that_are_no_parquet(tmp_path, refuse):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1 no")
    refuse(["metrics", "--predictions", path], 2, "p.parquet")
    pq.write_table(pa.table({"label": [1, 0], "prob": ["a", "b"]}), path)
    refuse(["metrics", "--predictions", path], 2, "p.parquet", "prob")


def test_golden_file_and_report(tmp_path, refuse):
    (tmp_path / "g.npz").write_bytes(b"")
    refuse(["parity", tmp_path / "g.npz"], 2, "g.npz")
    np.savez(tmp_path / "h.npz", config=np.frombuffer(json.dumps({}).encode(), np.uint8))
    refuse(["parity", tmp_path / "h.npz"], 2, "h.npz")
    refuse(["report", tmp_path], 2, str(tmp_path))


# Places that cannot be written


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


# Configuration


def test_unknown_config_key(tmp_path, refuse):
    path = tmp_path / "c.yaml"
    path.write_text("num_epocs: 3\n")
    refuse(["train", "--config", path], 2, "c.yaml", "num_epocs")


def test_results_that_no_log_can_go_to(copy, refuse):
    (copy / "results" / "log.json").unlink()
    (copy / "results" / "log.json").mkdir()
    refuse(train_words(copy / "data", copy, "--overwrite"), 2, "log.json")
