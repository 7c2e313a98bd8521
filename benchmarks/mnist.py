"""The digits that the benchmarks train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 real digits of projects/mnist: pixels from 0 to 255, ``[5000, 784]``, and the digits, ``[5000]``."""
    with np.load(Path(__file__).parents[1] / "projects" / "mnist" / "digits.npz") as file:
        return file["images"].reshape(5000, 784), file["labels"].astype(np.int64)
