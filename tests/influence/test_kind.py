"""What is swept and retrained for every window of a short training, against each kind's definition."""

from __future__ import annotations

from itertools import chain, combinations

import pytest

from dit_mlflow import InputError, Window
from dit_mlflow.influence.kind import Kind, check_kind, courses, sweeps

T = 4
WINDOWS = [Window(a, b) for a, b in combinations(range(T + 1), 2)]
KINDS: list[Kind] = ["local", "final", "cumulative"]

Terms = dict[tuple[int, tuple[int, ...]], int]
"""Sign by what is measured: the step that the query is asked at, and the steps that the sample is absent from."""


def defined(kind: Kind, window: Window) -> Terms:
    a, b = window.start, window.end
    if kind == "local":
        return {(b, tuple(range(a, b))): 1}
    if kind == "final":
        return {(T, tuple(range(a, b))): 1}
    after: Terms = {(b, tuple(range(b))): 1}
    # At step 0 nothing has changed yet.
    return after if a == 0 else after | {(a, tuple(range(a))): -1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("windows", [*([window] for window in WINDOWS), WINDOWS], ids=str)
def test_sweeps_add_up_to_the_definition(kind: Kind, windows: list[Window]) -> None:
    planned = sweeps(courses(kind, windows, T))
    assert len({sweep.start for sweep in planned}) == len(planned)
    for k, window in enumerate(windows):
        found: Terms = {
            (sweep.start, tuple(range(share.lo, share.hi))): share.sign
            for sweep in planned
            for share in sweep.shares
            if share.window == k
        }
        assert found == defined(kind, window)
    for sweep in planned:
        # No sweep goes on below the steps that count, or begins below them.
        counted = set(chain.from_iterable(range(share.lo, share.hi) for share in sweep.shares))
        assert sweep.stop == min(counted)
        assert max(counted) < sweep.start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("windows", [*([window] for window in WINDOWS), WINDOWS], ids=str)
def test_courses_measure_the_definition(kind: Kind, windows: list[Window]) -> None:
    planned = courses(kind, windows, T)
    for k, window in enumerate(windows):
        found: Terms = {
            (step, tuple(range(course.start, min(step, course.until)))): sign
            for course in planned
            for step, measured, sign in course.measures
            if measured == k
        }
        assert found == defined(kind, window)
    for course in planned:
        assert course.stop == max(step for step, _, _ in course.measures)
        assert course.until <= course.stop
    # One training serves all windows that it can.
    starts = {"local": [window.start for window in windows], "cumulative": [0]}
    assert kind == "final" or len(planned) == len(set(starts[kind]))


def test_another_kind_is_refused_with_the_meaning_of_the_three() -> None:
    assert [check_kind(kind) for kind in KINDS] == KINDS
    with pytest.raises(InputError, match=r"kind='global'; expected 'local' \(.*'final' \(.*'cumulative' \("):
        check_kind("global")
