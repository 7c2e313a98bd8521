"""What a page shows of the samples themselves, within a size that is set beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.markdown import LINE_CHARACTERS, encodable
from dit_mlflow.explanation.numbers import figure
from dit_mlflow.page.thumbnails import thumbnail
from dit_mlflow.plots.pictures import is_image

PICTURES = 600
"""Samples whose picture is looked at, at most."""

PICTURE_CHARACTERS = 1_600_000
"""Of all pictures together."""

TEXT_CHARACTERS = 1_500_000
"""Of all texts, or of all rows of a table, together."""

LONGEST_TEXT = 20_000
"""Characters of one text."""

EXCERPT = 120
"""Characters that are kept of a text when there is no room for all of every text."""

LINES = 600_000
"""Characters of all labels together, and of all descriptions."""


@dataclass
class PageSamples:
    """Pictures, texts and table rows of samples, by their position in the result.

    Attributes:
        pictures: ``data:`` URIs.
        texts: whole texts, or their beginnings.
        cut: the positions of texts that go on.
        names: columns of the rows.
        rows: values as text, in the order of ``names``; rows may end before the last names.
    """

    pictures: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    rows: dict[int, list[str | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, gallery: Gallery, indices: np.ndarray, order: Iterable[int]) -> PageSamples:
        """Those of the samples ``indices[order]``, the first first, as far as there is room.

        Pictures of the first :data:`PICTURES` that fit; a text or a row of every sample that fits, where texts are cut
        to :data:`EXCERPT` characters once the later ones would have no room.
        """
        found = cls()
        pictures, texts = PICTURE_CHARACTERS, TEXT_CHARACTERS
        for rank, position in enumerate(order):
            if pictures <= 0 or texts <= 0 or (rank >= PICTURES and found.pictures):
                break
            shown = gallery.appearance(int(indices[position]))
            if is_image(shown):
                uri = thumbnail(shown)
                pictures -= len(uri)
                found.pictures[position] = uri
            elif isinstance(shown, str):
                room = texts - EXCERPT * (len(indices) - rank)
                texts -= found._add_text(position, shown, max(EXCERPT, min(LONGEST_TEXT, room)))
            elif isinstance(shown, Mapping):
                texts -= found._add_row(position, shown)
        return found

    def _add_text(self, position: int, text: str, longest: int) -> int:
        if len(text) > longest:
            self.cut.append(position)
        self.texts[position] = encodable(text, longest)
        return len(self.texts[position])

    def _add_row(self, position: int, row: Mapping[str, Any]) -> int:
        named = {encodable(str(name), LINE_CHARACTERS): _value(row[name]) for name in row}
        values = {self.names.setdefault(name, len(self.names)): value for name, value in named.items()}
        self.rows[position] = [values.get(place) for place in range(len(self.names))]
        return sum(len(value) + 3 for value in values.values())


def sample_lines(tell: Callable[[int], str | None] | None, indices: np.ndarray) -> list[str | None]:
    """What ``tell`` says of every sample, each cut so that all have room."""
    longest = min(200, max(40, LINES // max(1, len(indices))))
    told = [None if tell is None else tell(int(index)) for index in indices]
    return [None if line is None else encodable(line, longest) for line in told]


def _value(value: Any) -> str:
    return encodable(figure(value, 3) if isinstance(value, float) else str(value), LINE_CHARACTERS)
