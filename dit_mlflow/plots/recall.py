"""How fast damaged samples are found: recall against samples inspected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dit_mlflow.evaluation.detection import recall_curve
from dit_mlflow.evaluation.figures import RECALL_AT_K
from dit_mlflow.plots.canvas import NEUTRAL, PALETTE, SMALL, literal, new_figure

CURVES_NAMED = 2 * len(PALETTE)
"""Curves that are told apart, the second half of them dashed; of more, the others are grey."""

ALWAYS = ("dit", "leave_one_out")
"""Methods that are always named."""

FEW = 4
"""So many curves have room for their legend below the line of chance."""


def plot_recall_curves(scores: Mapping[str, np.ndarray], corrupted: Sequence[int]) -> Figure:
    """Share of the damaged samples found, against the share of all samples inspected, lowest scores first.

    Args:
        scores: ``[samples]`` by the name in the legend; those without a score for any damaged sample are left out. Of
            many, those that find most are named, and the others drawn in grey.
        corrupted: indices of the damaged samples; a line marks as many inspected samples, where recall@k is read.
    """
    figure = new_figure(5.2)
    axes = figure.subplots()
    drawn = {name: found for name, found in scores.items() if np.isfinite(found[list(corrupted)]).any()}
    share = 100 * len(corrupted) / max((len(found) for found in scores.values()), default=1)
    axes.plot([0, 100], [0, 100], color=NEUTRAL, lw=1, ls=":", label="chance")
    axes.plot([0, share, 100], [0, 100, 100], color=NEUTRAL, lw=1, ls="--", label="best possible")
    axes.axvline(share, lw=0.8, color=NEUTRAL, alpha=0.5)
    note: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": SMALL, "color": "#555555"}
    axes.annotate(
        f"{RECALL_AT_K.heading}: {len(corrupted)} samples inspected, as many as are damaged", (share, 1), **note
    )
    curves = {name: recall_curve(found, corrupted) for name, found in drawn.items()}
    named = _named(curves)
    others = [name for name in curves if name not in named]
    for name in others:
        label = f"{len(others)} others" if name == others[0] else None
        axes.plot(*(100 * part for part in curves[name]), lw=0.8, color=NEUTRAL, alpha=0.6, label=label)
    for place, name in enumerate(named):
        line: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "ls": ("-", "--")[place // len(PALETTE)]}
        axes.plot(*(100 * part for part in curves[name]), lw=1.7, label=literal(name, 60), **line)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_xlabel("training samples inspected, lowest scores first (%)")
    axes.set_ylabel("damaged samples found (%)")
    axes.set_title("How many samples must be looked at to find the damaged ones?")
    if len(drawn) > FEW:
        figure.legend(loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    else:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08), fontsize=SMALL, frameon=False)
    return figure


def _named(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """The curves that are named, in the order given."""
    most = sorted(curves, key=lambda name: (name not in ALWAYS, -np.mean(curves[name][1])))[:CURVES_NAMED]
    return [name for name in curves if name in most]
