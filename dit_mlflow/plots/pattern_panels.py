"""How many samples are early, late, stable or fluctuating, and what such samples look like."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_mlflow.evaluation.patterns import PATTERNS, standardised_scores
from dit_mlflow.influence import Influence
from dit_mlflow.plots.canvas import NEUTRAL, SMALL, label_windows, new_figure

PATTERN_COLOURS = dict(zip(PATTERNS, ("#56B4E9", "#CC79A7", "#009E73", "#E69F00"), strict=True))

PATTERN_TITLES = {
    "early": "matter in the first half of training",
    "late": "matter in the second half",
    "stable": "keep their sign, spread over training",
    "fluctuating": "change their sign",
}


def plot_patterns(influence: Influence, names: np.ndarray) -> Figure:
    """One panel for each pattern: the mean curve of its samples, the range of 80 % of them, and the largest sample.

    A curve is the share of a sample's influence in each window, in percent of the sum of its absolute values over
    windows, each window standardised (see :func:`dit_mlflow.evaluation.patterns`). Curves with a negative sum change
    their sign, so that for harmful and helpful samples alike, values below 0 oppose the sample's overall effect.

    Args:
        influence: scores over two windows or more; the first query is shown.
        names: ``[samples]``, from :func:`dit_mlflow.evaluation.patterns`.
    """
    scores = standardised_scores(influence)
    total = np.abs(scores).sum(axis=0)
    turned = scores * np.where(scores.sum(axis=0) < 0, -1, 1)
    shares = 100 * np.divide(turned, total, out=np.zeros_like(turned), where=total > 0)
    figure = new_figure(5.8)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axes, pattern in zip(panels, PATTERNS, strict=True):
        chosen = np.flatnonzero(names == pattern)
        share = 100 * len(chosen) / max(len(names), 1)
        axes.set_title(
            f"{pattern}: {len(chosen)} of {len(names)} samples ({share:.0f} %)\n{PATTERN_TITLES[pattern]}", fontsize=10
        )
        axes.axhline(0, color="black", lw=0.8)
        if len(chosen):
            largest = chosen[np.argmax(total[chosen])]
            _curves(
                axes, shares[:, chosen], shares[:, largest], PATTERN_COLOURS[pattern], int(influence.samples[largest])
            )
        else:
            axes.text(0.5, 0.6, "no such sample", transform=axes.transAxes, ha="center", color=NEUTRAL)
    for axes in panels[2:]:
        label_windows(axes, influence.windows, most=6)
    figure.supylabel("share of the sample's influence in the window (%)", fontsize=10)
    figure.suptitle("How does the influence of a sample run over training?", fontsize=11)
    return figure


def _curves(axes: Axes, shares: np.ndarray, largest: np.ndarray, colour: str, index: int) -> None:
    places = np.arange(len(shares))
    low, high = np.quantile(shares, (0.1, 0.9), axis=1)
    axes.fill_between(places, low, high, color=colour, alpha=0.3, lw=0, label="80 % of them")
    axes.plot(places, shares.mean(axis=1), color=colour, lw=2.5, label="mean")
    axes.plot(places, largest, color="black", lw=1.2, ls="--", label=f"the largest: sample {index}")
    axes.legend(fontsize=SMALL, frameon=False, loc="best", handlelength=1.6, labelspacing=0.2)
    axes.tick_params(labelsize=SMALL)
