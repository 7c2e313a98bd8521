"""Windows of training steps."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from dit_mlflow.errors import InputError

NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True, order=True)
class Window:
    """The steps ``start … end - 1``, ``0 <= start < end``.

    Raises:
        InputError: the bounds are not in that order.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if not 0 <= self.start < self.end:
            raise InputError(f"window {self.start}:{self.end}: expected 0 <= start < end, in steps")

    def __contains__(self, t: int) -> bool:
        return self.start <= t < self.end

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


class Timeline(Protocol):
    """Steps and epochs of a training: of a trajectory, or of the plan of one."""

    @property
    def num_steps(self) -> int: ...

    @property
    def epoch_ends(self) -> tuple[int, ...]: ...


def parse_windows(text: str, trajectory: Timeline) -> list[Window]:
    """Parse windows as a user writes them.

    Args:
        text: ``"epochs"`` for one window per epoch; ``"8"`` for 8 equal windows that cover training (bounds
            ``floor(k * T / 8)``); ``"0:80,80:160"`` for explicit step ranges, end excluded.
        trajectory: a trajectory, or anything else with ``num_steps`` and ``epoch_ends``.

    Raises:
        InputError: the text has another form, or a window lies outside training.

    >>> from dit_mlflow.workload import Plan
    >>> [str(window) for window in parse_windows("3", Plan((5, 10)))]
    ['0-3', '3-6', '6-10']
    """
    text = text.strip()
    steps = trajectory.num_steps
    if steps == 0:
        raise InputError("training has no steps, so there are no windows")
    if text == "epochs":
        return [Window(a, b) for a, b in pairwise([0, *trajectory.epoch_ends])]
    if NUMBER.fullmatch(text):
        count = int(text)
        if not 1 <= count <= steps:
            raise InputError(f"{count} windows were asked over {steps} steps; expected 1 … {steps}")
        return [Window(a, b) for a, b in pairwise(k * steps // count for k in range(count + 1))]
    windows = [_parse_range(part, text) for part in text.split(",")]
    check_windows(windows, steps)
    return windows


def check_windows(windows: Sequence[Window], num_steps: int) -> None:
    """Raise :class:`InputError` unless there is a window and all end within training."""
    given: object = windows
    if isinstance(given, str):
        raise InputError(
            f"windows={given!r}; expected a list of Window: parse_windows({given!r}, trajectory) gives one"
        )
    others = [given] if isinstance(given, Window) else [one for one in windows if not isinstance(one, Window)]
    if others:
        raise InputError(f"windows: got {others[0]!r}; expected a list such as [Window(0, 80), Window(80, 160)]")
    if not windows:
        raise InputError("no window was given; expected at least one")
    late = [window for window in windows if window.end > num_steps]
    if late:
        raise InputError(
            f"window {late[0].start}:{late[0].end} ends past training, which has {num_steps} steps "
            f"(0 … {num_steps - 1}); the last window can end at {num_steps}"
        )


def _parse_range(part: str, text: str) -> Window:
    bounds = [bound.strip() for bound in part.split(":")]
    if len(bounds) != 2 or not all(map(NUMBER.fullmatch, bounds)):
        raise InputError(
            f"windows={text[:80]!r} cannot be read at {part[:40]!r}; expected 'epochs', a number of equal windows "
            "such as '8', or step ranges such as '0:80,80:160'"
        )
    return Window(*map(int, bounds))
