"""How far work is, where nobody sees a bar: lines by a rule; in a terminal: the loss in the bar."""

import functools
import io
import logging
import sys

import pytest
from tqdm import tqdm

from cu_runner.runtime import progress
from cu_runner.runtime.progress import Progress


@pytest.fixture
def lines(caplog, monkeypatch):
    """Returns lines(seconds of every step, steps) -> what is logged of so many steps."""
    monkeypatch.setattr(logging.getLogger("cu_runner"), "propagate", True)
    caplog.set_level(logging.INFO, "cu_runner")
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def work(seconds: float, steps: int, done: int = 0) -> list[str]:
        caplog.clear()
        with Progress("unlearn glacier dot", steps, "step", done) as bar:
            for step in range(done, steps):
                clock[0] += seconds
                bar.advance(loss=1 / (step + 1))
        return caplog.messages

    return work


def numbers(messages: list[str]) -> list[int]:
    return [int(line.split(": ")[1].split(" ")[0]) for line in messages]


def test_a_line_at_every_tenth_but_one_a_minute_at_most_and_one_in_five_at_least(lines):
    assert lines(0.05, 60) == []  # three seconds
    said = lines(1.0, 1000)
    assert numbers(said) == [100 * tenth for tenth in range(1, 10)]
    assert said[0] == "   unlearn glacier dot: 100 of 1000 steps, loss 0.01, about 15 min left"
    assert numbers(lines(0.125, 1000)) == [500]  # the tenths come too often
    assert numbers(lines(10.0, 1000))[:3] == [30, 60, 90]  # and here too rarely
    assert numbers(lines(400.0, 3)) == [1, 2]
    # after an interruption, of what is left
    assert lines(60.0, 10, done=8) == [
        "   unlearn glacier dot: 9 of 10 steps, loss 0.1111, about 1 min left"
    ]


def test_the_bar_of_a_terminal_shows_the_loss_and_no_line_is_logged(lines, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0))
    assert lines(400.0, 3) == []
    assert "unlearn glacier dot" in terminal.getvalue()
    assert "loss 0.3333" in terminal.getvalue()
