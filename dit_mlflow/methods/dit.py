"""Dynamic Influence Tracking as one method among others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dit_mlflow.influence import track
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method


@dataclass(frozen=True)
class Dit(Method):
    """One backward sweep over the trajectory: :func:`dit_mlflow.track` (Xu and Wu 2025, arXiv 2502.10793).

    Attributes:
        dtype: ``None`` = as recorded.
        memory_budget: bytes, see :func:`dit_mlflow.track`.

    Cost: two to four trainings. Fails where removing a sample is far from its first-order effect (fast training, long
    windows), and where an operation has no second derivative.
    """

    name: ClassVar[str] = "dit"
    kinds: ClassVar[tuple[str, ...]] = ("local", "final", "cumulative")
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    dtype: torch.dtype | None = None
    memory_budget: int | None = None

    def estimate(self, question: Question) -> Estimate:
        found = track(
            question.trajectory,
            question.workload,
            question.windows,
            question.kind,
            question.queries,
            dtype=self.dtype,
            memory_budget=self.memory_budget,
        )
        return Estimate(found.scores, found.metadata["dtype"], {"max_drift": found.metadata["max_drift"]})
