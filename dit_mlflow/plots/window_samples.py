"""The samples that mattered most in one window, with their pictures."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.figure import Figure

from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.ranking import extremes
from dit_mlflow.influence import Influence
from dit_mlflow.plots.canvas import HARMFUL, HELPFUL, NEUTRAL, WIDTH, axes_in_inches, literal, new_figure, query_words
from dit_mlflow.plots.pictures import CHARACTER, draw_image, excerpt, is_image, write_lines

SAMPLES_PER_SIDE = 6
"""Samples on each side."""

ROW, HEAD = 0.74, 0.8
"""Inches: height of a sample, and of the title with the headings."""


def plot_window_samples(
    influence: Influence,
    position: int,
    gallery: Gallery | None = None,
    exact: np.ndarray | None = None,
    k: int = SAMPLES_PER_SIDE,
) -> Figure:
    """The ``k`` most harmful and ``k`` most helpful samples of a window: picture, description, score and a bar for it.

    Args:
        influence: scores; the first query is shown.
        position: of the window.
        gallery: what is known of the samples.
        exact: ``[samples]``, leave-one-out in this window, written beside the scores where it is not NaN.
        k: samples on each side; fewer, if fewer scores are negative (positive).
    """
    gallery = gallery or Gallery()
    scores = np.nan_to_num(influence.of(position))
    harmful, helpful = extremes(scores, k)
    rows = max(len(harmful), len(helpful), 1)
    height = HEAD + ROW * rows + 0.1
    figure = new_figure(height)
    figure.set_layout_engine("none")
    page = axes_in_inches(figure, 0, 0, WIDTH, height)
    query = query_words(influence.queries[0])
    title = f"Steps {influence.windows[position]}: change of {query} if the sample is removed ({influence.kind})"
    page.text(WIDTH / 2, height - 0.12, title, ha="center", va="top", fontsize=11)
    largest = float(np.abs(scores).max()) or 1.0
    for left, samples, colour, heading in (
        (0.15, harmful, HARMFUL, "↓ harmful: removal lowers it"),
        (WIDTH / 2 + 0.1, helpful, HELPFUL, "↑ helpful: removal raises it"),
    ):
        page.text(
            left,
            height - 0.48,
            heading if samples else heading.split(":")[0] + ": none",
            va="top",
            color=colour,
            fontweight="bold",
        )
        for place, sample in enumerate(samples):
            known = None if exact is None or not np.isfinite(exact[sample]) else float(exact[sample])
            corner = left, height - HEAD - ROW * (place + 1)
            _entry(
                figure, corner, gallery, int(influence.samples[sample]), float(scores[sample]), known, largest, colour
            )
    return figure


def _entry(
    figure: Figure,
    corner: tuple[float, float],
    gallery: Gallery,
    index: int,
    score: float,
    exact: float | None,
    largest: float,
    colour: str,
) -> None:
    width = WIDTH / 2 - 0.25
    axes = axes_in_inches(figure, *corner, width, ROW)
    appearance = gallery.appearance(index)
    start = 0.0
    if is_image(appearance):
        size = ROW * 0.86
        draw_image(axes_in_inches(figure, corner[0], corner[1] + 0.05 * ROW, size, size), appearance, colour)
        start = size + 0.1
    columns = int((width - start) / CHARACTER)
    text = excerpt(appearance, columns, 1)
    line = literal(f"{index}: {gallery.line(index)}".removesuffix(": "), 120)
    about = textwrap.wrap(line, columns, max_lines=1 if text else 2, placeholder=" …")
    figures = signed_tick(score) if exact is None else f"{signed_tick(score)}; leave-one-out {signed_tick(exact)}"
    lines = [*([text] if text else []), *about, figures]
    write_lines(axes, start, ROW - 0.05, "\n".join(lines))
    room = width - start - 0.1
    axes.barh(0.1, room, height=0.06, left=start, color=NEUTRAL, alpha=0.3)
    axes.barh(0.1, room * abs(score) / largest, height=0.06, left=start, color=colour)


def signed_tick(value: float) -> str:
    """Three significant digits, with a sign."""
    return f"{value:+.3g}".replace("-", "−")
