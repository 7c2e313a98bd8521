"""Which method, at what cost: one figure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_mlflow.report.plots import HELPFUL, MARKED, NEUTRAL, SMALL, new_figure

COLOURS = {"query": HELPFUL, "ranking": "#009E73", "suspicion": MARKED}
LEGEND = {
    "query": "estimates the change of the query",
    "ranking": "ranks by it",
    "suspicion": "looks for suspicious samples, whatever the query",
}


def plot_fidelity_against_cost(
    table: pd.DataFrame, attainable: float | None = None, training: float | None = None
) -> Figure:
    """Agreement with exact leave-one-out over the whole run, against seconds; a point is a method.

    Args:
        table: with columns ``method``, ``measures``, ``seconds``, ``spearman``, ``spearman_low``, ``spearman_high``;
            rows without a correlation are left out.
        attainable: correlation of leave-one-out with itself in the recorded dtype, drawn as a line.
        training: seconds of the training itself, drawn as a line.
    """
    shown = table.dropna(subset=["spearman"]).sort_values("spearman", ascending=True).reset_index(drop=True)
    figure = new_figure(5.6)
    axes = figure.subplots()
    for measures, colour in COLOURS.items():
        rows = shown[shown["measures"] == measures]
        if len(rows):
            spread = np.abs(rows[["spearman_low", "spearman_high"]].to_numpy().T - rows["spearman"].to_numpy())
            style: dict[str, Any] = {"color": colour, "capsize": 3, "lw": 1.2, "ms": 7, "label": LEGEND[measures]}
            axes.errorbar(rows["seconds"], rows["spearman"], yerr=spread, fmt="o", **style)
    axes.set_xscale("log")
    axes.set_xlim(shown["seconds"].min() / 1.5, shown["seconds"].max() * 2.5)
    axes.axhline(0, color=NEUTRAL, lw=0.8)
    if attainable is not None:
        axes.axhline(attainable, color="black", lw=0.8, ls=":", label="leave-one-out in the recorded precision")
    if training is not None:
        axes.axvline(training, color=NEUTRAL, lw=0.8, ls="--", label="the training itself")
    _label_points(axes, shown)
    axes.set_xlabel("seconds")
    axes.set_ylabel("Spearman correlation with exact leave-one-out\n(whole run; bars: 95 % interval)")
    axes.set_title("Which method, at what cost")
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _label_points(axes: Axes, shown: pd.DataFrame) -> None:
    """Names beside the points, moved up where they would cover one another."""
    points = shown[["method", "seconds", "spearman"]].to_numpy().tolist()
    taken = [(math.log10(seconds) - 0.05, spearman) for _, seconds, spearman in points]
    for name, seconds, spearman in points:
        x, y = math.log10(seconds), spearman
        taken.remove((x - 0.05, spearman))
        # A label reaches to the right, by about half a power of ten.
        while any(-0.45 < a - x < 0.45 and abs(y - b) < 0.05 for a, b in taken):
            y += 0.05
        taken += [(x, y), (x - 0.05, spearman)]
        line = {"arrowstyle": "-", "lw": 0.4, "color": NEUTRAL} if y > spearman else None
        style: dict[str, Any] = {"xytext": (10**x * 1.09, y), "fontsize": SMALL, "va": "center", "arrowprops": line}
        axes.annotate(name, (seconds, spearman), **style)
