"""Small pictures as text that a page can hold."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from PIL import Image

LONGEST_SIDE = 128
"""Pixels; larger images are made smaller, smaller ones are kept as they are."""

JPEG_FROM = 6000
"""Bytes of a PNG from which JPEG is tried instead: photographs, not drawings."""


def thumbnail(image: np.ndarray) -> str:
    """A ``data:`` URI of ``image``, at most :data:`LONGEST_SIDE` pixels on a side.

    Args:
        image: ``[H, W]`` (grey), ``[H, W, 3]`` or, with opacity, ``[H, W, 4]``; whole numbers up to 255, booleans, or
            floats in [0, 1]; what is outside is cut off.
    """
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
