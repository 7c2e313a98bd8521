"""Samples against windows, and windows against each other, as colours."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dit_mlflow.evaluation.patterns import standardised_scores, window_correlations
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.numbers import decimals
from dit_mlflow.explanation.ranking import extremes, ranking_scores
from dit_mlflow.influence import Influence
from dit_mlflow.plots.canvas import DIVERGING, HARMFUL, HELPFUL, MARKED, SMALL, how, label_windows, literal, new_figure

SAMPLES_DRAWN = 15
"""Samples on each side."""


def plot_heat_map(
    influence: Influence, gallery: Gallery | None = None, k: int = SAMPLES_DRAWN, whole: Influence | None = None
) -> Figure:
    """The ``k`` most harmful and the ``k`` most helpful samples, a row each; blue helps, vermilion harms.

    Scores of the first query are divided by the window's root mean square over all samples, so that all windows have
    the same weight. Samples are chosen and ordered by the scores of the ``whole`` run, else by the mean over windows of
    these. Damaged samples are marked.
    """
    gallery = gallery or Gallery()
    scores = standardised_scores(influence)
    worst, best = extremes(scores.mean(axis=0) if whole is None else ranking_scores(influence, whole), k)
    shown, harmful = [*worst, *best[::-1]], len(worst)
    chosen = "on average" if whole is None else "over the whole run"
    figure = new_figure(1.7 + 0.205 * max(len(shown), 3))
    axes = figure.subplots()
    if not shown:
        axes.text(0.5, 0.5, f"no sample mattered {chosen}", transform=axes.transAxes, ha="center")
        return figure
    count = len(influence.windows)
    values = scores[:, shown].T
    values[~np.isfinite(influence.scores[:, 0, shown].T)] = np.nan
    largest = float(np.nanquantile(np.abs(values), 0.98)) if np.isfinite(values).any() else 0.0
    limit = largest or 1.0
    strip = 0.05 * count
    image = axes.imshow(
        values,
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        extent=(-0.5, count - 0.5, len(shown) - 0.5, -0.5),
    )
    indices = [int(influence.samples[sample]) for sample in shown]
    damaged = [row for row, index in enumerate(indices) if index in gallery.corrupted]
    axes.scatter([count - 0.5 + strip / 2] * len(damaged), damaged, marker="D", s=18, color=MARKED, lw=0)
    axes.axhline(harmful - 0.5, color="black", lw=1.5)
    axes.set_xlim(-0.5, count - 0.5 + (strip if damaged else 0))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    names = [literal(f"{index}: {gallery.line(index)}".removesuffix(": "), 38) for index in indices]
    axes.set_yticks(range(len(shown)), names, fontsize=SMALL)
    for row, label in enumerate(axes.get_yticklabels()):
        label.set_color(HARMFUL if row < harmful else HELPFUL)
    label_windows(axes, influence.windows, most=9)
    title = f"Above: {harmful} most harmful samples; below: {len(shown) - harmful} most helpful, {chosen}"
    note = "◆ deliberately damaged; " if damaged else ""
    axes.set_title(f"{title}\n({note}{how(influence)})", fontsize=10)
    bar = figure.colorbar(image, extend="both", aspect=40, pad=0.02)
    bar.set_label(
        "← harmful      influence / its root mean square in the window      helpful →"
        if len(shown) > 15
        else "influence / its root mean square",
        fontsize=SMALL,
    )
    bar.ax.tick_params(labelsize=SMALL)
    return figure


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
    axes.set_title(f"Do the same samples matter early and late?\n({how(influence)})", fontsize=11)
    figure.colorbar(image, label="Spearman correlation of the samples' influence").ax.tick_params(labelsize=SMALL)
    return figure
