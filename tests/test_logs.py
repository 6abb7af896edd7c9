"""The records of a run, and where each of them goes."""

import errno
import io
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from widedeep import logs
from widedeep.errors import InputError, RunError
from widedeep.logs import RunLog, last_seconds


def dlll(path):
    """Objects of a DLLL file, its prefix checked."""
    lines = path.read_text().splitlines()
    assert all(line.startswith("DLLL {") for line in lines)
    return [json.loads(line.removeprefix("DLLL "), parse_constant=pytest.fail) for line in lines]


def metric_lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in (path / "metrics.jsonl").read_text().splitlines()]


def a_run(directory, **options):
    with RunLog(directory, **options) as log:
        log.metadata("train_throughput", {"unit": "samples/s"})
        log.log("PARAMETER", {"amp": False, "model_dir": directory, "deep_hidden_units": [1024, 1024]})
        log.log((100, 9100), {"loss": 0.4512})
        log.log((455, 9100), {"loss_val": 0.43, "auc_val": float("nan")})
        log.log((), {"loss_val": np.float32(0.5), "streaming_map_val": torch.tensor(0.25)})


def test_dlll_lines_have_the_originals_keys(tmp_path):
    a_run(tmp_path)
    unit, parameters, training, validation, summary = dlll(tmp_path / "log.json")
    assert set(unit) == {"timestamp", "datetime", "elapsedtime", "type", "metric", "metadata"}
    assert (unit["type"], unit["metric"]) == ("METADATA", "train_throughput")
    assert unit["metadata"] == {"unit": "samples/s"}
    assert set(training) == {"timestamp", "datetime", "elapsedtime", "type", "step", "data"}
    for name in ("timestamp", "datetime", "elapsedtime"):
        assert isinstance(training[name], str)
    assert float(training["timestamp"]) > 1e9
    assert 0 <= float(training["elapsedtime"]) < 600
    assert (training["type"], training["step"], training["data"]) == ("LOG", [100, 9100], {"loss": 0.4512})
    assert parameters["step"] == "PARAMETER"
    assert parameters["data"] == {"amp": False, "model_dir": str(tmp_path), "deep_hidden_units": [1024, 1024]}
    assert validation["data"]["auc_val"] is None  # JSON has no NaN
    assert (summary["step"], summary["data"]) == ([], {"loss_val": 0.5, "streaming_map_val": 0.25})


def test_metric_lines_are_flat(tmp_path):
    a_run(tmp_path)
    lines = metric_lines(tmp_path)
    assert [line.pop("seconds") >= 0 for line in lines] == [True] * 3
    assert lines[0] == {"step": [100, 9100], "loss": 0.4512}
    assert lines[1] == {"step": [455, 9100], "loss_val": 0.43, "auc_val": None}


def test_other_ranks_write_nothing(tmp_path, capsys):
    a_run(tmp_path / "results", rank=1)
    with RunLog(tmp_path / "results", rank=3).progress("epoch 1/1", 100) as bar:
        bar.advance(100)
    assert not (tmp_path / "results").exists()
    assert capsys.readouterr() == ("", "")


def test_a_new_run_empties_the_files_and_a_resumed_one_continues_them(tmp_path):
    a_run(tmp_path, log_filename="other.json")
    a_run(tmp_path, log_filename="other.json")
    assert len(dlll(tmp_path / "other.json")) == 5
    for name in ("metrics.jsonl", "other.json"):
        with (tmp_path / name).open("a") as file:
            file.write('DLLL {"step": [5')  # a killed run
    with RunLog(tmp_path, "other.json", append=True) as log:
        log.log((500, 9100), {"loss": 0.4})
    assert len(dlll(tmp_path / "other.json")) == 6
    assert [line.get("loss") for line in metric_lines(tmp_path)] == [0.4512, None, None, 0.4]


def test_records_of_steps_that_are_done_again_are_dropped(tmp_path):
    with RunLog(tmp_path) as log:
        log.log("PARAMETER", {"batch": 32})
        for step in (5, 10, 15):
            log.log((step, 20), {"loss": 0.5})
        log.log((10,), {"loss_val": 0.4})  # an evaluation of its own, of the checkpoint
        log.log((1, 500), {"batch_samplesps": 9.0})  # and a benchmark
    with RunLog(tmp_path, append=True, done=10) as log:
        log.log((15, 20), {"loss": 0.3})
    steps = [[5, 20], [10, 20], [10], [1, 500], [15, 20]]
    assert [line["step"] for line in metric_lines(tmp_path)] == steps
    assert [line["step"] for line in dlll(tmp_path / "log.json")] == ["PARAMETER", *steps]
    assert metric_lines(tmp_path)[-1]["loss"] == 0.3
    for inside, left in ((False, [*steps[:4], [15, 20], [15, 20]]), (True, steps)):  # an evaluation done again, or not
        with RunLog(tmp_path, append=True) as log:
            log.log((15, 20), {"loss_val": 0.2})
        with RunLog(tmp_path, append=True, done=15, inside=inside):
            pass
        assert [line["step"] for line in metric_lines(tmp_path)] == left
        RunLog(tmp_path, append=True, done=15, inside=True).close()
    assert sorted(os.listdir(tmp_path)) == ["log.json", "metrics.jsonl"]


def test_the_clock_of_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_seconds(path, 9) == 0
    training = '{"step": [5, 9], "seconds": 1000.5, "loss": 0.4}\n'
    others = '{"step": [5], "seconds": 2, "loss_val": 0.4}\n{"step": [1, 7], "seconds": 3, "batch_samplesps": 9.0}\n'
    for more in ("", others, others + '{"step": [6'):
        path.write_text(training + more)
        assert last_seconds(path, 5) == 1000.5
        assert last_seconds(path, 4) == 0
    a_run(tmp_path, append=True, elapsed=1000.5)
    seconds = [json.loads(text)["seconds"] for text in path.read_text().splitlines()[-3:]]
    assert 1000.5 <= seconds[0] <= seconds[-1] < 1010
    assert float(dlll(tmp_path / "log.json")[-1]["elapsedtime"]) >= 1000.5


def test_lines_are_on_disk_at_once(tmp_path):
    with RunLog(tmp_path) as log:
        log.log((1, 2), {"loss": 1.0})
        assert len(dlll(tmp_path / "log.json")) == len(metric_lines(tmp_path)) == 1


def test_tensorboard_holds_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    a_run(tmp_path, events_dir=tmp_path / "events")
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(100, 0.4512)]
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss_val")] == [(455, 0.43)]


def test_tensorboard_forgets_replaced_runs_and_repeated_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def steps():
        events = accumulator.EventAccumulator(str(tmp_path / "events"))
        events.Reload()
        return [event.step for event in events.Scalars("loss")]

    for _ in range(2):
        with RunLog(tmp_path, events_dir=tmp_path / "events", first_event=0) as log:
            for step in (10, 20, 30):
                log.log((step, 90), {"loss": 0.5})
    assert steps() == [10, 20, 30]
    assert len(os.listdir(tmp_path / "events")) == 1  # nothing of the first run is left
    with RunLog(tmp_path, events_dir=tmp_path / "events", append=True, first_event=21) as log:
        log.log((40, 90), {"loss": 0.5})
    assert steps() == [10, 20, 40]
    with RunLog(tmp_path / "elsewhere", events_dir=tmp_path / "events") as log:  # no training
        log.log((40,), {"loss_val": 0.5})
    assert steps() == [10, 20, 40]


def test_tensorboard_keeps_evaluations_and_benchmarks_out_of_the_curves_of_a_training(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, events_dir=tmp_path / "events") as log:
        for step in (1, 2):
            log.log((step, 90), {"loss": 0.5, "auc": 0.7})
        for batches in (1, 2, 3):
            log.log((batches,), {"loss": 0.25, "auc": 0.75})
        log.log((2,), {"loss_val": 0.25})
        for index in (4, 5, 6):
            log.log((1, index), {"batch_samplesps": 9.0})
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps.pop("loss") == steps.pop("auc") == [1, 2]
    assert steps.pop("eval/loss") == steps.pop("eval/auc") == [1, 2, 3]
    assert steps == {"loss_val": [2], "batch_samplesps": [4, 5, 6]}


def test_tensorboard_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'widedeep\[tensorboard\]'"):
        RunLog(tmp_path, events_dir=tmp_path / "events")


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"log\.json"):
        RunLog(tmp_path / "file" / "results")


def test_a_disk_too_full_for_the_log_is_said_not_to_have_cost_a_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"log\.json: No space left on device; every checkpoint is whole$"):
        RunLog(tmp_path)


def test_plain_lines_off_terminals(tmp_path, caplog, monkeypatch):
    clock = iter([0.0, 0.0, 3.0])  # made, entered, advanced
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(time=time.time, monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, "widedeep"), RunLog(tmp_path) as log:
        log.metadata("train_throughput", {"unit": "samples/s"})
        with log.progress("epoch 3/20", total=1000, done=200) as bar:
            bar.show(loss=0.43219)
            bar.advance(300)
        log.log((100, 9100), {"loss": 0.25})
        log.log((1, 501), {"batch_samplesps": 1234567.8})
        log.log((), {"train_throughput": 1234.5})
    progress, step, speed, end = caplog.messages
    assert progress == "epoch 3/20  50 % of 1000 rows  100 rows/s  5 s left  loss 0.43219"
    assert step == "step 100/9100  loss 0.25"
    assert speed == "step 1/501  batch_samplesps 1,234,568"
    assert end == "finished  train_throughput 1234.5 samples/s"


def test_bar_on_a_terminal():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with logs.RowProgress(console, "epoch 1/2", total=1000) as bar:
        bar.advance(400)
        bar.show(loss=0.5)
        bar.advance(600)
    assert "epoch 1/2" in screen.getvalue()
    assert "loss 0.5" in screen.getvalue()
    assert "rows/s" in screen.getvalue()


@pytest.mark.parametrize("has_handlers", [True, False])
def test_closing_leaves_logging_as_it_was(tmp_path, monkeypatch, has_handlers):
    monkeypatch.setattr(logs.logger, "propagate", has_handlers)  # to pytest's
    before = list(logs.logger.handlers), logs.logger.level
    a_run(tmp_path)
    assert (logs.logger.handlers, logs.logger.level) == before
