"""Add the weight gradients of every step to the window scores that count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_mlflow.influence.kind import Sweep


@dataclass(frozen=True)
class Row:
    """One row of the live adjoint: a sweep and the query it began with."""

    sweep: Sweep
    query: int


class WindowScores:
    """Scores ``[windows, queries, samples]``, float64, filled in while a sweep walks backwards.

    Kicks are first summed per row over a stretch of steps in which the same windows count, then credited to those
    windows: a step costs one addition, however many windows there are.

    Args:
        num_windows, num_queries, num_samples: of the scores.
        sweeps: all that will be swept; stretches end where one of them, or a share of one, begins or ends.
    """

    def __init__(self, num_windows: int, num_queries: int, num_samples: int, sweeps: Sequence[Sweep]) -> None:
        self.scores = torch.zeros((num_windows, num_queries, num_samples), dtype=torch.float64)
        shares = [share for sweep in sweeps for share in sweep.shares]
        self._bounds = {sweep.start for sweep in sweeps} | {step for share in shares for step in (share.lo, share.hi)}
        self._rows: Sequence[Row] = ()
        self._pending = self.scores.new_zeros((0, num_samples))

    def add(self, rows: Sequence[Row], t: int, samples: Tensor, weight_gradients: Tensor) -> None:
        """Take the weight gradients ``[rows, sum B]`` of step ``t``; repeated samples add up.

        Between two bounds, ``rows`` are the same.
        """
        if len(self._rows) == 0:
            self._rows = list(rows)
            self._pending = self.scores.new_zeros((len(rows), self.scores.shape[2]))
        self._pending.index_add_(1, samples, weight_gradients.detach().to(self._pending))
        if t in self._bounds:
            self._settle(t)

    def _settle(self, t: int) -> None:
        """Credit a stretch that ends (going backwards) with step ``t`` included."""
        for row, weight_gradients in zip(self._rows, self._pending, strict=True):
            for share in row.sweep.shares:
                if share.lo <= t < share.hi:
                    self.scores[share.window, row.query].add_(weight_gradients, alpha=share.sign)
        self._rows = ()
