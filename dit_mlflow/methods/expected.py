"""Expected influence as one method among others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dit_mlflow.influence import expected_influence
from dit_mlflow.influence.draws import check_draws
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method


@dataclass(frozen=True)
class Expected(Method):
    """The mean derivative over random sample weights: :func:`dit_mlflow.expected_influence`.

    Attributes:
        draws, seed, dtype, memory_budget: see there.

    Cost: ``draws`` times that of ``dit``. For the removal of many samples; for a few, ``dit`` is often nearer. It
    foretells little of Adam's first steps and of early ``final`` windows.
    """

    name: ClassVar[str] = "expected"
    kinds: ClassVar[tuple[str, ...]] = ("local", "final", "cumulative")
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    draws: int = 16
    seed: int = 0
    dtype: torch.dtype | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_draws(self.draws, self.seed)

    def estimate(self, question: Question) -> Estimate:
        found = expected_influence(
            question.trajectory,
            question.workload,
            question.windows,
            question.kind,
            question.queries,
            self.draws,
            self.seed,
            self.dtype,
            self.memory_budget,
        )
        details = {name: found.metadata[name] for name in ("draws", "seed", "draws_left_out", "max_drift")}
        return Estimate(found.scores, found.metadata["dtype"], details, found.standard_error, found.degrees_of_freedom)
