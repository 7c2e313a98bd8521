"""A directional derivative beside the central difference that it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass

STRIDES = (1e-6, 1e-8, 1e-4, 1e-3)
"""Lengths of the differences, in sizes of the parameters, one after the other until one tells: a shorter one, where the
first meets a kink; longer ones, where a loss computes in float32."""

TOLERANCE = 1e-4
"""Relative difference that counts as none; it is below 1e-9 where backward is the derivative of forward, and above
1e-2 where it is not."""


@dataclass(frozen=True)
class Slope:
    """A directional derivative of a linear function of a step's gradients, or of a query.

    Attributes:
        taken: by autograd.
        difference: by central differences.
        noise: how far the latter may be off, by rounding and by kinks: the larger of what float64 rounds, and what the
            second difference shows.
    """

    taken: float
    difference: float
    noise: float

    @classmethod
    def between(cls, taken: float, before: float, here: float, after: float, stride: float, size: float) -> Slope:
        """From values at ``-stride``, 0 and ``stride``; ``size`` is that of their terms."""
        bend = abs(after - 2 * here + before)
        return cls(taken, (after - before) / (2 * stride), max(1e-14 * size, bend) / stride)

    @property
    def tells(self) -> bool:
        """Whether a wrong derivative would show."""
        return math.isfinite(self.difference) and self.noise <= 0.01 * max(abs(self.taken), abs(self.difference))

    @property
    def agrees(self) -> bool:
        """Whether both are the same but for the noise."""
        return abs(self.taken - self.difference) <= TOLERANCE * max(abs(self.taken), abs(self.difference)) + self.noise
