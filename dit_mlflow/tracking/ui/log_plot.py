"""Figures as artifacts."""

from __future__ import annotations

import warnings

import mlflow
from matplotlib.figure import Figure


def log_plot(figure: Figure, path: str) -> None:
    """Log a figure on the active run. Characters of data that the font lacks are boxes in it, and no warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        mlflow.log_figure(figure, path)
