"""Pictures, texts and table rows of samples on a page, within limits of size."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, features

from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.markdown import LINE_CHARACTERS
from dit_mlflow.explanation.numbers import value_text
from dit_mlflow.page.embedding import embedded_bytes, within
from dit_mlflow.plots.pictures import is_image
from dit_mlflow.told import encodable, text_of
from dit_mlflow.workload.appearance import LONGEST_ROW, shrunk

PICTURED = 2500
"""Most samples on a page where samples are images: each has its picture."""

LOOKS_BYTES = 1_100_000
"""Bytes of all pictures, texts and table rows together."""

LONGEST_TEXT = 20_000
"""Bytes of one text."""

EXCERPT = 120
"""Bytes that every text has, where there is not enough room for all."""

SIDES = (128, 64, 40, 28, 20, 12)
"""Pixels: the longest side of a picture, the largest first that has room."""

SMALL_PICTURE = 425
"""Bytes that every picture has."""

LINE_BYTES = 600_000
"""Bytes of all descriptions together."""

LABEL_BYTES = 200_000
"""Bytes of all labels together, each counted once."""

LEAST_PER_PIXEL = 0.25
"""Characters below which no picture with something on it goes: larger sides are not tried."""

WEBP_FROM = 8000
"""A PNG of more characters than this (a photograph, not a drawing), or than have room, is tried as WebP too."""

SHOWN_OF_LINE = 200
"""Characters of a label or a description."""


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
    def of(cls, gallery: Gallery, indices: np.ndarray) -> PageSamples:
        """Of the samples ``indices``, the most important first: later ones are smaller, so that all have room.

        What cannot be shown even so, such as a row of very many words, ends it.
        """
        found, room = cls(), LOOKS_BYTES
        for position, index in enumerate(indices.tolist()):
            later = len(indices) - position - 1
            shown = gallery.appearance(index)
            if is_image(shown):
                taken = found._add_picture(position, shown, room - SMALL_PICTURE * later)
            elif isinstance(shown, str):
                least = min(EXCERPT, LOOKS_BYTES // len(indices) - 12)
                taken = found._add_text(position, shown, max(least, min(LONGEST_TEXT, room - (least + 12) * later)))
            elif isinstance(shown, Mapping):
                taken = found._add_row(position, shown, room)
            else:
                continue
            room -= taken
            if room <= 0:
                break
        return found

    def at(self, places: np.ndarray) -> PageSamples:
        """The same, with positions that are ``places`` of what they were."""

        def moved(found: Mapping[int, Any]) -> dict[int, Any]:
            return {int(places[position]): value for position, value in found.items()}

        cut = [int(places[position]) for position in self.cut]
        return PageSamples(moved(self.pictures), moved(self.texts), cut, self.names, moved(self.rows))

    def _add_picture(self, position: int, image: np.ndarray, most: int) -> int:
        self.pictures[position] = thumbnail(image, max(SMALL_PICTURE, most))
        return len(self.pictures[position]) + 12

    def _add_text(self, position: int, text: str, most: int) -> int:
        self.texts[position] = within(text, most)
        if self.texts[position] != encodable(text):
            self.cut.append(position)
        return embedded_bytes(self.texts[position]) + 10

    def _add_row(self, position: int, row: Mapping[str, Any], room: int) -> int:
        named = {
            encodable(text_of(name), LINE_CHARACTERS): encodable(value_text(row[name]), LINE_CHARACTERS)
            for name in islice(row, LONGEST_ROW)
        }
        new = [name for name in named if name not in self.names]
        places = {name: len(self.names) + place for place, name in enumerate(new)}
        values = {self.names.get(name, places.get(name, 0)): value for name, value in named.items()}
        taken = embedded_bytes({position: values}) + embedded_bytes(new)
        if taken <= room:
            self.names.update(places)
            self.rows[position] = values
        return taken


def are_images(gallery: Gallery, indices: np.ndarray) -> bool:
    """Whether one of the first few samples is an image."""
    return any(is_image(gallery.appearance(index)) for index in indices[:8].tolist())


def sample_lines(tell: Callable[[int], str | None] | None, indices: np.ndarray) -> list[str | None]:
    """What ``tell`` returns for every sample, cut so that all have room."""
    most = LINE_BYTES // max(1, len(indices)) - 3
    told = [None if tell is None else tell(index) for index in indices.tolist()]
    return [None if line is None else within(encodable(line, SHOWN_OF_LINE), most) for line in told]


def sample_labels(gallery: Gallery, indices: np.ndarray) -> tuple[list[str], list[int]]:
    """The distinct labels, and the place of each sample's among them; -1 = it has none."""
    told = [gallery.label_of(index) for index in indices.tolist()]
    most = LABEL_BYTES // max(1, len({label for label in told if label is not None})) - 3
    cut = [None if label is None else within(encodable(label, SHOWN_OF_LINE), most) for label in told]
    distinct = sorted({label for label in cut if label is not None})
    code = {label: place for place, label in enumerate(distinct)}
    return distinct, [-1 if label is None else code[label] for label in cut]


def thumbnail(image: np.ndarray, most: int = LOOKS_BYTES) -> str:
    """A ``data:`` URI of ``image``, of the largest of :data:`SIDES` that takes ``most`` characters, else the smallest.

    Drawings are exact where there is room.

    Args:
        image: ``[H, W]`` (grey), ``[H, W, 3]`` or, with opacity, ``[H, W, 4]``; whole numbers up to 255, booleans, or
            floats in [0, 1]; what is outside is cut off.
        most: characters.
    """
    image = shrunk(image)
    if image.dtype.kind in "bf":
        image = np.round(255 * np.nan_to_num(image.astype(np.float64)).clip(0, 1))
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    uri = ""
    for side in SIDES:
        least = min(side, *picture.size) ** 2 * LEAST_PER_PIXEL
        if side > SIDES[-1] and (least > most or (uri and max(picture.size) <= side)):
            continue
        picture.thumbnail((side, side))
        uri = _uri(picture, "png", optimize=True)
        if len(uri) > min(most, WEBP_FROM) and features.check("webp"):
            uri = min(uri, _uri(picture, "webp", quality=80), key=len)
        if len(uri) <= most:
            break
    return uri


def _uri(picture: Image.Image, form: str, **options: int) -> str:
    into = BytesIO()
    picture.save(into, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(into.getvalue()).decode()}"
