"""A table of the reproduction, and the format of its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_mlflow.evaluation import mean_interval
from dit_mlflow.explanation.markdown import markdown_table

from .cases import Case, seeds_of

KEYS = ["data", "model", "method"]
"""These and ``seed`` identify a child run."""

Series = tuple[str, int, float]
"""Name of a metric, its step, its value."""


@dataclass(frozen=True)
class Unit:
    """A unit of measurement: a training, and figures of it.

    Attributes:
        case, seed: the training.
        share: of flipped labels, where that matters.
    """

    case: Case
    seed: int
    share: float = 0.0


class Table(ABC):
    """A table (or figure) of the paper.

    Attributes:
        name: in ``-P table=…``.
        title: as a heading.
        facets: columns that tell apart the rows of one child run.
        figures: columns with numbers.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    facets: ClassVar[tuple[str, ...]] = ()
    figures: ClassVar[tuple[str, ...]]

    def units(self, cases: Sequence[Case], seeds: int, quick: bool) -> list[Unit]:
        """The units to measure; those of a case and seed are adjacent."""
        return [Unit(case, seed) for case in cases for seed in seeds_of(case, seeds)]

    @abstractmethod
    def measure(self, unit: Unit) -> pd.DataFrame:
        """Rows with the columns :data:`KEYS`, :attr:`facets` and :attr:`figures`."""

    @abstractmethod
    def series(self, rows: pd.DataFrame) -> Iterable[Series]:
        """What the child run of ``rows`` logs."""

    def condensed(self, rows: pd.DataFrame) -> pd.DataFrame:
        """One row per child and combination of facets that the summary tells apart."""
        return rows

    @abstractmethod
    def figure(self, rows: pd.DataFrame) -> Figure:
        """A figure of all seeds."""

    @abstractmethod
    def section(self, rows: pd.DataFrame) -> str:
        """The section of ``docs/reproduction.md``, in Markdown, without its heading."""


def summary(rows: pd.DataFrame, keys: Sequence[str], figures: Sequence[str]) -> pd.DataFrame:
    """Mean over seeds, its interval (95 %, Student's t), minimum, maximum and number of seeds, a row per figure."""
    found = []
    for key, group in rows.groupby(list(keys), sort=False, dropna=False):
        for figure in figures:
            values = group[figure].dropna().to_numpy()
            if len(values):
                low, high = mean_interval(values) if len(values) > 1 else (np.nan, np.nan)
                numbers = {"mean": values.mean(), "low": low, "high": high, "min": values.min(), "max": values.max()}
                found.append({**dict(zip(keys, key, strict=True)), "figure": figure, **numbers, "seeds": len(values)})
    return pd.DataFrame(found)


def every_seed(rows: pd.DataFrame, down: Sequence[str], figure: str, digits: int = 2) -> str:
    """A Markdown table of ``figure`` in the order of the seeds, a row for each combination of ``down``."""
    lines = [[*map(str, key), listed(group[figure], digits)] for key, group in rows.groupby(list(down), sort=False)]
    return markdown_table([*down, "seeds 0, 1, …"], lines)


def mean_of(values: pd.Series, digits: int = 3) -> str:
    """``0.983 (0.970 to 0.996)``: the mean and its interval; without it for fewer than 3, a dash for none."""
    known = values.dropna().to_numpy()
    if not len(known):
        return "–"
    mean = number(known.mean(), digits)
    if len(known) < 3:
        return mean
    low, high = mean_interval(known)
    return f"{mean} ({number(low, digits)} to {number(high, digits)})"


def by_case(values: pd.Series, digits: int = 2) -> str:
    """``mnist dnn 0.98, adult dnn 0.97`` for values by ``(data, model)``; empty for none."""
    cases = zip(values.index.to_list(), values, strict=True)
    return ", ".join(f"{data} {model} {number(value, digits)}" for (data, model), value in cases)


def listed(values: pd.Series, digits: int = 2) -> str:
    """All seeds, in order."""
    return " ".join(number(value, digits) for value in values)


def number(value: float, digits: int = 3) -> str:
    """A number, a dash for none; typographic minus."""
    return "–" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")


def grid(
    rows: pd.DataFrame, down: Sequence[str], across: str, columns: Sequence[str], cell: Callable[[pd.DataFrame], str]
) -> str:
    """A Markdown table: a row for each combination of ``down``, a column for each of ``columns`` in ``across``."""
    lines = []
    for key, group in rows.groupby(list(down), sort=False):
        cells = [cell(group[group[across] == column]) for column in columns]
        if any(text != "–" for text in cells):
            lines.append([*map(str, key), *cells])
    return markdown_table([*down, *map(str, columns)], lines)
