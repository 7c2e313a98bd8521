"""Influence of single samples, window by window, with pictures or texts of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure, SubFigure

from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.ranking import extreme_samples
from dit_mlflow.influence import Influence
from dit_mlflow.plots.canvas import (
    HARMFUL,
    HELPFUL,
    MARKERS,
    NEUTRAL,
    SMALL,
    WIDTH,
    axes_in_inches,
    how,
    label_windows,
    literal,
    new_figure,
    query_words,
)
from dit_mlflow.plots.pictures import CHARACTER, draw_image, excerpt, is_image, write_lines

HEIGHT, SIDE = 5.6, 2.75
"""Inches: height of the figure, and width of the column with the samples."""


def plot_top_samples(
    influence: Influence, gallery: Gallery | None = None, k: int = 4, whole: Influence | None = None
) -> Figure:
    """Influence of the ``k`` most harmful and ``k`` most helpful samples, window by window, with pictures or texts.

    Samples are chosen by their scores of the ``whole`` run, else by the mean over windows. The grey band holds 90 % of
    all samples.
    """
    gallery = gallery or Gallery()
    scores = influence.scores[:, 0, :]
    harmful, helpful = extreme_samples(influence, k, whole)
    chosen = "on average" if whole is None else "over the whole run"
    figure = new_figure(HEIGHT)
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(WIDTH - SIDE, SIDE)))
    axes = left.subplots()
    places = np.arange(len(influence.windows))
    low, high = np.nanquantile(scores, (0.05, 0.95), axis=1)
    band = {"color": NEUTRAL, "alpha": 0.25, "lw": 0, "label": "90 % of all samples"}
    axes.fill_between(places, low, high, step="mid" if len(places) == 1 else None, **band)
    axes.axhline(0, color="black", lw=0.8)
    for samples, colour in ((helpful, HELPFUL), (harmful, HARMFUL)):
        for marker, sample in zip(MARKERS, samples, strict=False):
            style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.4}
            axes.plot(places, scores[:, sample], label=f"{influence.samples[sample]}", **style)
    label_windows(axes, influence.windows, most=9)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    query = query_words(influence.queries[0])
    axes.set_ylabel(f"influence = change of {query}\nif the sample is removed")
    axes.set_title(
        f"Which training samples matter, and when?\n(the largest {chosen}; {how(influence)})",
        fontsize=11,
    )
    axes.legend(handles=axes.collections[:1], loc="best", fontsize=SMALL, frameon=False)
    _beside(right, influence, gallery, (helpful, harmful), k, chosen)
    return figure


def _beside(
    part: SubFigure, influence: Influence, gallery: Gallery, found: Sequence[list[int]], k: int, chosen: str
) -> None:
    """Two blocks of samples, ``found``: above those that help, below those that harm."""
    sides = ((found[0], HELPFUL, "↑ helpful", "raises"), (found[1], HARMFUL, "↓ harmful", "lowers"))
    query = query_words(influence.queries[0])
    quantity = "the loss" if query.endswith("loss") else "it"
    row = HEIGHT / (2 * k + 1.2)
    for block, (samples, colour, name, does) in enumerate(sides):
        top = HEIGHT - block * HEIGHT / 2 - 0.08
        axes = axes_in_inches(part, 0, top - row / 2, SIDE, row / 2)
        heading = f"{name}: removal {does} {quantity}" if samples else f"{name}: none {chosen}"
        write_lines(axes, 0.02, row / 2, heading, color=colour, fontweight="bold")
        for place, sample in enumerate(samples):
            index = int(influence.samples[sample])
            bottom = top - row * (place + 1.4)
            _entry(part, bottom, row, (colour, MARKERS[place % len(MARKERS)]), index, gallery)


def _entry(part: SubFigure, bottom: float, height: float, style: tuple[str, str], index: int, gallery: Gallery) -> None:
    """A sample: the line's marker, its picture or the beginning of its text, its index and description."""
    colour, marker = style
    axes = axes_in_inches(part, 0, bottom, SIDE, height)
    axes.plot([0.05, 0.35], [height / 2] * 2, color=colour, lw=1.4)
    axes.plot([0.2], [height / 2], color=colour, marker=marker, ms=5)
    appearance = gallery.appearance(index)
    start = 0.45
    if is_image(appearance):
        size = height * 0.86
        draw_image(axes_in_inches(part, start, bottom + (height - size) / 2, size, size), appearance, colour)
        start += size + 0.08
    columns = int((SIDE - start) / CHARACTER)
    text = excerpt(appearance, columns, 2)
    line = literal(gallery.line(index), 90)
    if text:
        about = [text, *textwrap.wrap(f"{index}: {line}".removesuffix(": "), columns, max_lines=1, placeholder=" …")]
    else:
        about = [f"sample {index}", *textwrap.wrap(line, columns, max_lines=2, placeholder=" …")]
    write_lines(axes, start, height / 2, "\n".join(about), va="center")
