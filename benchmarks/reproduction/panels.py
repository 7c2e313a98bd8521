"""Figures with a panel for each data set and model."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_mlflow.plots.canvas import SMALL, new_figure

Panels = dict[tuple[str, str], Axes]


def panels(rows: pd.DataFrame, columns: int, height: float) -> tuple[Figure, Panels]:
    """A figure with a panel for each ``data`` and ``model`` of ``rows``, ``height`` inches high each."""
    names = cases_of(rows)
    columns = min(columns, len(names))
    lines = -(-len(names) // columns)
    figure = new_figure(1.2 + height * lines)
    drawn = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for place, axes in enumerate(drawn.flat):
        axes.set_visible(place < len(names))
        axes.tick_params(labelsize=SMALL, labelbottom=True)
    for axes, (data, model) in zip(drawn.flat, names, strict=False):
        axes.set_title(f"{data} {model}", fontsize=SMALL + 1)
    return figure, dict(zip(names, drawn.flat, strict=False))


def cases_of(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """``(data, model)`` in the order of the rows."""
    return list(dict.fromkeys(zip(rows["data"], rows["model"], strict=True)))


def of_case(rows: pd.DataFrame, case: tuple[str, str]) -> pd.DataFrame:
    """The rows of one data set and model."""
    return rows[(rows["data"] == case[0]) & (rows["model"] == case[1])]


def over_epochs(axes: Axes, rows: pd.DataFrame, figure: str, colour: str, label: str) -> None:
    """The mean over seeds, and the range of all seeds as a band; windows are epochs, numbered from 1."""
    table = rows.assign(window=rows["window"].astype(int) + 1).pivot(index="window", columns="seed", values=figure)
    marker = "o" if len(table) < 4 else ""
    axes.plot(table.index, table.mean(axis=1), lw=1.6, color=colour, marker=marker, ms=3, label=label)
    axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.15, lw=0)


def legend_above(figure: Figure, columns: int) -> None:
    """One legend for all panels."""
    found = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": SMALL}
    figure.legend(list(found.values()), list(found), loc="outside upper center", **style)
