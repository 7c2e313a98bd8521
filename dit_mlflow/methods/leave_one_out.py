"""Exact retraining without each sample as one method among others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.retraining import Effort, leave_one_out


@dataclass(frozen=True)
class LeaveOneOut(Method):
    """:func:`dit_mlflow.leave_one_out` as one method among others.

    Attributes:
        samples, dtype, effort: see there. In the recorded dtype (the default), its agreement with a float64 ground
            truth is the most that rounding lets any estimate reach.
    """

    name: ClassVar[str] = "leave_one_out"
    kinds: ClassVar[tuple[str, ...]] = ("local", "final", "cumulative")
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"
    retrains: ClassVar[bool] = True

    samples: Sequence[int] | int | None = None
    dtype: torch.dtype | None = None
    effort: Effort = field(default_factory=Effort)

    def estimate(self, question: Question) -> Estimate:
        found = leave_one_out(
            question.trajectory,
            question.workload,
            question.windows,
            question.kind,
            question.queries,
            self.samples,
            self.dtype,
            effort=self.effort,
        )
        details = {name: found.metadata[name] for name in ("num_removed", "max_drift")}
        return Estimate(found.scores, found.metadata["dtype"], details)
