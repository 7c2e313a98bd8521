"""Markdown that shows data as it is, whatever characters it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LONGEST = 200
"""Characters of a text from data, by default."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|>~])")
_ENTITIES = str.maketrans({"$": "&#36;", ":": "&#58;", "@": "&#64;"})
"""Before these, the renderer of MLflow's model registry shows the backslash."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069]+")


def escaped(text: str, longest: int = LONGEST) -> str:
    """``text`` from data, so that a Markdown renderer shows it literally: no markup, no HTML, no links, one line.

    Characters that turn the direction of what follows are taken out; longer texts end in an ellipsis.
    """
    plain = _CONTROL.sub(" ", text).strip()
    if len(plain) > longest:
        plain = plain[: longest - 1] + "…"
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Entities last: their own "#" is not to be escaped.
    return _SPECIAL.sub(r"\\\1", plain).translate(_ENTITIES)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
