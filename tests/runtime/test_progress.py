"""Work that takes long says how far it is: in lines where no terminal shows a bar."""

import functools
import io
import logging

import pytest
from tqdm import tqdm

from cu_runner.models.sampling import generate
from cu_runner.runtime import progress
from cu_runner.runtime.progress import FIRST, LONGEST, Progress, counted, duration, slow
from cu_runner.schema.settings import Sampler


@pytest.fixture
def clock(monkeypatch):
    """Returns tick(seconds), which moves the time that progress is measured by."""
    now = [0.0]
    monkeypatch.setattr(progress, "FIRST", FIRST)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


@pytest.fixture
def lines(caplog):
    """Returns lines() -> what was logged."""
    caplog.set_level(logging.INFO, "cu_runner.runtime.progress")
    return lambda: caplog.messages


def test_lines_come_seldom_and_hold_an_estimate(clock, lines):
    with Progress("evaluate", 1000, "image") as shown:
        for done in range(1, 1001):
            clock(1)
            shown.reach(done)
    assert lines()[0] == "   evaluate: 10 of 1000 images, about 16 min left"
    assert [int(line.split()[1]) for line in lines()] == [10, 30, 70, 150, 310, 610, 910]
    assert lines()[-1] == "   evaluate: 910 of 1000 images, about 90 s left"
    assert LONGEST == 300


def test_what_is_done_at_once_says_nothing(clock, lines):
    for _ in counted("score x", 20, "step"):
        clock(FIRST / 21)
    assert lines() == []


def test_work_that_goes_on_counts_what_was_done_before_but_not_as_fast(clock, lines):
    with Progress("unlearn x", 60, "step", done=50) as shown:
        clock(10)
        shown.advance(loss=0.25)
    assert lines() == ["   unlearn x: 51 of 60 steps, about 90 s left, loss 0.25"]


def test_sampling_counts_every_denoising_step(model, clock, lines, monkeypatch):
    """A batch of large images takes minutes; half of it done is half of its images."""
    real = type(model).output

    def slowly(self, *arguments, **more):
        clock(6)
        return real(self, *arguments, **more)

    monkeypatch.setattr(type(model), "output", slowly)
    list(generate(model, ["a"] * 4, [0, 1, 2, 3], Sampler(4, 1), batch_size=4, label="evaluate"))
    assert lines()[0] == "   evaluate: 2 of 4 images, about 12 s left"


def test_what_cannot_be_counted_is_named_once(lines, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    with slow("loading the model"):
        for _ in range(200):
            if lines():
                break
            progress.threading.Event().wait(0.01)
    assert lines() == ["   loading the model ..."]


@pytest.mark.parametrize(
    ("seconds", "said"), [(4, "about 4 s"), (720, "about 12 min"), (12600, "about 3.5 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_terminal_has_a_bar_and_no_lines(clock, lines, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0))
    with Progress("evaluate", 8, "image") as shown:
        clock(60)
        shown.reach(2.5)
        shown.advance(5, loss=1 / 3)
    assert lines() == []
    assert "evaluate" in screen.getvalue()
    assert "loss 0.3333" in screen.getvalue()
