"""What all plots share: colours, size, and how windows, queries and data are written."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dit_mlflow.explanation.markdown import one_line
from dit_mlflow.influence import Window

HELPFUL, HARMFUL, NEUTRAL, MARKED = "#0072B2", "#D55E00", "#8C8C8C", "#E69F00"
"""Okabe and Ito's colours, distinct under every common colour blindness."""

DIVERGING = LinearSegmentedColormap.from_list("influence", [HARMFUL, "#F7F7F7", HELPFUL]).with_extremes(bad="#D0D0D0")
"""Harmful, nothing, helpful; to be centred on 0."""

WIDTH, DPI = 8.0, 150
"""Inches and dots per inch of every plot. MLflow's UI shows it 580 to 900 pixels wide: a point is a pixel there."""

SMALL = 9
"""Points of the smallest text."""

TICKS = 12
"""Windows that an axis names at most; of more, every n-th."""


def new_figure(height: float, dpi: int = DPI) -> Figure:
    """An empty figure of the common width, ``height`` inches high."""
    return Figure(figsize=(WIDTH, height), dpi=dpi, layout="constrained")


def label_windows(axes: Axes, windows: Sequence[Window], most: int = TICKS) -> None:
    """Name the windows at ``0, 1, …`` along the x-axis, aslant where they would touch."""
    places = range(0, len(windows), -(-len(windows) // most))
    names = [str(windows[place]) for place in places]
    crowded = sum(map(len, names)) > 4 * most
    axes.set_xticks(
        list(places), names, fontsize=SMALL, rotation=40 if crowded else 0, ha="right" if crowded else "center"
    )
    if crowded:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
    axes.set_xlabel("window (training steps)")


def query_words(query: str) -> str:
    """``mean_validation_loss`` as people write it."""
    return literal(query.replace("_", " "), 40)


def literal(text: str, longest: int) -> str:
    """``text`` from data on one line, shortened, and not read as mathematics by Matplotlib."""
    return one_line(text, longest).replace("$", r"\$")
