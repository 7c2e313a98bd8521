"""Screen with DIT, then retrain exactly without the samples that stand out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from dit_mlflow.errors import InputError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.retraining.confirmation import exact_scores
from dit_mlflow.retraining.effort import Effort


@dataclass(frozen=True)
class DitConfirmed(Method):
    """``dit``, with the largest scores of each window and query replaced by exact leave-one-out.

    A retraining tells the change of every query, so that a sample which stands out for one of several queries has its
    exact score for all of them. The result's metadata hold the number of such samples, ``confirmed``, for each window.

    Attributes:
        share: of the samples to confirm in each window for each query, at least one.
        dtype, effort: of the retraining.

    Raises:
        InputError: a share that is not above 0 and at most 1.

    Cost: ``dit``, and for each window ``share * n`` retrainings for one query; for several, one for each sample that
    stands out for any of them, ``n`` at most. It corrects what was found, and finds nothing new: a sample that the
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

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share}; expected the part of the samples to confirm, above 0 and at most 1")

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
