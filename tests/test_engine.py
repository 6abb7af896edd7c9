"""The pool: order, laziness, exceptions."""

import threading
import time

import pytest

from preprocess.engine import ThreadEngine
from widedeep.errors import InputError


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_tasks(workers):
    def slow_for_early_tasks(i):
        time.sleep(0.02 if i % 5 == 0 else 0)
        return i * i

    with ThreadEngine(workers) as engine:
        assert list(engine.map(slow_for_early_tasks, range(20))) == [i * i for i in range(20)]
        assert list(engine.map(slow_for_early_tasks, [])) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_are_drawn_as_results_are_taken(workers):
    drawn = []

    def tasks():
        for i in range(100):
            drawn.append(i)
            yield i

    with ThreadEngine(workers) as engine:
        results = engine.map(lambda i: i, tasks())
        next(results)
        assert len(drawn) <= workers + 1


def test_tasks_run_side_by_side():
    meeting = threading.Barrier(3, timeout=30)
    with ThreadEngine(3) as engine:
        assert len(list(engine.map(lambda _: meeting.wait(), range(3)))) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_passes_through_and_the_pool_ends(workers):
    def fail_at_three(i):
        if i == 3:
            raise InputError("row 3")
        return i

    with ThreadEngine(workers) as engine:
        results = engine.map(fail_at_three, range(100))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(InputError, match="row 3"):
            next(results)


def test_no_worker_is_an_error():
    with pytest.raises(InputError, match="workers is 0"):
        ThreadEngine(0)
