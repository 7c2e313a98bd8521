"""A directional derivative and the central difference that it should equal."""

from __future__ import annotations

import math
from dataclasses import dataclass

STRIDES = (1e-6, 1e-8, 1e-4, 1e-3)
"""Step lengths of the differences, relative to the parameters' size, tried in order until one can tell: the second is
shorter, for where the first meets a kink; the others are longer, for losses that compute in float32."""

TOLERANCE = 1e-4
"""Largest relative difference that counts as agreement; measured, it is below 1e-9 where backward is the derivative of
forward, and above 1e-2 where it is not."""


@dataclass(frozen=True)
class Slope:
    """A directional derivative of a linear function of a step's gradients, or of a query.

    Attributes:
        taken: by autograd.
        difference: by central differences.
        noise: error bound of ``difference``: the larger of float64's rounding and the second difference, which shows
            kinks.
    """

    taken: float
    difference: float
    noise: float

    @classmethod
    def between(cls, taken: float, before: float, here: float, after: float, stride: float, size: float) -> Slope:
        """From the values at ``-stride``, 0 and ``stride``; ``size`` is the sum of their terms' absolute values."""
        bend = abs(after - 2 * here + before)
        return cls(taken, (after - before) / (2 * stride), max(1e-14 * size, bend) / stride)

    @property
    def tells(self) -> bool:
        """Whether the noise is small enough to show a wrong derivative."""
        return math.isfinite(self.difference) and self.noise <= 0.01 * max(abs(self.taken), abs(self.difference))

    @property
    def agrees(self) -> bool:
        """Whether both are equal up to the noise."""
        return abs(self.taken - self.difference) <= TOLERANCE * max(abs(self.taken), abs(self.difference)) + self.noise
