"""How much the model had to memorise a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from dit_mlflow.influence import self_influence
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method


@dataclass(frozen=True)
class SelfInfluence(Method):
    """Minus :func:`dit_mlflow.self_influence`: low = its own loss would be much higher without it = suspicious.

    Cost: one adjoint per training sample (as many at once as memory allows). Rare but right samples look like wrong
    ones (Feldman and Zhang 2020, arXiv 2008.03703).
    """

    name: ClassVar[str] = "self_influence"
    kinds: ClassVar[tuple[str, ...]] = ("local", "final", "cumulative")
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "suspicion"

    dtype: torch.dtype | None = None

    def estimate(self, question: Question) -> Estimate:
        found = self_influence(question.trajectory, question.workload, question.windows, question.kind, self.dtype)
        scores = np.broadcast_to(-found.scores, question.shape).copy()
        return Estimate(scores, found.metadata["dtype"], {"max_drift": found.metadata["max_drift"]})
