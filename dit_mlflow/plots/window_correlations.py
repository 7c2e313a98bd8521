"""How alike the influence in two windows is."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dit_mlflow.evaluation.patterns import window_correlations
from dit_mlflow.explanation.numbers import decimals
from dit_mlflow.influence import Influence
from dit_mlflow.plots.canvas import SMALL, label_windows, new_figure


def plot_window_correlations(influence: Influence) -> Figure:
    """Heat map of :func:`dit_mlflow.evaluation.patterns.window_correlations`, with numbers up to 12 windows."""
    matrix = window_correlations(influence)
    count = len(matrix)
    figure = new_figure(6.2)
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr")
    label_windows(axes, influence.windows)
    axes.set_yticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()], fontsize=SMALL)
    if count <= 12:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, decimals(value), ha="center", va="center", fontsize=SMALL, color=colour)
    axes.set_ylabel("window (training steps)")
    axes.set_title(f"Do the same samples matter early and late?\n({influence.method}, {influence.kind})", fontsize=11)
    figure.colorbar(image, label="Spearman correlation of the samples' influence").ax.tick_params(labelsize=SMALL)
    return figure
