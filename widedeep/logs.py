"""What a run tells: one record at a time, to a DLLL log, a table of metrics, TensorBoard and the person who waits.

The DLLL log has the lines of the original's dllogger: the prefix `DLLL ` and a JSON object.
"""

import contextlib
import json
import logging
import math
import time
from datetime import datetime
from itertools import compress
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from widedeep import atomic
from widedeep.errors import InputError
from widedeep.outputs import plain

Step = tuple[int, ...] | str
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
SECONDS_BETWEEN_LINES = 30.0  # of progress, where stderr is no terminal
KEPT = "every checkpoint is whole"  # where the disk is too full for the log, which is written in place
logger = logging.getLogger("widedeep")


class Sink(Protocol):
    """Takes every record of a run."""

    def log(self, step: Step, data: dict[str, Any], seconds: float) -> None: ...
    def metadata(self, metric: str, metadata: dict[str, Any], seconds: float) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """All that a run reports; on ranks other than 0 every call does nothing.

    with RunLog(results_dir, rank=comm.rank) as log:
        log.metadata("train_throughput", {"unit": "samples/s"})
        log.log("PARAMETER", vars(args))
        with log.progress("epoch 1/20", total=rows) as bar:
            bar.advance(batch.global_rows)
            log.log((100, 9100), {"loss": 0.4512})
            bar.show(loss=0.4512)
        log.log((), last_metrics)          # the run's summary
    """

    def __init__(
        self,
        results_dir: str | Path,
        log_filename: str = "log.json",
        *,
        rank: int = 0,
        append: bool = False,
        done: int | None = None,
        inside: bool = False,
        events_dir: str | Path | None = None,
        first_event: int | None = None,
        elapsed: float = 0.0,
    ):
        """Opens the files `log_filename` (DLLL) and `metrics.jsonl` of `results_dir`, which is made if it is not there.

        Args:
            append: continue the files of a run that goes on; otherwise they are emptied.
            done: steps of a training that goes on. Records of later ones, which it does again, are dropped.
            inside: whether it goes on inside an epoch, so that an evaluation after `done` steps is done again too.
            events_dir: where TensorBoard events go, if they are wanted.
            first_event: the step from which on TensorBoard forgets what it was told before: 0 for a new run, the next
                step of one that goes on, None for what adds to a run.
            elapsed: seconds that the run has taken before.
        Raises:
            InputError: a file cannot be written, or TensorBoard is wanted and not installed.
        """
        self._begin = time.time() - elapsed
        self._sinks: list[Sink] = []
        self._console = Console(stderr=True) if rank == 0 else None
        if self._console is None:
            return
        directory = Path(results_dir)
        if events_dir is not None:
            self._sinks.append(TensorBoard(Path(events_dir), first_event))
        self._sinks.append(DlllLines(_open(directory / log_filename, append, done, inside)))
        self._sinks.append(MetricLines(_open(directory / METRICS_FILE, append, done, inside)))
        self._sinks.append(Terminal(self._console))

    def log(self, step: Step, data: dict[str, Any]) -> None:
        """One record.

        Args:
            step: `(step,)` or `(step, total_steps)`; `()` for the run's summary; "PARAMETER" for its arguments.
            data: numbers by name (for "PARAMETER" anything that JSON can hold).
        """
        for sink in self._sinks:
            sink.log(step, data, time.time() - self._begin)

    def metadata(self, metric: str, metadata: dict[str, Any]) -> None:
        """What a metric means: `metadata("train_throughput", {"unit": "samples/s"})`."""
        for sink in self._sinks:
            sink.metadata(metric, metadata, time.time() - self._begin)

    def progress(self, description: str, total: int, done: int = 0) -> "RowProgress":
        """A context manager that shows how far `total` rows are worked through, `done` of them before it begins."""
        return RowProgress(self._console, description, total, done)

    def close(self) -> None:
        """Closes every file; later records are dropped."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class DlllLines:
    """dllogger's file: `DLLL {json}`, one line for each record."""

    def __init__(self, file: TextIO):
        self._file = file

    def log(self, step: Step, data: dict[str, Any], seconds: float) -> None:
        self._write(seconds, type="LOG", step=step, data=data)

    def metadata(self, metric: str, metadata: dict[str, Any], seconds: float) -> None:
        self._write(seconds, type="METADATA", metric=metric, metadata=metadata)

    def close(self) -> None:
        self._file.close()

    def _write(self, seconds: float, **record: Any) -> None:
        times = {"timestamp": str(time.time()), "datetime": str(datetime.now()), "elapsedtime": str(seconds)}
        self._file.write(f"DLLL {_json(times | record)}\n")


class MetricLines:
    """`metrics.jsonl`: `{"step": [...], "seconds": of the run so far, name: number, ...}`, a line a record."""

    def __init__(self, file: TextIO):
        self._file = file

    def log(self, step: Step, data: dict[str, Any], seconds: float) -> None:
        if not isinstance(step, str):
            self._file.write(_json({"step": step, "seconds": round(seconds, 3)} | data) + "\n")

    def metadata(self, metric: str, metadata: dict[str, Any], seconds: float) -> None:
        """Numbers only."""

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars by step, and the run's arguments as text."""

    def __init__(self, directory: Path, first_step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "--tensorboard needs the package tensorboard: pip install 'widedeep[tensorboard]'"
            ) from error
        with atomic.write_errors(directory, KEPT):
            if first_step == 0:
                for events in directory.glob("events.out.tfevents.*"):
                    events.unlink()
            self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, step: Step, data: dict[str, Any], seconds: float) -> None:
        if isinstance(step, str):
            self._writer.add_text(step.lower(), f"```\n{json.dumps(plain(data), indent=2, default=str)}\n```")
        elif step:  # the summary repeats the last evaluation
            for name, value in data.items():
                tag, place = _place(step, name)
                self._writer.add_scalar(tag, float(value), place)

    def metadata(self, metric: str, metadata: dict[str, Any], seconds: float) -> None:
        """TensorBoard has no place for units."""

    def close(self) -> None:
        self._writer.close()


class Terminal:
    """A readable line for each record of numbers: above the progress bar, or through `logging` off terminals."""

    def __init__(self, console: Console):
        self._console = console
        self._units: dict[str, str] = {}
        self._handler = None
        if not logger.hasHandlers():
            self._handler = logging.StreamHandler()
            self._handler.setFormatter(logging.Formatter("widedeep: %(message)s"))
            self._level = logger.level
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)

    def log(self, step: Step, data: dict[str, Any], seconds: float) -> None:
        if isinstance(step, str):
            return
        where = f"step {'/'.join(map(str, step))}" if step else "finished"
        values = "  ".join(f"{name} {_short(value)}{self._units.get(name, '')}" for name, value in data.items())
        if self._console.is_terminal:
            self._console.print(f"{where}  {values}", highlight=False, markup=False, soft_wrap=True)
        else:
            logger.info("%s  %s", where, values)

    def metadata(self, metric: str, metadata: dict[str, Any], seconds: float) -> None:
        if unit := metadata.get("unit"):
            self._units[metric] = f" {unit}"

    def close(self) -> None:
        if self._handler:
            logger.removeHandler(self._handler)
            logger.setLevel(self._level)


class RowProgress:
    """Rows done of one epoch, with rows/s, the latest values and the time left; off terminals a line now and then."""

    def __init__(self, console: Console | None, description: str, total: int, done: int = 0):
        """console: None shows nothing."""
        self._description, self._total, self._done, self._first = description, total, done, done
        self._values = ""
        self._bar, self._begin = None, time.monotonic()
        self._next_line = self._begin + SECONDS_BETWEEN_LINES if console else float("inf")
        if console and console.is_terminal:
            self._next_line = float("inf")
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                RowsPerSecond(),
                TextColumn("{task.fields[values]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(description, total=total, completed=done, values="")

    def advance(self, rows: int) -> None:
        """`rows` more are done."""
        self._done += rows
        if self._bar:
            self._bar.advance(self._task, rows)
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            rate = (self._done - self._first) / (now - self._begin)
            left = (self._total - self._done) / max(rate, 1.0)
            share = 100 * self._done / self._total
            text = "%s  %.0f %% of %d rows  %.0f rows/s  %.0f s left  %s"
            logger.info(text, self._description, share, self._total, rate, left, self._values)

    def show(self, **values: float) -> None:
        """The latest values, by name, beside the bar."""
        self._values = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar:
            self._bar.update(self._task, values=self._values)

    def __enter__(self) -> "RowProgress":
        self._begin = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()


class RowsPerSecond(ProgressColumn):
    """The recent speed of a task."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} rows/s")


def _place(step: tuple[int, ...], name: str) -> tuple[str, int]:
    """Tag and place on TensorBoard's axis."""
    if name == "batch_samplesps":
        return name, step[-1]  # a benchmark's steps are (1, index)
    # What an evaluation has seen on its way is counted in its own batches; a training's curves count other steps.
    is_running = len(step) == 1 and not name.endswith("_val")
    return f"eval/{name}" if is_running else name, step[0]


def _open(path: Path, append: bool, done: int | None, inside: bool) -> TextIO:
    with atomic.write_errors(path, KEPT):
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            _cut(path, done, inside)
        return path.open("a" if append else "w", buffering=1, encoding="utf-8")


def _cut(path: Path, done: int | None, inside: bool) -> None:
    """Takes half a line off, which a killed run left, and the records of a training that it does again."""
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    last = (math.inf,) if done is None else (done, not inside)
    kept = [_trained(line) <= last for line in lines]
    first = kept.index(False) if False in kept else len(lines)
    with path.open("r+b") as file:  # the same file, whoever looks at it
        file.seek(sum(map(len, lines[:first])))
        file.writelines(compress(lines[first:], kept[first:]))
        file.truncate()


def _trained(line: bytes) -> tuple[int, bool]:
    """The step of a training's record in either log, and whether it is an evaluation; (0, False) of any other line."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        record = json.loads(line.removeprefix(b"DLLL "))
        names = record.get("data", record).keys()
        if len(record["step"]) == 2 and names & {"loss", "loss_val"}:
            return int(record["step"][0]), "loss_val" in names
    return 0, False


def lacks_summary(path: Path, done: int) -> bool:
    """Whether `metrics.jsonl` tells of a training up to its last step, `done`, and lacks the summary behind that."""
    with contextlib.suppress(OSError):
        for line in reversed(path.read_bytes().splitlines()):
            if _trained(line)[0] == done:
                return True
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] == []:
                    return False
    return False


def last_seconds(path: Path, done: int) -> float:
    """The clock in `metrics.jsonl` of a training's last record up to the step `done`; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in reversed(path.read_bytes().splitlines()):
            if 0 < _trained(line)[0] <= done:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return float(json.loads(line)["seconds"])
    return 0.0


def _json(value: dict[str, Any]) -> str:
    return json.dumps(plain(value), default=_number)


def _number(value: Any) -> Any:
    """NumPy and torch scalars as numbers, anything else (paths) as text."""
    return plain(value.item()) if hasattr(value, "item") else str(value)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"
