"""What calls take in a long run, by clocks in the test's hands: a host's, and those of a host and a GPU together."""

import contextlib
from functools import partial
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch

from widedeep.steps import timing, trial

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAUNCH = 20e-6  # seconds that the host takes for a launch, or for the replay of a graph
LIMIT, SLOWER = 0.05, 1.12  # a card that has been busy for so many seconds comes to its power limit


class Card:
    """A host and a GPU with a clock each. What is launched runs when all before it has ended."""

    def __init__(self):
        self.host = self.gpu = self.busy_since = 0.0
        self.recording = None

    def launch(self, *seconds):
        if self.recording is not None:
            self.recording.kernels += seconds
            return
        self.host += LAUNCH
        if self.gpu < self.host:
            self.gpu = self.busy_since = self.host
        for each in seconds:
            self.gpu += each * (SLOWER if self.gpu - self.busy_since > LIMIT else 1.0)

    def install(self, monkeypatch):
        card = self

        class Graph:
            def __init__(self):
                self.kernels = []

            def replay(self):
                card.launch(*self.kernels)

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = max(card.gpu, card.host)

            def synchronize(self):
                card.host = max(card.host, self.time)

            def elapsed_time(self, other):
                assert card.host >= other.time
                return (other.time - self.time) * 1000

        @contextlib.contextmanager
        def graph(recording, *_, **__):
            card.recording = recording
            yield
            card.recording = None

        stand_ins = {"CUDAGraph": Graph, "Event": Event, "graph": graph, "graph_pool_handle": lambda: 0}
        stand_ins |= {"Stream": lambda *_, **__: None, "current_stream": lambda device: None}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)


@pytest.fixture
def card(monkeypatch):
    card = Card()
    card.install(monkeypatch)
    return card


@pytest.mark.parametrize("seconds", [(5e-6, 6e-6, 9e-6), (4e-4, 4.1e-4, 5e-4), (0.03, 0.031, 0.04)])
def test_the_card_is_timed_at_work_and_not_the_host(card, seconds):
    def call(s):
        card.launch(s)
        card.launch(s)

    got = timing.in_turn([partial(call, s) for s in seconds], CUDA, trial.TURN, trial.ROUNDS)
    assert got == pytest.approx([2 * SLOWER * s for s in seconds], rel=1e-3)


@pytest.mark.parametrize("seconds", [5e-6, 40e-6, 1e-3])
def test_the_trial_of_all_routes_is_short(card, seconds):
    timing.in_turn([partial(card.launch, seconds)] * len(trial.ROUTES), CUDA, trial.TURN, trial.ROUNDS)
    assert max(card.gpu, card.host) < 0.7


@pytest.fixture
def calls(monkeypatch):
    """call(name, seconds), and the names of the calls so far."""
    now, names = [0.0], []

    def call(name, seconds):
        names.append(name)
        now[0] += seconds(len(names)) if callable(seconds) else seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return call, names


def test_functions_take_turns_of_about_equal_length(calls):
    call, names = calls
    got = timing.in_turn([partial(call, "a", 1.0), partial(call, "b", 30.0)], CPU, turn=20.5, rounds=3)
    assert got == pytest.approx([1.0, 30.0])
    turns = [(name, len(list(group))) for name, group in groupby(names)]
    assert turns[2:] == [("a", 16), ("b", 1)] * 4  # 16: two graphs of eight


def test_the_first_round_and_disturbed_turns_do_not_count(calls):
    call, names = calls
    slow = {9: 100.0, 10: 100.0, 11: 50.0, 15: 0.5}  # eight calls come before the rounds, and each turn has two

    def seconds(n):
        return slow.get(n, 1.0)

    assert timing.in_turn([partial(call, "a", seconds)], CPU, turn=2.5, rounds=3) == [1.0]
    assert len(names) == 16


def test_what_takes_no_time_is_timed(calls):
    call, _ = calls
    assert timing.in_turn([partial(call, "a", 0.0)], CPU, turn=1e-5, rounds=1) == [0.0]
