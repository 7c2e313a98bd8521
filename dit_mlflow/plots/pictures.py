"""Pictures and texts of samples in plots."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TypeGuard

import numpy as np
from matplotlib.axes import Axes

from dit_mlflow.explanation.numbers import value_text
from dit_mlflow.plots.canvas import SMALL, literal
from dit_mlflow.told import text_of
from dit_mlflow.workload.appearance import Appearance

PIXELS = 128
"""Most pixels on a picture's longer side; of more, every n-th is shown."""

CHARACTER = 0.074
"""Inches that a small character takes, a little more than the average."""


def is_image(appearance: Appearance | None) -> TypeGuard[np.ndarray]:
    """Whether it is drawn as a picture rather than written as text."""
    return (
        isinstance(appearance, np.ndarray)
        and appearance.size > 0
        and appearance.dtype.kind in "buif"
        and (appearance.ndim == 2 or (appearance.ndim == 3 and appearance.shape[2] in (3, 4)))
    )


def draw_image(axes: Axes, image: np.ndarray, colour: str) -> None:
    """Fill ``axes`` with a picture in a frame of ``colour``."""
    every = -(-max(image.shape[:2]) // PIXELS)
    shown = image[::every, ::every]
    if shown.dtype.kind == "f":
        shown = np.nan_to_num(shown).clip(0, 1)
    highest = 1 if shown.dtype.kind in "bf" else 255
    axes.imshow(shown, cmap="gray", vmin=0, vmax=highest, interpolation="nearest")
    height, width = shown.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.2)


def excerpt(appearance: Appearance | None, columns: int, lines: int) -> str:
    """The beginning of a text, or of a row's values, in ``lines`` lines of ``columns`` characters; empty for images."""
    if isinstance(appearance, Mapping):
        text = ", ".join(f"{text_of(name, 100)}={value_text(value)}" for name, value in list(appearance.items())[:40])
    elif isinstance(appearance, str):
        text = f"“{appearance[: 2 * columns * lines]}”"
    else:
        return ""
    plain = literal(text, 2 * columns * lines)
    wrapped = textwrap.wrap(plain, columns, max_lines=lines, placeholder=" …", break_on_hyphens=False)
    return "\n".join(wrapped)


def write_lines(axes: Axes, x: float, y: float, lines: str, **style: object) -> None:
    """Small text in the axes' own units, its upper left corner at ``x, y``."""
    axes.text(x, y, lines, **{"va": "top", "ha": "left", "fontsize": SMALL, "linespacing": 1.15, **style})  # type: ignore[arg-type]
