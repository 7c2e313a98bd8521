"""Screen with DIT, then retrain exactly without the samples that stand out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Influence
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.counterfactual import retrain
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.effort import Effort
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.retraining import LeftOut
from dit_mlflow.trajectory import Trajectory, Workload


def confirm(
    estimate: Influence,
    trajectory: Trajectory,
    workload: Workload,
    m: int,
    dtype: torch.dtype | None = torch.float64,
    effort: Effort | None = None,
) -> Influence:
    """Exact leave-one-out for the ``m`` samples of largest absolute score in each window.

    Args:
        estimate: scores of one query, the mean validation loss, with a kind.
        trajectory, workload: that it was computed from.
        m: samples to confirm in each window.
        dtype, effort: of the retraining, see :func:`dit_mlflow.leave_one_out`.

    Returns:
        Scores like ``estimate``'s, exact where confirmed and NaN elsewhere.

    Raises:
        InputError: ``m`` is not between 1 and the number of samples, or the estimate has several queries.

    Cost: ``m`` trainings at most for disjoint ``local`` windows, and for each other window.
    """
    samples = estimate.scores.shape[2]
    if not 1 <= m <= samples or len(estimate.queries) != 1:
        raise InputError(
            f"m={m} samples to confirm and {len(estimate.queries)} queries; expected 1 … {samples} and one query"
        )
    exact = np.full(estimate.scores.shape, np.nan)
    drift = 0.0
    for k, window in enumerate(estimate.windows):
        question = Question.of(trajectory, workload, [window], estimate.kind, None)
        found = _confirmed(question, estimate.scores[k, 0], m, dtype, effort)
        exact[k, 0], drift = found[0], max(drift, found[1])
    asked = Question.of(trajectory, workload, estimate.windows, estimate.kind, None)
    return asked.answer(exact, "leave_one_out", str(dtype or "recorded"), num_removed=m, max_drift=drift)


def _confirmed(
    question: Question, scores: np.ndarray, m: int, dtype: torch.dtype | None, effort: Effort | None
) -> tuple[np.ndarray, float]:
    chosen = np.sort(np.argsort(-np.abs(scores), kind="stable")[:m])
    exact = np.full(len(scores), np.nan)
    changes, drift = retrain(question, LeftOut(chosen), dtype, effort)
    exact[chosen] = changes[0, 0]
    return exact, drift


@dataclass(frozen=True)
class DitConfirmed(Method):
    """``dit``, with the largest scores of each window and query replaced by exact leave-one-out.

    Attributes:
        share: of the samples to confirm in each window, at least one.
        dtype, effort: of the retraining.

    Cost: ``dit``, and ``share * n`` retrainings. It corrects what was found, and finds nothing new: a sample that the
    estimate holds for harmless stays so.
    """

    name: ClassVar[str] = "dit_confirmed"
    kinds: ClassVar[tuple[str, ...]] = ("local", "final", "cumulative")
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"
    retrains: ClassVar[bool] = True

    share: float = 0.1
    dtype: torch.dtype | None = None
    effort: Effort = field(default_factory=Effort)

    def estimate(self, question: Question) -> Estimate:
        screened = Dit().estimate(question)
        scores = screened.scores.copy()
        m = max(1, round(self.share * question.workload.num_samples))
        for k, window in enumerate(question.windows):
            for q, query in enumerate(question.queries):
                asked = Question.of(question.trajectory, question.workload, [window], question.kind, [query])
                exact, _ = _confirmed(asked, scores[k, q], m, self.dtype, self.effort)
                scores[k, q] = np.where(np.isfinite(exact), exact, scores[k, q])
        return Estimate(scores, details={**screened.details, "confirmed": m})
