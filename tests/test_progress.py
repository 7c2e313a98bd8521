"""Bars are for people at a terminal who have to wait."""

from __future__ import annotations

import io
import sys
import time

import pytest

from dit_mlflow import progress
from dit_mlflow.progress import phase, phases, progress_bar, progress_over, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_by_work(stream: io.StringIO, seconds: float, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(4, "replay") as bar:
        for _ in range(4):
            time.sleep(seconds / 4)
            bar.update()
    for _ in progress_over(range(4), "files", "file"):
        time.sleep(seconds / 4)
    return stream.getvalue()


def test_long_work_shows_bars_in_a_terminal_and_takes_them_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.05)
    shown = shown_by_work(Terminal(), 0.8, monkeypatch)
    assert "replay:  50%" in shown
    assert "files:  50%" in shown
    assert shown.split("\r")[-1] == ""


def test_long_work_says_nothing_to_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.05)
    assert shown_by_work(io.StringIO(), 0.8, monkeypatch) == ""


def test_short_work_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "replay" not in shown_by_work(Terminal(), 0.01, monkeypatch)


def test_a_job_says_which_phase_is_on_and_its_clock_moves_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK", 0.05)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with phases("training", "drawing"):
        assert "loading 1/3" in stream.getvalue()
        time.sleep(1.3)
        assert "00:01" in stream.getvalue()
        phase("training")
        phase("what was not announced")
        assert "what was not announced 2/3" in stream.getvalue()
        say("a line")
        phase("drawing")
        assert "drawing 3/3" in stream.getvalue()
    assert "a line\n" in stream.getvalue()
    assert stream.getvalue().split("\r")[-1] == ""
    ended = stream.getvalue()
    phase("training")
    time.sleep(0.2)
    assert stream.getvalue() == ended


def test_a_job_says_nothing_of_its_phases_to_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with phases("training"):
        phase("training")
        say("a line")
    assert stream.getvalue() == "a line\n"
