"""The page of a run: what is on it, and what it says of files that are not there."""

import base64
import errno
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from widedeep import report, report_plots
from widedeep.errors import InputError, RunError
from widedeep.logs import RunLog
from widedeep.metrics import Evaluation
from widedeep.outputs import write_json

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Text, images, and whether every tag that opens is closed."""

    VOID = ("meta", "img")

    def __init__(self, html):
        super().__init__()
        self.open, self.words, self.images, self.links = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value)
                self.images.append(base64.b64decode(value.removeprefix("data:image/png;base64,"), validate=True))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def results(tmp_path):
    """A results directory as a training leaves it."""
    directory = tmp_path / "run <1>"
    write_json(directory / "args.json", {"global_batch_size": 4096, "note": "<script>", "log_filename": "log.json"})
    with RunLog(directory) as log:
        log.log("PARAMETER", {"global_batch_size": 4096})
        for step in range(1, 201):
            log.log((step, 200), {"loss": 0.4 + 1 / step, "schedule": 1e-4})
            if step % 50 == 0:
                log.log((step, 200), {"loss_val": 0.41, "auc_val": 0.7 + step / 1e4, "streaming_map_val": 0.6})
        log.log((), {"loss_val": 0.41})
    logit = torch.linspace(-4, 1, 500)
    evaluation = Evaluation()
    evaluation.update(logit, (logit.sigmoid() > 0.3).float(), torch.arange(500) // 5)
    write_json(directory / "evaluation.json", evaluation.compute() | {"calibration": evaluation.calibration()})
    write_json(directory / "baselines.json", {"popularity": {"map": 0.54321, "auc": 0.6}})
    split = {"rows": 59761827, "clicks": 11500000, "click_rate": 0.19243, "groups": 1154321}
    features = [{"name": "ad_id", "cardinality": 250000, "dim": 128, "hotness": 1}]
    summary = {"splits": {"train": split}, "categorical": features, "numeric": ["ad_ctr"], "parameters": 90512767}
    write_json(directory / "data_summary.json", summary)
    return directory


def test_page_holds_everything(results):
    out = report.run(results)
    assert out == results / "report.html"
    page = Page(out.read_text())
    assert len(page.images) == 4
    assert all(image.startswith(PNG) for image in page.images)
    assert all(link.startswith("data:") for link in page.links)  # nothing to fetch
    for words in ("run <1>", "4 epochs", "200 steps", "90,512,767 parameters", "59,761,827", "19.24 %", "0.54321"):
        assert words in page.text
    assert "Not in the run" not in page.text
    assert "<script>" in page.text  # as text: the parser would have seen a tag
    names = {path.name for path in (results / "plots").iterdir()}
    assert names == {"loss.png", "ranking.png", "calibration.png", "learning_rate.png"}


def test_a_page_elsewhere_stands_alone(results, tmp_path):
    place = tmp_path / "keep"
    (place / "plots").mkdir(parents=True)
    (place / "plots" / "loss.png").write_text("mine")
    assert report.run(results, place / "page.html") == place / "page.html"
    assert sorted(path.name for path in place.rglob("*")) == ["loss.png", "page.html", "plots"]
    assert (place / "plots" / "loss.png").read_text() == "mine"
    assert len(Page((place / "page.html").read_text()).images) == 4


def test_missing_files_are_named(results):
    for name in ("args.json", "data_summary.json", "baselines.json", "metrics.jsonl", "log.json"):
        (results / name).unlink()
    page = Page(report.run(results).read_text())
    assert "not shown here: args.json, metrics.jsonl and log.json, data_summary.json" in page.text
    assert len(page.images) == 1


def test_only_a_log(results, tmp_path):
    for name in ("args.json", "data_summary.json", "baselines.json", "evaluation.json"):
        (results / name).unlink()
    page = Page(report.run(results, tmp_path / "elsewhere" / "page.html").read_text())
    assert "evaluation.json" in page.text
    assert len(page.images) == 3
    assert not (results / "plots").exists()


def test_dlll_log_serves_where_there_is_no_table(results):
    with_table = report.read(results)
    (results / "metrics.jsonl").unlink()
    from_log = report.read(results)
    for records in ("training", "validation"):
        pairs = list(zip(getattr(with_table, records), getattr(from_log, records), strict=True))
        assert pairs
        for one, other in pairs:
            assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_resumed_and_torn_logs(results):
    with (results / "metrics.jsonl").open("a") as file:
        file.write('{"step": [200, 2\n{"step": [150, 200], "seconds": 9, "loss": 0.125}\n')
        file.write('{"step": [3], "seconds": 9, "loss": 7.0}\n')  # a running value of an evaluation, no training batch
    records = report.read(results).training
    assert [record["step"] for record in records] == list(range(1, 201))
    assert records[149]["loss"] == 0.125


def test_evaluations_beside_a_training_are_no_epochs_of_it(results):
    trained = report.read(results).validation
    with (results / "metrics.jsonl").open("a") as file:
        file.write('{"step": [0], "seconds": 9, "loss_val": 7.0}\n{"step": [200], "seconds": 9, "loss_val": 7.0}\n')
    assert report.read(results).validation == trained
    (results / "metrics.jsonl").write_text('{"step": [200], "seconds": 9, "loss_val": 7.0}\n')
    assert [record["loss_val"] for record in report.read(results).validation] == [7.0]


def test_an_evaluation_set_without_clicks_has_no_ranking(results, recwarn):
    lines = (results / "metrics.jsonl").read_text()
    (results / "metrics.jsonl").write_text(re.sub(r'"(auc_val|streaming_map_val)": [0-9.]+', r'"\1": null', lines))
    report.run(results)
    assert not (results / "plots" / "ranking.png").exists()
    assert not [w for w in recwarn if not issubclass(w.category, DeprecationWarning)]  # of matplotlib's own calls


def test_a_full_disk_leaves_the_earlier_plots(results, monkeypatch):
    report.run(results)
    before = {path: path.read_bytes() for path in (results / "plots").iterdir()}

    def full(path, content):
        path.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="untouched"):
        report.run(results)
    assert {path: path.read_bytes() for path in (results / "plots").iterdir()} == before


def test_evaluation_without_groups(results):
    evaluation = json.loads((results / "evaluation.json").read_text())
    write_json(results / "evaluation.json", evaluation | {"map": None, "gauc": None, "groups": 0})
    (results / "baselines.json").unlink()
    page = Page(report.run(results).read_text())
    assert "MAP@12 0" not in page.text.split("Epochs")[0]


def test_bad_input(tmp_path, results):
    with pytest.raises(InputError, match="expected a run's results"):
        report.run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match=r"expected .*, and metrics\.jsonl holds no record yet"):
        report.run(tmp_path)
    (results / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json: expected JSON"):
        report.run(results)
    (results / "evaluation.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object, got list"):
        report.run(results)
    assert not (results / "report.html").exists()


def test_matplotlib_absent(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'widedeep\[report\]'"):
        report.run(results)


def test_unwritable_place(results, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="cannot write"):
        report.run(results, tmp_path / "file" / "page.html")
    assert (tmp_path / "file").read_text() == "kept"


def test_epochs_have_the_runs_numbers_when_its_log_begins_in_the_middle(results):
    arguments = json.loads((results / "args.json").read_text())
    write_json(results / "args.json", arguments | {"num_epochs": 4})
    lines = (results / "metrics.jsonl").read_text().splitlines()
    late = [line for line in lines if json.loads(line)["step"] > [100, 200]]
    (results / "metrics.jsonl").write_text("\n".join(late) + "\n")
    assert [record["epoch"] for record in report.read(results).validation] == [3, 4]
    assert "3 150 0.41" in Page(report.run(results).read_text()).text


def write_lines(results, *lines):
    (results / "metrics.jsonl").write_text("".join(json.dumps({"seconds": 9.0} | line) + "\n" for line in lines))


def test_epochs_count_on_after_a_resumption_with_other_epochs(results):
    write_json(results / "args.json", {"num_epochs": 4})
    first, second = ({"step": [step, 28], "loss_val": 0.5, "auc_val": 0.6} for step in (14, 28))
    third, fourth = ({"step": [step, 56], "loss_val": 0.5, "auc_val": 0.7} for step in (42, 56))
    speed = {"step": [1, 5], "batch_samplesps": 9.0}
    for lines, epochs in [
        ([first, second, third, fourth], [1, 2, 3, 4]),
        ([first, second], [1, 2]),  # as before the first line of the resumed run
        ([first, third, fourth], [1, 3, 4]),
        ([fourth], [4]),
        ([third, speed], [3]),
    ]:
        write_lines(results, *lines)
        assert [record["epoch"] for record in report.read(results).validation] == epochs
        assert f"run · {epochs[-1]} epochs ·" in Page(report.run(results).read_text()).text
    write_json(results / "args.json", {})
    assert report.read(results).validation[0]["epoch"] is None
    report.run(results)
    assert (results / "plots" / "ranking.png").exists()  # by steps


def test_the_loss_plot_cuts_off_first_steps_and_nothing_else():
    falling = [5.0, 3.0] + [0.5 - step / 1000 for step in range(98)]
    low, high = report_plots.loss_limits(falling, [0.45])
    assert low < min(falling)
    assert 0.5 < high < 0.6
    for training, evaluation in (
        (falling, [2.5, 0.45]),  # high after the first epoch
        ([*falling[:-1], 2.5], [0.45]),  # the last line diverges
        ([0.4] * 98 + [2.5, 0.4], []),
        ([], [2.5, *[0.4] * 60]),
    ):
        low, high = report_plots.loss_limits(training, evaluation)
        assert low < 0.4
        assert high > 2.5
    assert report_plots.loss_limits(falling[:10], [0.45]) is None  # few points need no crop
    assert report_plots.loss_limits([0.5] * 50, []) is None


def test_an_evaluation_alone_is_no_epoch(results):
    write_lines(results, {"step": [2], "loss": 0.5}, {"step": [1056], "loss_val": 0.5, "auc_val": 0.6})
    page = Page(report.run(results).read_text())
    assert "run · evaluation at step 1,056 · batch" in page.text
    assert "Evaluations steps log loss AUC, thresholds time of the run 1,056 0.50000 0.60000 0:00:09" in page.text
    assert "poch" not in page.text.split("Arguments")[0]


def test_one_is_no_plural(results):
    write_json(results / "args.json", {"num_epochs": 1})
    write_lines(results, {"step": [1, 1], "loss_val": 0.5})
    assert "run · 1 epoch · 1 step ·" in Page(report.run(results).read_text()).text


@pytest.mark.parametrize("number", ["many", [4], True, -1, 1.5])
@pytest.mark.parametrize("name", ["num_epochs", "global_batch_size"])
def test_arguments_that_are_no_numbers(results, name, number):
    write_json(results / "args.json", {name: number})
    with pytest.raises(InputError, match=rf"args\.json: {name}: expected a whole number from 0, got ") as told:
        report.run(results)
    assert str(told.value).endswith(f"got {number!r}")


FEATURE = {"name": "ad_id", "cardinality": 5, "dim": 8}
RATES = {"rows": [5, 5], "predicted": [0.1, 0.2], "observed": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("data_summary", {"splits": [1]}, "splits: expected a JSON object for each split"),
        ("data_summary", {"splits": {"train": 1}}, "splits: expected a JSON object for each split"),
        ("data_summary", {"splits": {"train": {"click_rate": "high"}}}, "splits: .*, its click_rate a number, got"),
        ("data_summary", {"categorical": [FEATURE]}, "categorical: expected .* name, cardinality, dim and hotness"),
        ("data_summary", {"categorical": ["ad_id"]}, "categorical: expected a list of JSON objects"),
        ("data_summary", {"numeric": 3}, "numeric: expected a list of names, got 3"),
        ("data_summary", {"parameters": "few"}, "parameters: expected a whole number from 0, got 'few'"),
        ("evaluation", {"calibration": [1]}, "calibration: expected lists of one length: rows"),
        ("evaluation", {"calibration": {"rows": [1]}}, "calibration: expected lists of one length: rows"),
        ("evaluation", {"calibration": RATES | {"rows": [5]}}, "calibration: expected lists of one length"),
        ("evaluation", {"calibration": RATES | {"rows": [5, 0]}}, "calibration: expected lists of .* above 0"),
        (
            "evaluation",
            {"calibration": RATES | {"observed": [0.1, 1.2]}},
            "calibration: expected lists of .* from 0 to 1",
        ),
        (
            "evaluation",
            {"calibration": RATES | {"predicted": [0.1, None]}},
            "calibration: expected lists of .* from 0 to 1",
        ),
    ],
)
def test_objects_of_another_form(results, file, content, said):
    write_json(results / f"{file}.json", content)
    with pytest.raises(InputError, match=rf"{file}\.json: {said}"):
        report.run(results)


def test_null_is_as_good_as_nothing(results):
    for file in ("args", "data_summary", "evaluation"):
        values = json.loads((results / f"{file}.json").read_text())
        write_json(results / f"{file}.json", dict.fromkeys(values))
    assert len(Page(report.run(results).read_text()).images) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"step": ["a", 1], "loss": 0.5}, r"step: expected whole numbers from 0, got \['a', 1\]"),
        ({"step": [1, None], "loss": 0.5}, r"step: expected whole numbers from 0, got \[1, None\]"),
        ({"step": [10**30, 9], "loss": 0.5}, "step: expected whole numbers from 0"),
        ({"step": [2, 9], "loss": "low"}, "loss: expected a number, got 'low'"),
        ({"step": [2, 9], "auc_val": {}}, "auc_val: expected a number, got {}"),
        ({"step": [2, 9], "seconds": [1]}, r"seconds: expected a number, got \[1\]"),
        ({"step": [2, 9], "loss": 10**400}, "loss: expected a number, got 1000"),
    ],
)
def test_lines_of_another_form(results, line, said):
    write_lines(results, {"step": [1, 9], "loss": 0.5}, line)
    with pytest.raises(InputError, match=rf"metrics\.jsonl, line 2: {said}"):
        report.run(results)


def test_lines_that_are_no_text(results):
    (results / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"metrics\.jsonl: expected lines of JSON in UTF-8"):
        report.run(results)


def test_a_dlll_log_may_have_its_numbers_in_quotes(results):
    (results / "metrics.jsonl").unlink()
    record = {"type": "LOG", "elapsedtime": "1.5", "step": [14.0, 28], "data": {"loss": "0.4512", "note": "a"}}
    more = [{"loss_val": "0.4", "auc_val": "0.7"}, {"loss": "nan"}, {"loss": "0.41", "auc_val": float("nan")}]
    records = [record, *(record | {"step": [step, 28], "data": data} for step, data in zip((14, 27, 28), more))]
    (results / "log.json").write_text("".join(f"DLLL {json.dumps(line)}\n" for line in records))
    files = report.read(results)
    assert [(line["step"], line["loss"]) for line in files.training] == [(14, 0.4512), (28, 0.41)]
    assert files.validation == [{"step": 14, "epoch": None, "seconds": 1.5, "loss_val": 0.4, "auc_val": 0.7}]
    assert "14 0.40000 0.70000 0:00:02" in Page(report.run(results).read_text()).text
    (results / "log.json").write_text("DLLL " + json.dumps(record | {"elapsedtime": "long"}))
    with pytest.raises(InputError, match=r"log\.json, line 1: elapsedtime: expected a number, got 'long'"):
        report.run(results)


def test_losses_that_hardly_differ_are_written_out():
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(report_plots.STYLE):
        figure = Figure()
        axes = figure.subplots()
        report_plots._loss(axes, [], [{"step": 5, "loss_val": 0.70496}, {"step": 10, "loss_val": 0.70499}])
        figure.canvas.draw()
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert texts
    assert all(0.7049 < float(text) < 0.7051 for text in texts)
