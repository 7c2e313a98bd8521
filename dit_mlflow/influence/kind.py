"""The three kinds of window score, as the trainings and the sweeps that they need.

The sweeps are derived from the trainings, so that an estimate and its ground truth answer the same question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dit_mlflow.errors import InputError
from dit_mlflow.influence.window import Window

Kind = Literal["local", "final", "cumulative"]


@dataclass(frozen=True)
class Share:
    """Weight gradients of steps ``lo <= t < hi`` are added to the scores of window ``window``, times ``sign``."""

    window: int
    sign: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Sweep:
    """One adjoint: the query's gradient at step ``start``, pulled back to the first step of its shares."""

    start: int
    shares: tuple[Share, ...]

    @property
    def stop(self) -> int:
        return min(share.lo for share in self.shares)


@dataclass(frozen=True)
class Course:
    """One counterfactual training: from the recorded ``s_start``, with other weights at ``start <= t < until``.

    Attributes:
        measures: ``(c, k, sign)``: the query's change at step ``c`` is added to window ``k``, times ``sign``.
    """

    start: int
    until: int
    measures: tuple[tuple[int, int, int], ...]

    @property
    def stop(self) -> int:
        return max(step for step, _, _ in self.measures)


def check_kind(kind: str) -> Kind:
    """``kind`` if it is one; raises :class:`InputError` with the three and their meaning if not."""
    if kind not in get_args(Kind):
        raise InputError(
            f"kind={kind!r}; expected 'local' (absent in the window, effect at its end), 'final' (absent in the "
            "window, effect at the end of training) or 'cumulative' (absent from the start, change over the window)"
        )
    return kind  # type: ignore[return-value]


def sweeps(trainings: Sequence[Course]) -> list[Sweep]:
    """The adjoints of what the courses measure, along one training, at most one per starting step."""
    shares: dict[int, list[Share]] = {}
    for course in trainings:
        for step, window, sign in course.measures:
            shares.setdefault(step, []).append(Share(window, sign, course.start, min(step, course.until)))
    return [Sweep(start, tuple(parts)) for start, parts in shares.items()]


def courses(kind: Kind, windows: Sequence[Window], num_steps: int) -> list[Course]:
    """The trainings that leave-one-out needs for each sample, and a derivative for each vector of weights.

    Courses with the same start are one if they measure only at steps up to which all their weights hold: their states
    are the same there.
    """
    if kind == "final":
        return [Course(window.start, window.end, ((num_steps, k, 1),)) for k, window in enumerate(windows)]
    measures: dict[int, list[tuple[int, int, int]]] = {}
    for k, window in enumerate(windows):
        if kind == "local":
            measures.setdefault(window.start, []).append((window.end, k, 1))
        else:
            measures.setdefault(0, []).append((window.end, k, 1))
            if window.start > 0:
                measures[0].append((window.start, k, -1))
    return [Course(a, max(step for step, _, _ in parts), tuple(parts)) for a, parts in measures.items()]
