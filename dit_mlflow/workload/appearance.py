"""A training sample as people see it: a picture, a text, or a row of a table."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

Appearance = np.ndarray | str | Mapping[str, Any]
"""An image ``[H, W]`` (grey) or ``[H, W, 3]``, uint8 or floats in [0, 1]; a text; or a table row, name -> value."""

SMALLEST_IMAGE = 4
"""Pixels per side; smaller arrays are not treated as images."""

LONGEST_SIDE = 512
"""Largest number of pixels per side; of larger images, every n-th is used."""

LONGEST_ROW = 64
"""Largest number of values of a vector that is shown."""

INPUTS = ("image", "pixel_values", "text", "sentence", "inputs", "input", "x", "input_ids")
LABELS = ("label", "labels", "target", "y")


def appearance_of(sample: Any) -> Appearance | None:
    """Guess what a data set's sample looks like; ``None`` = no guess.

    Tuples show their first part; mappings the first entry with a usual name, or all of it if its values are scalars.
    Vectors of floats become rows ``x0, x1, …``, vectors of whole numbers (tokens) a text. Arrays shaped like images are
    stretched to their own range, since they may have been standardised.
    """
    if isinstance(sample, (tuple, list)) and sample:
        sample = sample[0]
    if isinstance(sample, Mapping):
        named = next((sample[name] for name in INPUTS if name in sample), None)
        if named is None:
            # No more than is shown: a bag of words has a hundred thousand.
            row = {str(name): _scalar(value) for name, value in islice(sample.items(), LONGEST_ROW)}
            return row if all(value is not None for value in row.values()) else None
        sample = named
    if isinstance(sample, str):
        return sample
    if not _is_array(sample):
        return None
    values = _array(sample)
    if values.ndim == 1 and 0 < len(values) <= LONGEST_ROW:
        if values.dtype.kind in "iu":
            return " ".join(map(str, values.tolist()))
        return {f"x{position}": value for position, value in enumerate(values.tolist())}
    return _image(values)


def as_drawn(shown: Any) -> Any:
    """What a workload's ``show`` returned; pictures of other libraries, tensors and channels in front as arrays."""
    if not _is_array(shown):
        return shown
    values = _array(shown)
    drawn = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    return values if drawn else appearance_of(values)


def shrunk(image: np.ndarray) -> np.ndarray:
    """Every n-th row and column, so that neither side has more than :data:`LONGEST_SIDE` pixels; nothing is copied."""
    every = -(-max(image.shape[:2], default=0) // LONGEST_SIDE)
    return image[(slice(None, None, every),) * min(2, image.ndim)] if every > 1 else image


def label_of(sample: Any) -> str | None:
    """The label of a data set's sample, if it has a scalar one: the second part, or the entry with a usual name."""
    if isinstance(sample, (tuple, list)):
        found = sample[1] if len(sample) > 1 else None
    elif isinstance(sample, Mapping):
        found = next((sample[name] for name in LABELS if name in sample), None)
    else:
        found = None
    scalar = _scalar(found)
    return f"{scalar:g}" if isinstance(scalar, float) else None if scalar is None else str(scalar)


def _scalar(value: Any) -> str | float | int | None:
    if _is_array(value):
        array = _array(value)
        return array.item() if array.size == 1 else None
    return value if isinstance(value, (str, int, float)) else None


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray(value.float() if value.dtype == torch.bfloat16 else value)
    if isinstance(value, Image):
        every = -(-max(value.size) // LONGEST_SIDE)
        if every > 1:
            value = value.resize((max(1, value.width // every), max(1, value.height // every)), Resampling.NEAREST)
        if value.mode not in {"L", "RGB", "RGBA"}:
            value = value.convert("RGBA" if value.has_transparency_data else "RGB")
    return np.asarray(value)


def _image(values: np.ndarray) -> np.ndarray | None:
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    shaped = values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)
    if not shaped or min(values.shape[:2]) < SMALLEST_IMAGE or values.dtype.kind not in "uif":
        return None
    # First, since a view of a few bytes may have 10^12 elements.
    values = shrunk(values)
    if values.dtype == np.uint8:
        return values
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size or finite.min() == finite.max():
        return np.zeros(values.shape)
    low, high = finite.min(), finite.max()
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((values - low) / (high - low))
