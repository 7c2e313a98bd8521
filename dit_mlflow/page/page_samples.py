"""Pictures, texts and table rows of samples on a page, within limits of size."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.markdown import LINE_CHARACTERS, encodable
from dit_mlflow.explanation.numbers import value_text
from dit_mlflow.plots.pictures import is_image
from dit_mlflow.told import text_of
from dit_mlflow.workload.appearance import LONGEST_ROW, shrunk

PICTURES = 600
"""Most samples that are shown with a picture."""

PICTURE_CHARACTERS = 1_600_000
"""Most characters of all pictures together."""

TEXT_CHARACTERS = 1_500_000
"""Most characters of all texts, or of all table rows, together."""

LONGEST_TEXT = 20_000
"""Most characters of one text."""

EXCERPT = 120
"""Characters to which a text is cut if there is not enough room for all texts."""

LONGEST_SIDE = 128
"""Pixels; larger images are made smaller."""

JPEG_FROM = 6000
"""A PNG of more bytes than this (a photograph, not a drawing) is tried as JPEG too."""

LINES = 600_000
"""Most characters of all labels together, and of all descriptions together."""


@dataclass
class PageSamples:
    """Pictures, texts and table rows of samples, by their position in the result.

    Attributes:
        pictures: ``data:`` URIs.
        texts: whole texts, or their beginnings.
        cut: the positions of texts that were cut.
        names: columns of the rows.
        rows: values as text, by the position of their names in ``names``; at most :data:`LONGEST_ROW`.
    """

    pictures: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    rows: dict[int, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, gallery: Gallery, indices: np.ndarray, order: Iterable[int]) -> PageSamples:
        """Pictures, texts or rows of the samples ``indices[order]``, in this order, as long as there is room.

        Pictures of the first :data:`PICTURES` samples at most; texts are cut, to :data:`EXCERPT` characters at the
        least, so that later ones have room.
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
        names, before = list(islice(row, LONGEST_ROW)), len(self.names)
        named = {
            encodable(text_of(name), LINE_CHARACTERS): encodable(value_text(row[name]), LINE_CHARACTERS)
            for name in names
        }
        self.rows[position] = {self.names.setdefault(name, len(self.names)): value for name, value in named.items()}
        added = islice(self.names, before, None)
        return sum(len(value) + 10 for value in named.values()) + sum(len(name) + 3 for name in added)


def sample_lines(tell: Callable[[int], str | None] | None, indices: np.ndarray) -> list[str | None]:
    """What ``tell`` returns for every sample, each cut so that all have room."""
    longest = min(200, max(40, LINES // max(1, len(indices))))
    told = [None if tell is None else tell(int(index)) for index in indices]
    return [None if line is None else encodable(line, longest) for line in told]


def thumbnail(image: np.ndarray) -> str:
    """A ``data:`` URI of ``image``, at most :data:`LONGEST_SIDE` pixels on a side.

    Args:
        image: ``[H, W]`` (grey), ``[H, W, 3]`` or, with opacity, ``[H, W, 4]``; whole numbers up to 255, booleans, or
            floats in [0, 1]; what is outside is cut off.
    """
    image = shrunk(image)
    if image.dtype.kind in "bf":
        image = np.round(255 * np.nan_to_num(image.astype(np.float64)).clip(0, 1))
    image = image.clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    encoded, kind = _encoded(picture, "PNG"), "png"
    if len(encoded) > JPEG_FROM and picture.mode != "RGBA":
        smaller = _encoded(picture, "JPEG", quality=82)
        encoded, kind = min((encoded, kind), (smaller, "jpeg"), key=lambda found: len(found[0]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _encoded(picture: Image.Image, form: str, **options: int) -> bytes:
    into = BytesIO()
    picture.save(into, form, optimize=True, **options)
    return into.getvalue()
