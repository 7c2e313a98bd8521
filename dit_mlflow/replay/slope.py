"""A directional derivative and the central difference that it should equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STRIDES = (1e-6, 1e-8, 1e-4, 1e-3)
"""Step lengths of the differences, relative to the parameters' size, tried in order until one can tell: the second is
shorter, for where the first meets a kink; the others are longer, for losses that compute in float32."""

TOLERANCE = 1e-6
"""Largest relative difference that counts as agreement; measured, it is below 1e-9 where backward is the derivative of
forward, above 1e-2 where something is detached, and 1e-4 to 1e-1 where torch's third derivative of a norm is wrong."""

COARSE = 1e-4
"""The same for strides of 1e-4 and longer, at which what computes in float32 is rounded so."""

BEYOND = 10
"""A difference of more than so many times the noise is no noise."""


@dataclass(frozen=True)
class Slope:
    """A directional derivative of a linear function of a step's gradients, or of a query.

    Attributes:
        taken: by autograd.
        difference: by central differences.
        noise: error bound of ``difference``: the largest of float64's rounding, the second difference, which shows
            kinks, and the change with twice the stride, which shows lower precision.
        tolerance: largest relative difference that counts as agreement.
    """

    taken: float
    difference: float
    noise: float
    tolerance: float = TOLERANCE

    @classmethod
    def of(cls, taken: float, here: float, at: Callable[[float], float], stride: float, size: float) -> Slope:
        """From values ``at(length)`` along the direction; ``size`` is the sum of the absolute values of its terms."""
        before, after = at(-stride), at(stride)
        difference = (after - before) / (2 * stride)
        wider = (at(2 * stride) - at(-2 * stride)) / (4 * stride)
        noise = max(1e-14 * size / stride, abs(after - 2 * here + before) / stride, abs(wider - difference))
        return cls(taken, difference, noise, TOLERANCE if stride < COARSE else COARSE)

    @property
    def tells(self) -> bool:
        """Whether the noise is small enough to show a wrong derivative."""
        return math.isfinite(self.difference) and self.noise <= 0.01 * self._size

    @property
    def exact(self) -> bool:
        """Whether the noise is far too small to hide a wrong derivative."""
        return self.noise <= 0.001 * self._size

    @property
    def agrees(self) -> bool:
        """Whether both are equal up to the noise."""
        return self._apart <= self.tolerance * self._size + self.noise

    @property
    def refutes(self) -> bool:
        """Whether they differ by more than noise can explain. No change at all may be that of a lower precision."""
        return self.tells and self.difference != 0 and self._apart > self.tolerance * self._size + BEYOND * self.noise

    @property
    def _apart(self) -> float:
        return abs(self.taken - self.difference)

    @property
    def _size(self) -> float:
        return max(abs(self.taken), abs(self.difference))
