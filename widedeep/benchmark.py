"""`--benchmark`: throughput of training, or with `--evaluate` of the forward pass, with the original's clock.

Steps 0 to max(benchmark_warmup_steps, 1) run unmeasured; the clock runs from the end of that step to the end of step
benchmark_steps, data loading included. The data is repeated endlessly; nothing is evaluated or saved.
"""

from collections.abc import Iterator
from itertools import count

from widedeep.config import TrainConfig
from widedeep.data import Batch, Places, Reader
from widedeep.dist import LocalComm
from widedeep.journal import Journal
from widedeep.run import Run, tell
from widedeep.steps import timing


def benchmark(config: TrainConfig, comm: LocalComm) -> dict[str, float]:
    """Measures; logs samples/s of each step and of all; returns {"train_throughput" or "validation_throughput": it}."""
    run = Run.open(config, comm)
    evaluating = config.mode.evaluate
    key = "validation_throughput" if evaluating else "train_throughput"
    with Journal(run, ("test",) if evaluating else ("train",)) as journal:
        rows, seconds = measure(run)
        result = {key: sum(rows) / sum(seconds)}
        for index, (n, s) in enumerate(zip(rows, seconds), first_step(config) + 1):
            journal.log((1, index), {"batch_samplesps": n / s})
        journal.log((), result)
    tell(comm, f"{key} : {result[key]:.1f} samples/s")
    asked = config.training.eval_batch_size if evaluating else config.training.global_batch_size
    if (low := min(rows)) < asked:  # the data set is smaller, or an epoch ends with what is left
        found = f"{low}" if low == max(rows) else f"{low} to {max(rows)}"
        tell(comm, f"measured batches of {found} rows, where {asked} were asked for")
    return result


def measure(run: Run) -> tuple[list[int], list[float]]:
    """Rows and seconds of each measured step; on a GPU of the device's own work, without stopping it."""
    evaluating = run.config.mode.evaluate
    reader = run.ordered_reader("test") if evaluating else run.train_reader()
    rows, ends = [], []
    for index, batch in enumerate(endless(reader, run.step.places)):
        if evaluating:
            run.step.predict(batch)
        else:
            run.step.train(batch, index, run.learning_rate(index))
        if index >= first_step(run.config):
            ends.append(timing.mark(run.comm.device))
            rows.append(batch.global_rows)
        if index >= run.config.mode.benchmark_steps:
            break
    return rows[1:], timing.between(ends)


def first_step(config: TrainConfig) -> int:
    """The step at whose end the clock starts."""
    return max(config.mode.benchmark_warmup_steps, 1)


def endless(reader: Reader, into: Places) -> Iterator[Batch]:
    """Epoch after epoch."""
    for epoch in count():
        yield from reader.epoch(epoch, into=into)
