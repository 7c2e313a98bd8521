"""Numbers as sentences and tables show them."""

from __future__ import annotations

from dit_mlflow.evaluation.figures import SHARE, Figure
from dit_mlflow.told import text_of

VALUE_CHARACTERS = 200
"""Most characters of a value of a table row."""

IN_FULL = 1e9
"""From this size on, numbers have an exponent."""


def figure(value: float, digits: int = 2) -> str:
    """``value`` with ``digits`` significant digits, at least all before the point; never ``-0``.

    ``0.123`` is 0.12, ``134.2`` is 134 and not 1.3e+02; below 0.0001 and from :data:`IN_FULL` on with an exponent.
    """
    text = f"{value + 0.0:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < IN_FULL else text


def value_text(value: object) -> str:
    """A value of a table row: a float with three significant digits, any other as it is, see :func:`text_of`."""
    return figure(value, 3) if isinstance(value, float) else text_of(value, VALUE_CHARACTERS)


def decimals(value: float, places: int = 2) -> str:
    """``value`` with ``places`` decimals; never ``-0.00``."""
    return f"{round(value, places) + 0.0:.{places}f}"


def cell(of: Figure, value: float) -> str:
    """The value of a figure in a note's table: a share in percent, any other with two decimals."""
    return f"{100 * value:.0f} %" if of.unit == SHARE else decimals(value)


def share(value: float) -> str:
    """``0.1`` is ``10 %``."""
    return f"{figure(100 * value)} %"


def span(low: float, high: float) -> str:
    """``0.10 to 0.20``, or one number if both read the same."""
    first, last = decimals(low), decimals(high)
    return first if first == last else f"{first} to {last}"
