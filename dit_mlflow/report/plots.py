"""Figures of influence over windows and against ground truth, as they appear on a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_mlflow.evaluation import correlations
from dit_mlflow.influence import Influence

HELPFUL, HARMFUL, NEUTRAL, MARKED = "#0072B2", "#D55E00", "#8C8C8C", "#E69F00"
"""Okabe and Ito's colours, distinct under every common colour blindness."""

MAX_PANELS = 12
"""Scatter panels in one figure; of more windows, as many are shown evenly spread."""


def plot_top_samples(influence: Influence, k: int = 4, describe: Callable[[int], str] | None = None) -> Figure:
    """Influence of the ``k`` most harmful and ``k`` most helpful samples, window by window.

    Samples are chosen by their mean over the windows, for the first query; other samples are drawn in grey as the range
    that holds 90 % of them.
    """
    scores = influence.scores[:, 0, :]
    harmful, helpful = _extreme_samples(scores, k)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(influence.windows))
    low, high = np.nanquantile(scores, (0.05, 0.95), axis=1)
    axes.fill_between(places, low, high, color=NEUTRAL, alpha=0.25, lw=0, label="90 % of all samples")
    axes.axhline(0, color="black", lw=0.8)
    for samples, colour in ((helpful, HELPFUL), (harmful, HARMFUL)):
        for marker, sample in zip("osD^v<>P"[:k], samples, strict=False):
            label = f"{influence.samples[sample]}" + _described(describe, int(influence.samples[sample]))
            axes.plot(places, scores[:, sample], color=colour, marker=marker, ms=5, lw=1.3, label=label)
    axes.set_xticks(places, [str(window) for window in influence.windows])
    if len(places) > 8:
        axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel("window (training steps)")
    axes.set_ylabel(f"influence: change of {influence.queries[0]}\nif the sample is removed")
    axes.set_title(f"Samples that helped and harmed most on average ({influence.kind} influence)")
    _note_sign(axes)
    figure.legend(loc="outside right upper", fontsize=8, title="training sample", frameon=False)
    return figure


def plot_against_truth(
    estimate: Influence, truth: Influence, positions: Sequence[int], corrupted: Sequence[int] = ()
) -> Figure:
    """The estimate against exact leave-one-out: one panel for each window in ``positions``.

    A point is a sample; on the dashed line both agree. Corrupted samples are marked.
    """
    if len(positions) > MAX_PANELS:
        spread = np.linspace(0, len(positions) - 1, MAX_PANELS).round().astype(int)
        positions = [positions[i] for i in spread]
    columns = min(3, len(positions))
    rows = math.ceil(len(positions) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 3.3 * rows + 0.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    marked = np.isin(estimate.samples, np.asarray(corrupted, dtype=np.int64))
    for axes, position in zip(panels, positions, strict=False):
        _scatter(axes, estimate.of(position), truth.of(position), marked)
        values = correlations(estimate.of(position), truth.of(position)).values
        figures = f"Spearman {values['spearman']:.3f}, Pearson {values['pearson']:.3f}" if values else "constant"
        axes.set_title(f"steps {estimate.windows[position]}\n{figures}", fontsize=9)
    for axes in panels[len(positions) :]:
        axes.remove()
    figure.supxlabel("exact influence (leave-one-out retraining)", fontsize=10)
    figure.supylabel(f"estimated influence ({estimate.method})", fontsize=10)
    figure.suptitle(f"Change of {estimate.queries[0]} if a sample is removed ({estimate.kind})", fontsize=11)
    return figure


def _scatter(axes: Axes, estimate: np.ndarray, truth: np.ndarray, marked: np.ndarray) -> None:
    for chosen, colour, label in ((~marked, HELPFUL, None), (marked, HARMFUL, "corrupted")):
        if chosen.any():
            axes.scatter(truth[chosen], estimate[chosen], s=12, color=colour, alpha=0.7, lw=0, label=label)
    limits = np.nanmin([truth, estimate]), np.nanmax([truth, estimate])
    axes.plot(limits, limits, color="black", lw=0.8, ls="--")
    axes.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    axes.tick_params(labelsize=8)
    if marked.any():
        axes.legend(fontsize=8, frameon=False, loc="upper left", handletextpad=0.1)


def _extreme_samples(scores: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    mean = scores.mean(axis=0)
    harmful = [int(i) for i in np.argsort(mean, kind="stable")[:k] if mean[i] < 0]
    helpful = [int(i) for i in np.argsort(-mean, kind="stable")[:k] if mean[i] > 0]
    return harmful, helpful


def _described(describe: Callable[[int], str] | None, sample: int) -> str:
    if describe is None:
        return ""
    text = describe(sample)
    shortened = text if len(text) <= 40 else text[:39] + "…"
    # Matplotlib reads text between two dollar signs as mathematics.
    return ": " + shortened.replace("$", r"\$")


def _note_sign(axes: Axes) -> None:
    style: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 8, "ha": "left"}
    axes.text(0.01, 0.98, "↑ helpful: removal raises the loss", va="top", color=HELPFUL, **style)
    axes.text(0.01, 0.02, "↓ harmful: removal lowers the loss", va="bottom", color=HARMFUL, **style)
