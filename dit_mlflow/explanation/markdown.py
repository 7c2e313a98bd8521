"""Markdown that shows text from data literally, whatever characters it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dit_mlflow.told import EXAMINED, encodable, text_of

LINE_CHARACTERS = 200
"""Most characters of a text from data, by default."""

NOTE_CHARACTERS = 7500
"""Most characters of a note: MLflow cuts tags at 8,000 without a warning."""

GAP = "&emsp;"
"""Space between columns; the tables of MLflow's UI have none."""

_SPECIAL = re.compile(
    r"[\\`*{}\[\]|~]"
    r"|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])"  # Within a word, it is no emphasis.
    r"|(?<=[A-Za-z])\.(?=\w)"  # Of an address, which would become a link; not of 0.5, nor at a sentence's end.
    r"|^[#+\-=!]"
)
_NUMBERED = re.compile(r"^([0-9]+)([.)])(?=\s|$)")
"""The start of an item of a list."""
_REFERENCE = re.compile(r"[&<>$@]|:(?!\s|$)")
_REFERENCES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", ":": "&#58;", "@": "&#64;"}
"""For marks that MLflow's UI, or HTML, would show with the backslash that escapes them."""

_TURNS = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"

_CONTROL = re.compile(rf"[\x00-\x1f\x7f-\x9f{_TURNS}]+")


def one_line(text: str, longest: int | None = None) -> str:
    """``text`` from data without control characters, line breaks and changes of direction; if cut, with an ellipsis."""
    return encodable(" ".join(_CONTROL.sub(" ", text).split()), longest)


def escaped(text: str, longest: int = LINE_CHARACTERS) -> str:
    """``text`` from data, so that a Markdown renderer shows it literally: no markup, no HTML, no links, one line.

    Characters that change the direction of text are removed; longer texts are cut, with an ellipsis.
    """
    plain = _NUMBERED.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", one_line(text_of(text, EXAMINED), longest)))
    return _REFERENCE.sub(lambda found: _REFERENCES[found[0]], plain)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], gap: str = "") -> str:
    """A table of cells that are Markdown already; ``gap`` (:data:`GAP`) follows every cell but a row's last."""
    lines = [f"{gap} | ".join(cells) for cells in (headings, *rows)]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join(["---"] * len(headings)), *lines[1:]))
