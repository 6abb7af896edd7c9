"""Times the stages of a run and shows how far each is: a bar on a terminal, a log line at the end everywhere."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from preprocess.engine import Engine

log = logging.getLogger(__name__)


@dataclass
class Stage:
    """rows, seconds: of the work done so far; `advance` moves the bar as well."""

    name: str
    rows: int = 0
    seconds: float = 0.0
    _bar: Progress | None = None

    def advance(self, rows: int, work: int | None = None) -> None:
        """work: what was done in the unit of the stage's total, if that is not rows."""
        self.rows += rows
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=rows if work is None else work, rows=self.rows)

    def to_dict(self) -> dict[str, float]:
        rate = self.rows / max(self.seconds, 1e-9)
        return {"rows": self.rows, "seconds": self.seconds, "rows_per_second": rate}


@dataclass(frozen=True)
class Watched:
    """An engine whose `map` advances a stage with each result, by its rows and the work in its task."""

    engine: Engine
    stage: Stage
    rows: Callable[[Any], int]
    work: Callable[[Any], int]

    @property
    def workers(self) -> int:
        return self.engine.workers

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        under_way: deque[int] = deque()

        def noted() -> Iterator[Any]:
            for task in tasks:
                under_way.append(self.work(task))
                yield task

        for result in self.engine.map(function, noted()):
            self.stage.advance(self.rows(result), under_way.popleft())
            yield result


class Stages:
    """The stages of a run, in order, by name."""

    def __init__(self):
        self.done: dict[str, Stage] = {}
        self._console = Console(stderr=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A block of work; total: rows, or what else `Stage.advance` counts; None if it is not known before."""
        stage = Stage(name)
        start = time.perf_counter()
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.fields[rows]:>14,} rows"),
            _RowsPerSecond(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            bar.add_task(name, total=total, rows=0)
            stage._bar = bar
            yield stage
        stage._bar = None
        stage.seconds = time.perf_counter() - start
        self.done[name] = stage
        rate = stage.to_dict()["rows_per_second"]
        log.info("%-18s %12d rows  %8.1f s  %11.0f rows/s", name, stage.rows, stage.seconds, rate)

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {name: stage.to_dict() for name, stage in self.done.items()}


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['rows'] / task.elapsed:,.0f} rows/s" if task.elapsed else "")
