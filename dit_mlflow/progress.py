"""Progress bars: for long work, in a terminal only, removed when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from typing import Any, TextIO, TypeVar

from tqdm.auto import tqdm

DELAY = 1.0
"""Seconds before a bar is shown."""

TICK = 0.5
"""Seconds between two looks at the clock of a job."""

LOADING = "loading"
"""The first phase of every job: libraries are imported, which takes seconds."""

Item = TypeVar("Item")

_phases: ContextVar[_Phases | None] = ContextVar("phases", default=None)


def progress_bar(total: int, title: str, unit: str = "step", shown: bool = True) -> tqdm[Any]:
    """A bar to call ``update(count)`` on inside of ``with``; one that is not ``shown`` does nothing."""
    scale, disable = total > 10_000, None if shown else True
    return tqdm(total=total, desc=title, unit=unit, unit_scale=scale, disable=disable, leave=False, delay=DELAY)


def progress_over(items: Sequence[Item], title: str, unit: str) -> Iterable[Item]:
    """``items``, with a bar that counts them."""
    return tqdm(items, desc=title, unit=unit, disable=None, leave=False, delay=DELAY)


class _Phases:
    """The bar of a job: its phases, of which one is on, and a clock."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._places = {title: place for place, title in enumerate(titles, 1)}
        bounds = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}"
        self.bar = tqdm(desc=titles[0], initial=1, total=len(titles), bar_format=bounds, disable=None, leave=False)

    def enter(self, title: str) -> None:
        self.bar.n = self._places.get(title, self.bar.n)
        self.bar.set_description_str(title)

    def tick(self, ended: Event) -> None:
        while not ended.wait(TICK):
            self.bar.refresh()


@contextmanager
def phases(*titles: str) -> Iterator[None]:
    """Over a job: which of its phases is on (:func:`phase`), with a clock that moves where the work tells nothing."""
    shown = _Phases((LOADING, *titles))
    ended, token = Event(), _phases.set(shown)
    clock = Thread(target=shown.tick, args=(ended,), daemon=True)
    if not shown.bar.disable:
        clock.start()
    try:
        yield
    finally:
        ended.set()
        _phases.reset(token)
        if clock.is_alive():
            clock.join(TICK)
        shown.bar.close()


def phase(title: str) -> None:
    """Says that a phase of the job begins; nothing where no job runs."""
    if shown := _phases.get():
        shown.enter(title)


def say(line: str, file: TextIO | None = None) -> None:
    """A line on stderr, or on ``file``, above the bars."""
    file = file or sys.stderr
    tqdm.write(line, file=file)
    file.flush()
