"""Samples that are learned and lost again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.presentations import presentations


@dataclass(frozen=True)
class ForgettingEvents(Method):
    """Minus the times that a sample was wrong after it had been right (Toneva et al. 2019, arXiv 1812.05159).

    Counted when the sample is trained on, in the window; right means a positive margin. A sample that was never right
    until the window's end counts one more than its presentations until then. Low = suspicious. NaN for samples that
    the window never met. Cost: a replay and a forward pass of each step. Few presentations make many ties.
    """

    name: ClassVar[str] = "forgetting_events"
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "suspicion"

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        scores = np.full((len(question.windows), question.workload.num_samples), np.nan)
        right = np.zeros(question.workload.num_samples, dtype=bool)
        learned = np.zeros_like(right)
        met = np.zeros(question.workload.num_samples)
        for shown in presentations(replay, max(window.end for window in question.windows)):
            for sample, margin in zip(shown.samples, shown.margins, strict=True):
                forgotten = right[sample] and margin <= 0
                right[sample] = margin > 0
                learned[sample] |= margin > 0
                met[sample] += 1
                for k, window in enumerate(question.windows):
                    if shown.step in window:
                        scores[k, sample] = np.nan_to_num(scores[k, sample]) - forgotten
            for k, window in enumerate(question.windows):
                if shown.step == window.end - 1:
                    never = ~learned & np.isfinite(scores[k])
                    scores[k, never] = -(met[never] + 1)
        return Estimate(np.broadcast_to(scores[:, None], question.shape).copy())
