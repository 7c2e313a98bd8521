"""The three kinds of window score, as what must be swept and what must be retrained for them.

Both computations are laid out here side by side, so that an estimate and its ground truth answer the
same question by construction.
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
    """Kicks at steps ``lo <= t < hi`` add ``sign`` times their value to the score of window ``window``."""

    window: int
    sign: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Sweep:
    """One adjoint: starts as the query's gradient at step ``start``, runs down to the lowest share."""

    start: int
    shares: tuple[Share, ...]

    @property
    def stop(self) -> int:
        return min(share.lo for share in self.shares)


@dataclass(frozen=True)
class Course:
    """One counterfactual training: from the recorded ``s_start``, with other weights at ``start <= t < until``.

    ``measures``: at step ``c``, the query's change adds to window ``k`` with a sign: ``(c, k, sign)``.
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


def sweeps(kind: Kind, windows: Sequence[Window], num_steps: int) -> list[Sweep]:
    """The adjoints that the windows need, at most one per starting step."""
    return sweeps_along(courses(kind, windows, num_steps))


def sweeps_along(trainings: Sequence[Course]) -> list[Sweep]:
    """The adjoints of what the courses measure, at most one per starting step; as recorded, all courses are one."""
    shares: dict[int, list[Share]] = {}
    for course in trainings:
        for step, window, sign in course.measures:
            shares.setdefault(step, []).append(Share(window, sign, course.start, min(step, course.until)))
    return [Sweep(start, tuple(parts)) for start, parts in shares.items()]


def courses(kind: Kind, windows: Sequence[Window], num_steps: int) -> list[Course]:
    """The trainings that exact leave-one-out needs per sample, and a derivative per vector of weights.

    Trainings under the same weights from ``a`` on have the same past at every later step, so courses that share their
    start and measure only while the weights still hold are one.
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
