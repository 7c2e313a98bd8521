"""Progress bars: for long work, in a terminal only, removed when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

DELAY = 1.0
"""Seconds before a bar is shown."""

Item = TypeVar("Item")


def progress_bar(total: int, title: str, unit: str = "step", shown: bool = True) -> tqdm[Any]:
    """A bar to call ``update(count)`` on inside of ``with``; one that is not ``shown`` does nothing."""
    scale, disable = total > 10_000, None if shown else True
    return tqdm(total=total, desc=title, unit=unit, unit_scale=scale, disable=disable, leave=False, delay=DELAY)


def progress_over(items: Sequence[Item], title: str, unit: str) -> Iterable[Item]:
    """``items``, with a bar that counts them."""
    return tqdm(items, desc=title, unit=unit, disable=None, leave=False, delay=DELAY)
