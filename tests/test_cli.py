"""The command line: what it accepts, what it says, how fast it answers, and that errors are one sentence."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import command_line
from planted import planted_data

from widedeep.commands.preprocess_outbrain import parse_bytes
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import FeatureSpec

ROOT = Path(__file__).resolve().parents[1]
cli = command_line()


def test_overview_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_no_command_is_an_error(capsys):
    assert cli.main([]) == 2
    assert "usage: widedeep" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    assert f"usage: widedeep {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_needs_no_torch(name):
    script = """
import sys
from widedeep import cli
cli.main(sys.argv[1:])
sys.exit(any(name in sys.modules for name in ("torch", "pyarrow")))
"""
    done = subprocess.run([sys.executable, "-c", script, *name.split(), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch or pyarrow was imported"


def printed_config(capsys, *words: str) -> dict:
    assert cli.main(["train", *words, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_originals_command_line(capsys):
    words = shlex.split(
        "--amp --xla --deep_hidden_units 512 256 --num_epochs 3 --deep_warmup_epochs=1.5 --affinity socket"
    )
    config = printed_config(capsys, *words)
    assert config["amp"] is True
    assert config["deep_hidden_units"] == [512, 256]
    assert (config["num_epochs"], config["deep_warmup_epochs"], config["affinity"]) == (3, 1.5, "socket")


def test_dashes_and_the_alias(capsys):
    config = printed_config(capsys, "--num-epochs=3", "--dataset-path", "a-b/c", "--evaluation", "--use-checkpoint")
    assert (config["num_epochs"], config["dataset_path"]) == (3, "a-b/c")
    assert config["evaluate"] is config["use_checkpoint"] is True


def test_config_file_below_flags(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("num_epochs: 4\ndeep_hidden_units: [8, 8]\namp: true\n")
    config = printed_config(capsys, "--config", str(path), "--num_epochs", "5")
    assert (config["num_epochs"], config["deep_hidden_units"], config["amp"]) == (5, [8, 8], True)
    config = printed_config(capsys, "--num_epochs", "5", "--config", str(path), "--amp=false")
    assert (config["num_epochs"], config["deep_hidden_units"], config["amp"]) == (5, [8, 8], False)
    config = printed_config(capsys, f"--config={path}", "--amp", "false")
    assert (config["num_epochs"], config["amp"]) == (4, False)


def test_printed_config_is_a_config(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(printed_config(capsys, "--seed", "5", "--combiner", "mean")))
    assert printed_config(capsys, "--config", str(path))["seed"] == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--num_epochs", "many"], "--num_epochs: expected a whole number, got many"),
        (["train", "--step", "magic"], "--step: expected one of auto, reference, fused, got magic"),
        (["train", "--precision", "int8"], "--precision: expected one of fp32, tf32, fp16, bf16, got int8"),
        (["train", "--deep_hidden_units", "8", "x"], "--deep_hidden_units: expected a whole number, got x"),
        (["train", "--num_epochs"], "--num_epochs: expected one argument"),
        (["train", "--no_such_flag", "1"], "no_such_flag"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "--train_data_pattern", "/x/part*"], "--train_data_pattern: expected --dataset_path instead;"),
        (["preprocess", "outbrain", "--metadata_path", "/x", "/y"], "--metadata_path: expected --out instead"),
        (
            ["preprocess", "outbrain", "--data_path", "/x", "--out", "y", "--use_dask"],
            "--use_dask: expected --device cuda",
        ),
        (["preprocess", "outbrain", "--num_valid_partitions=40"], "--num_valid_partitions: expected --rows_per_shard"),
        (["preprocess", "tabular", "--input", "/x", "--output", "/y"], "--input: expected --spec instead,"),
        (["preprocess", "tabular", "--spec", "x", "--chunk-size=9"], "--chunk_size: expected --rows_per_shard instead"),
        (["evaluate"], "expected --model and --dataset_path: see `widedeep evaluate --help`"),
        (["describe"], "expected PATH"),
        (["describe", "--json", "no-such-set"], "no-such-set: expected a data set"),
        (["parity", "--json", "no-such-file"], "no-such-file: "),
        (["fly"], "unknown command 'fly'"),
        (["preprocess"], "preprocess needs one of: outbrain, tabular"),
        (["preprocess", "avazu"], "preprocess needs one of: outbrain, tabular"),
    ],
)
def test_bad_flags_are_one_sentence(words, said, capsys):
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("text", ["num_epocs: 3\n", "num_epochs: [3\n", "num_epochs: many\n", "- 1\n"])
def test_bad_config_files_are_one_sentence(tmp_path, capsys, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "c.yaml" in err or "num_epochs" in err


@pytest.mark.parametrize("value", ["32", "null", "'32 16'"])
def test_a_config_file_with_one_value_for_a_list_is_named(tmp_path, capsys, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"deep_hidden_units: {value}\n")
    assert cli.main(["train", "--config", str(path)]) == 2
    assert f"c.yaml: deep_hidden_units: expected a list, got {yaml.safe_load(value)!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("train", "num_epochs: null", "num_epochs: expected a value, got null"),
        ("train", "verify: null", "verify: expected a value, got null"),
        ("train", "model_dir:", "model_dir: expected a value, got null"),
        ("train", "embedding_parallel: null", "embedding_parallel: expected a value, got null"),
        ("train", "num_epochs: 1\nnum_epochs: 2", "key 'num_epochs' a second time in line 2"),
        ("train", "? [num_epochs]\n: 1", "expected YAML: while constructing a mapping"),
        ("train", "evaluation: true", "unknown key 'evaluation': expected evaluate"),
        ("train", "config: other.yaml", "config: expected on the command line alone"),
        ("train", "config: 1", "config: expected on the command line alone"),
        ("describe", "print_config: true", "print_config: expected on the command line alone"),
        ("train", "help: true", "help: expected on the command line alone"),
        ("preprocess tabular", "seed: null", "seed: expected a value, got null"),
    ],
)
def test_a_config_file_without_a_value_is_named(tmp_path, capsys, command, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert cli.main([*command.split(), "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "c.yaml: " in err
    assert said in err


def test_what_may_be_absent_may_be_null(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("seed: null\nprecision: null\n")
    assert printed_config(capsys, "--config", str(path))["seed"] is None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("a.csv, line 3: no"), 2, "widedeep: a.csv, line 3: no\n"),
        (RunError("the loss\nis not finite"), 1, "widedeep: the loss is not finite\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "widedeep: out/x: No space left on device\n"),
        (OSError(errno.EIO, "Input/output error", "out/x"), 1, "widedeep: out/x: Input/output error\n"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), 2, "widedeep: out/x: Permission denied\n"),
        (MemoryError(), 1, "widedeep: out of memory\n"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory:"), 1, "widedeep: out of memory\n"),
        (KeyboardInterrupt(), 130, "widedeep: interrupted\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, said):
    def fail(json):
        raise error

    monkeypatch.setitem(sys.modules, "widedeep.doctor", type("doctor", (), {"run": staticmethod(fail)}))
    import widedeep

    monkeypatch.setattr(widedeep, "doctor", sys.modules["widedeep.doctor"], raising=False)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == said


def test_a_defect_keeps_its_traceback_and_debug_adds_one(monkeypatch, capsys):
    errors = [ZeroDivisionError("ours"), InputError("theirs")]
    monkeypatch.setattr("widedeep.commands.doctor.run", lambda args: (_ for _ in ()).throw(errors.pop(0)))
    assert cli.main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["doctor", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here whose read fails")
def test_a_file_whose_read_fails_is_named(monkeypatch, capsys):
    """The system's error of read(2) does not say of which file it is."""
    monkeypatch.setattr("widedeep.commands.doctor.run", lambda args: Path("/proc/self/mem").read_bytes())
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "widedeep: /proc/self/mem: Input/output error\n"


def test_an_interrupt_that_a_library_wraps_is_one(monkeypatch, capsys):
    def wrap(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            try:
                raise AttributeError("of its clean-up")
            except AttributeError as error:
                raise RuntimeError("could not export") from error

    monkeypatch.setattr("widedeep.commands.doctor.run", wrap)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "widedeep: interrupted\n"


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("1000000", 10**6), ("64k", 2**16), ("1.5GiB", 3 << 29), ("512MB", 2**29)]
)
def test_a_memory_limit_is_a_number_with_a_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "2 G", "-1G", "1_0G", "1e999", "nan", "\u0663G"])
def test_a_memory_limit_of_another_form_is_refused(text):
    with pytest.raises(InputError, match="--memory_limit: expected a size such as 8G or 512M, got "):
        parse_bytes(text)


def test_a_config_file_names_the_inputs_of_tables(tmp_path, monkeypatch):
    import preprocess.tabular

    seen = []
    part = {"rows": 0, "positive_rate": None}
    monkeypatch.setattr(
        preprocess.tabular, "run", lambda config: seen.append(config.inputs) or {"train": part, "test": part}
    )
    path = tmp_path / "config.yaml"
    path.write_text("inputs: [a.csv, b.csv]\nspec: spec.yaml\nout: out\n")
    for words in (["--config", str(path)], ["--config", str(path), "c.csv"], ["--spec", "s", "--out", "o"]):
        assert cli.main(["preprocess", "tabular", *words]) == 0
    assert seen == [["a.csv", "b.csv"], ["c.csv"], []]


def test_names_that_the_terminal_lacks(tmp_path):
    """A proposed spec stays readable, and what is only shown is shown as well as can be."""
    (tmp_path / "a.csv").write_text("l\u00e4nd,click\n" + "a,0\nb,1\n" * 9, encoding="utf-8")
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}

    def say(*words):
        words = [sys.executable, "-m", "widedeep", *words]
        run = subprocess.run(words, cwd=tmp_path, env=ascii_only, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout.decode("ascii")

    (tmp_path / "spec.yaml").write_text(say("spec", "infer", "a.csv"))
    say("preprocess", "tabular", "a.csv", "--spec", "spec.yaml", "--split", "last:4", "--out", "data")
    assert "l\\xe4nd" in say("describe", "data")
    assert FeatureSpec.load(tmp_path / "data").names == ("l\u00e4nd",)


@pytest.mark.parametrize(("epochs", "told"), [(24, "480 steps in all are few"), (25, None)])
def test_a_run_of_few_steps_is_advised(epochs, told, tmp_path, capsys):
    """By defaults that are made for tens of millions of rows a small table would teach next to nothing."""
    data = planted_data(tmp_path / "data", train=2000)
    where = [f"--{flag}={tmp_path / flag}" for flag in ("results_dir", "model_dir")]
    sizes = ["--global_batch_size=100", "--deep_hidden_units", "4"]
    assert cli.main(["train", f"--dataset_path={data}", *where, *sizes, "--cpu", f"--num_epochs={epochs}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps in all" in line]
    assert [line[: len(told or "")] for line in lines] == ([told] if told else [])
    if told:
        assert "--global_batch_size (now 100)" in lines[0]
        assert "--deep_learning_rate (now 0.00012)" in lines[0]


@pytest.mark.parametrize(
    ("flags", "width", "has", "told"),
    [
        ((), "300", True, 1),
        ((), "300", False, 0),
        ((), "30", True, 0),
        (("--precision=fp32",), "300", True, 0),
        (("--precision=bf16",), "300", True, 0),
    ],
)
def test_a_run_that_leaves_the_precision_is_told_of_a_faster_one(
    flags, width, has, told, tmp_path, capsys, monkeypatch
):
    """Where the hidden layers are so wide that it is faster."""
    monkeypatch.setattr("widedeep._load.cpu_multiplies_bf16", lambda: has)
    data = planted_data(tmp_path / "data", train=300)
    where = [f"--{flag}={tmp_path / flag}" for flag in ("results_dir", "model_dir")]
    sizes = ["--global_batch_size=100", "--deep_hidden_units", width, width, "--num_epochs=1", "--deep_warmup_epochs=1"]
    assert cli.main(["train", f"--dataset_path={data}", *where, *sizes, "--cpu", *flags]) == 0
    advice = "products are in fp32: --precision bf16 takes less time on this CPU"
    assert capsys.readouterr().out.count(advice) == told
