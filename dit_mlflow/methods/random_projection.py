"""Random projections of long vectors that are never held whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**24
"""Elements of the matrix that are held at once."""


@dataclass(frozen=True)
class RandomProjection:
    """Multiplication by ``R``, ``[P, k]``, of independent ``+-1 / sqrt(k)``: inner products survive on average.

    Attributes:
        size: ``P``.
        dim: ``k``; where it is ``P`` or more, vectors stay as they are.
        seed: numbers that choose ``R``; the same on every device.
    """

    size: int
    dim: int
    seed: Sequence[int]

    def __call__(self, rows: Tensor) -> Tensor:
        """``[B, P] -> [B, min(k, P)]``, float64. Cost: ``B P k``, and ``P k`` random signs for each call."""
        if self.dim >= self.size:
            return rows.double()
        total = rows.new_zeros(len(rows), self.dim, dtype=torch.float64)
        columns = max(1, BLOCK // self.dim)
        for block, part in enumerate(rows.split(columns, dim=1)):
            (seed,) = np.random.SeedSequence([*self.seed, block]).generate_state(1)
            generator = torch.Generator().manual_seed(int(seed))
            signs = torch.randint(0, 2, (part.shape[1], self.dim), generator=generator, dtype=torch.int8)
            total += (part @ (2 * signs - 1).to(part)).double()
        return total / self.dim**0.5
