"""Exact retraining as methods among others: without every sample, or without those that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.method import Estimate, RetrainingMethod
from dit_mlflow.retraining import leave_one_out
from dit_mlflow.retraining.counterfactuals import Removal
from dit_mlflow.retraining.leave_one_out import exact_scores


@dataclass(frozen=True)
class LeaveOneOut(RetrainingMethod):
    """:func:`dit_mlflow.leave_one_out` as one method among others.

    Attributes:
        samples, removal, dtype, effort: see there. In the recorded dtype (the default), its agreement with a float64
            ground truth is the most that rounding lets any estimate reach.
    """

    name = "leave_one_out"
    skips = True

    samples: Sequence[int] | int | None = None
    removal: Removal = "weight"

    def estimate(self, question: Question) -> Estimate:
        asked = question.trajectory, question.workload, question.windows, question.kind, question.queries
        found = leave_one_out(*asked, self.samples, self.dtype, effort=self.effort, removal=self.removal)
        details = {name: found.metadata[name] for name in ("num_removed", "max_drift", "removal")}
        return Estimate(found.scores, found.metadata["dtype"], details)


@dataclass(frozen=True)
class DitConfirmed(RetrainingMethod):
    """``dit``, with the largest scores of each window and query replaced by exact leave-one-out.

    One retraining gives the change of every query, so a sample that stands out for one query has exact scores for all.
    The result's metadata hold the number of such samples in each window, ``confirmed``.

    Attributes:
        share: of the samples to confirm in each window for each query, at least one.
        dtype, effort: of the retraining.

    Raises:
        InputError: a share that is not above 0 and at most 1.

    Cost: ``dit``, and for each window ``share * n`` retrainings for one query; for several, one for each sample that
    stands out for any of them, ``n`` at most. It corrects what was found, and finds nothing new: a sample that the
    estimate takes for harmless stays so.
    """

    name = "dit_confirmed"

    share: float = 0.1

    def __post_init__(self) -> None:
        self._expect("the part of the samples to confirm, above 0 and at most 1", 0 < self.share <= 1, "share")

    def estimate(self, question: Question) -> Estimate:
        screened = Dit().estimate(question)
        scores = screened.scores.copy()
        m = max(1, round(self.share * question.workload.num_samples))
        confirmed = []
        for k, window in enumerate(question.windows):
            asked = replace(question, windows=(window,))
            chosen, exact, _ = exact_scores(asked, scores[k], m, self.dtype, self.effort)
            scores[k][:, chosen] = exact
            confirmed.append(len(chosen))
        return Estimate(scores, details={**screened.details, "confirmed": confirmed})
