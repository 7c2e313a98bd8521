"""Which method, at what cost: agreement with the truth against seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_mlflow.evaluation.figures import HIGH, INFLUENCE_SECONDS, LOW, SPEARMAN
from dit_mlflow.explanation.over_seeds import SECONDS
from dit_mlflow.plots.canvas import HELPFUL, MARKED, NEUTRAL, SMALL, literal, new_figure
from dit_mlflow.plots.pictures import CHARACTER

MEASURE_COLOURS = {"query": HELPFUL, "ranking": "#009E73", "suspicion": MARKED}
LEGEND = {
    "query": "estimates the change of the query",
    "ranking": "ranks by it",
    "suspicion": "looks for suspicious samples, whatever the query",
}

WIDTH, HEIGHT, TALL = 6.8, 3.8, 0.175
"""Inches: about the size of the axes, and the height of a name."""

AGREEMENT = SPEARMAN.leaf

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def plot_fidelity_against_cost(
    table: pd.DataFrame, attainable: float | None = None, training: float | None = None
) -> Figure:
    """Agreement with exact leave-one-out over the whole run, against seconds; a point is a method.

    Args:
        table: with columns ``method``, ``measures``, ``seconds``, ``spearman``, and, where there are intervals,
            ``spearman_low``, ``spearman_high``; rows without a correlation are left out.
        attainable: correlation of leave-one-out in the recorded dtype with the truth, drawn as a line.
        training: seconds of the training itself, drawn as a line.
    """
    shown = table.dropna(subset=[AGREEMENT]).sort_values(AGREEMENT, ascending=True).reset_index(drop=True)
    figure = new_figure(5.6)
    axes = figure.subplots()
    for measures, colour in MEASURE_COLOURS.items():
        rows = shown[shown["measures"] == measures]
        if len(rows):
            ends = rows.reindex(columns=[AGREEMENT + LOW, AGREEMENT + HIGH]).to_numpy(dtype=float).T
            spread = np.abs(ends - rows[AGREEMENT].to_numpy())
            style: dict[str, Any] = {"color": colour, "capsize": 3, "lw": 1.2, "ms": 7, "label": LEGEND[measures]}
            axes.errorbar(rows[SECONDS], rows[AGREEMENT], yerr=spread, fmt="o", **style)
    axes.set_xscale("log")
    axes.set_xlim(shown[SECONDS].min() / 1.5, shown[SECONDS].max() * 1.5)
    axes.axhline(0, color=NEUTRAL, lw=0.8)
    if attainable is not None:
        axes.axhline(attainable, color="black", lw=0.8, ls=":", label="leave-one-out in the recorded precision")
    if training is not None:
        axes.axvline(training, color=NEUTRAL, lw=0.8, ls="--", label="the training itself")
    _label_points(axes, shown)
    axes.set_xlabel(INFLUENCE_SECONDS.heading)
    axes.set_ylabel(f"{SPEARMAN.heading} correlation with exact leave-one-out\n(whole run; bars: 95 % interval)")
    axes.set_title("Which method, at what cost")
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _label_points(axes: Axes, shown: pd.DataFrame) -> None:
    """Write names beside the points, moved where they would cover a name or another point."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    decades = math.log10(right / left)
    # In inches, from the approximate size of the axes.
    points = [
        (
            literal(str(name), 40),
            WIDTH * math.log10(seconds / left) / decades,
            HEIGHT * (spearman - bottom) / (top - bottom),
        )
        for name, seconds, spearman in shown[["method", SECONDS, AGREEMENT]].to_numpy().tolist()
    ]
    taken = [(x - 0.07, y - 0.07, x + 0.07, y + 0.07) for _, x, y in points]
    for own, (name, x, y) in enumerate(points):
        others = taken[:own] + taken[own + 1 :]
        box = next((box for box in _places(name, x, y) if _free(box, others)), next(_places(name, x, y)))
        taken.append(box)
        beside = abs(box[1] + TALL / 2 - y) < 0.01
        line = None if beside else {"arrowstyle": "-", "lw": 0.5, "color": NEUTRAL, "shrinkB": 4}
        middle = (box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y
        style: dict[str, Any] = {"xytext": (72 * middle[0], 72 * middle[1]), "fontsize": SMALL, "arrowprops": line}
        style["bbox"] = {"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5}
        where = (left * 10 ** (x * decades / WIDTH), bottom + y * (top - bottom) / HEIGHT)
        axes.annotate(name, where, textcoords="offset points", ha="center", va="center", **style)


def _places(name: str, x: float, y: float) -> Iterator[Box]:
    """Places for a name: right or left of its point, then further and further above and below."""
    length = CHARACTER * len(name)
    for shift in (0.0, *(sign * step * TALL for step in range(1, 9) for sign in (1, -1))):
        for start in (x + 0.1, x - 0.1 - length):
            if start >= 0 and start + length <= WIDTH and y + shift - TALL / 2 >= 0 and y + shift + TALL / 2 <= HEIGHT:
                yield (start, y + shift - TALL / 2, start + length, y + shift + TALL / 2)
    yield (x + 0.1, y - TALL / 2, x + 0.1 + length, y + TALL / 2)


def _free(box: Box, others: Sequence[Box]) -> bool:
    return all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in others)
