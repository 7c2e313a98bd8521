"""What all plots share: colours, sizes, and how windows, queries and text from data are written."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure

from dit_mlflow.explanation.markdown import one_line
from dit_mlflow.influence import Influence, Window

HELPFUL, HARMFUL, NEUTRAL, MARKED = "#0072B2", "#D55E00", "#8C8C8C", "#E69F00"
"""Okabe and Ito's colours, distinct under every common colour blindness."""

PALETTE = (HELPFUL, HARMFUL, "#009E73", MARKED, "#CC79A7", "#56B4E9", "black")
MARKERS = "osD^v<>P"
"""Colours and markers of several curves, in order."""

DIVERGING = LinearSegmentedColormap.from_list("influence", [HARMFUL, "#F7F7F7", HELPFUL]).with_extremes(bad="#D0D0D0")
"""Harmful, nothing, helpful; to be centred on 0."""

WIDTH, DPI = 8.0, 150
"""Inches and dots per inch of every plot. MLflow's UI shows it 580 to 900 pixels wide, so a point is about a pixel."""

NOTEBOOK_DPI = 100
"""Notebooks show each dot as a pixel."""

SMALL = 9
"""Size of the smallest text, in points."""

TICKS = 12
"""Most windows that an axis names; of more, every n-th."""


class ShownFigure(Figure):
    """A figure that notebooks show as it is; others are shown where pyplot has been imported."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png", dpi=NOTEBOOK_DPI)
        return picture.getvalue()


def new_figure(height: float, dpi: int = DPI) -> Figure:
    """An empty figure of the common width, ``height`` inches high."""
    return ShownFigure(figsize=(WIDTH, height), dpi=dpi, layout="constrained")


def axes_in_inches(part: Figure | SubFigure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes without a frame, whose units are inches, with the lower left corner at ``x, y`` inches in ``part``."""
    across, up = part.bbox.width / part.dpi, part.bbox.height / part.dpi
    axes = part.add_axes((x / across, y / up, width / across, height / up))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    # Not axis("off"): a picture that is drawn here has a frame.
    axes.spines[:].set_color("none")
    axes.patch.set_alpha(0)
    return axes


def label_windows(axes: Axes, windows: Sequence[Window], most: int = TICKS) -> None:
    """Name the windows at ``0, 1, …`` on the x-axis; the names are rotated if they would touch."""
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
    """The query's name in words: ``mean validation loss``."""
    return literal(query.replace("_", " "), 40)


def how(influence: Influence) -> str:
    """The method, whose name may be that of a file, and the kind."""
    return f"{literal(influence.method, 40)}, {influence.kind}"


def literal(text: str, longest: int) -> str:
    """``text`` from data on one line, shortened, and escaped so that Matplotlib does not read it as mathematics."""
    return one_line(text, longest).replace("$", r"\$")
