"""The estimate against exact leave-one-out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dit_mlflow.evaluation import correlations
from dit_mlflow.evaluation.figures import PEARSON, SPEARMAN
from dit_mlflow.influence import Influence, Window
from dit_mlflow.plots.canvas import HARMFUL, HELPFUL, SMALL, literal, new_figure, query_words

MAX_PANELS = 9
"""Most panels in one figure; of more windows, so many are shown, evenly spread."""


def plot_against_truth(
    estimate: Influence, truth: Influence, positions: Sequence[int], corrupted: Sequence[int] = ()
) -> Figure:
    """The estimate against exact leave-one-out: one panel for each window in ``positions``.

    A point is a sample; on the dashed line both agree. Corrupted samples are marked.
    """
    count = len(positions)
    if count > MAX_PANELS:
        spread = np.linspace(0, count - 1, MAX_PANELS).round().astype(int)
        positions = [positions[i] for i in spread]
    columns = min(3, len(positions))
    rows = math.ceil(len(positions) / columns)
    height = 5.6 if columns == 1 else {2: 4.2, 3: 2.6 * rows + 0.9}[columns]
    figure = new_figure(height)
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    whole = Window(0, max(window.end for window in estimate.windows))
    marked = np.isin(estimate.samples, np.asarray(corrupted, dtype=np.int64))
    for axes, position in zip(panels, positions, strict=False):
        _scatter(axes, estimate.of(position), truth.of(position), marked)
        window = estimate.windows[position]
        axes.set_title(f"{'all steps' if count > 1 and window == whole else 'steps'} {window}", fontsize=10)
    for axes in panels[len(positions) :]:
        axes.remove()
    figure.supxlabel("exact influence (leave-one-out retraining)", fontsize=10)
    figure.supylabel(f"estimated influence ({literal(estimate.method, 40)})", fontsize=10)
    title = f"Change of {query_words(estimate.queries[0])} if a sample is removed ({estimate.kind})"
    if count > len(positions):
        title += f"; {len(positions)} of {count} windows"
    figure.suptitle(
        f"{title}\nρ: {SPEARMAN.heading} correlation, r: {PEARSON.heading} correlation; on the dashed line both agree",
        fontsize=10,
    )
    if marked.any():
        panels[0].legend(loc="lower right", fontsize=SMALL, frameon=False, handletextpad=0.1, borderpad=0.1)
    return figure


def _scatter(axes: Axes, estimate: np.ndarray, truth: np.ndarray, marked: np.ndarray) -> None:
    sides = ((~marked, HELPFUL, "o", None), (marked, HARMFUL, "D", "damaged"))
    for chosen, colour, marker, label in sides:
        if chosen.any():
            style: dict[str, Any] = {"s": 14, "color": colour, "marker": marker, "alpha": 0.7, "lw": 0, "label": label}
            axes.scatter(truth[chosen], estimate[chosen], **style)
    values = correlations(estimate, truth).values
    told = f"ρ = {values[SPEARMAN.leaf]:.3f}\nr = {values[PEARSON.leaf]:.3f}" if values else "all equal"
    axes.text(0.03, 0.97, told, transform=axes.transAxes, va="top", fontsize=SMALL)
    limits = np.nanmin([truth, estimate]), np.nanmax([truth, estimate])
    axes.plot(limits, limits, color="black", lw=0.8, ls="--")
    axes.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.get_offset_text().set_fontsize(SMALL)
    axes.tick_params(labelsize=SMALL)
