from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from workloads import digits_workload

from dit_mlflow import InputError, Window, parse_windows, track, train
from dit_mlflow.influence import check_windows, sweep
from dit_mlflow.trajectory import Record
from dit_mlflow.workload import Plan

TIMELINE = Plan((4, 8, 11))


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("epochs", [(0, 4), (4, 8), (8, 11)]),
        ("1", [(0, 11)]),
        ("3", [(0, 3), (3, 7), (7, 11)]),
        ("11", [(t, t + 1) for t in range(11)]),
        ("0:5, 3:11", [(0, 5), (3, 11)]),
        (" 2:3 ", [(2, 3)]),
    ],
)
def test_windows_are_read(text: str, bounds: list[tuple[int, int]]) -> None:
    assert [(window.start, window.end) for window in parse_windows(text, TIMELINE)] == bounds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", "windows='abc' cannot be read"),
        ("9" * 5000, "windows='9999999"),
        ("1_0:1_1", "cannot be read at '1_0:1_1'"),
        ("٣", "cannot be read"),
        ("", "cannot be read"),
        ("0:5,", "cannot be read"),
        ("0-5", "cannot be read"),
        ("0:12", "ends past training, which has 11 steps"),
        ("5:5", "expected 0 <= start < end"),
        ("-1:5", "expected 0 <= start < end"),
        ("0", "expected 1 … 11"),
        ("12", "expected 1 … 11"),
    ],
)
def test_windows_that_cannot_be_used_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_windows(text, TIMELINE)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "no window was given"),
        ([Window(0, 3), (3, 6)], r"got \(3, 6\); expected a list such as \[Window\(0, 80\)"),
        (Window(0, 3), r"got Window\(start=0, end=3\); expected a list"),
        ("epochs", r"parse_windows\('epochs', trajectory\) gives"),
    ],
)
def test_what_is_no_list_of_windows_is_refused(windows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_windows(windows, 11)


def test_membership_is_half_open() -> None:
    assert [t for t in range(5) if t in Window(1, 3)] == [1, 2]


def test_a_step_costs_the_same_however_many_windows_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one step each, and a checkpoint at every step: neither list is gone through at every step."""
    looked = {"sweeps": 0, "checkpoints": 0}

    class Sweeps(list[Any]):
        def __iter__(self) -> Any:
            looked["sweeps"] += 1
            return super().__iter__()

    class Checkpoints(tuple[int, ...]):
        __slots__ = ()

        def __iter__(self) -> Any:
            looked["checkpoints"] += 1
            return super().__iter__()

        def __contains__(self, step: object) -> bool:
            looked["checkpoints"] += 1
            return super().__contains__(step)

    own, steps = sweep.sweeps, Record.checkpoint_steps
    monkeypatch.setattr(sweep, "sweeps", lambda trainings: Sweeps(own(trainings)))
    monkeypatch.setattr(Record, "checkpoint_steps", property(lambda record: Checkpoints(steps.fget(record))))
    looks = []
    for epochs in (1, 8):
        trajectory = train(digits_workload(epochs=epochs), tmp_path / str(epochs), checkpoint_every=1)
        looked.update(sweeps=0, checkpoints=0)
        windows = [Window(t, t + 1) for t in range(trajectory.num_steps)]
        track(trajectory, digits_workload(), windows)
        looks.append(dict(looked))
    assert looks[0] == looks[1]
