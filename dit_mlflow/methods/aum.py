"""Area under the margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.presentations import presentations


@dataclass(frozen=True)
class Aum(Method):
    """Mean margin of a sample when it was trained on (Pleiss et al. 2020, arXiv 2001.10528).

    Margin: the logit of its own label minus the largest other one. Low = suspicious: the rest of the data pulls
    against its label. NaN for samples that the window never met. Cost: a replay and a forward pass of each step.
    """

    name: ClassVar[str] = "aum"
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "suspicion"

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        sums = np.zeros((len(question.windows), question.workload.num_samples))
        counts = np.zeros_like(sums)
        for shown in presentations(replay, max(window.end for window in question.windows)):
            for k, window in enumerate(question.windows):
                if shown.step in window:
                    np.add.at(sums[k], shown.samples, shown.margins)
                    np.add.at(counts[k], shown.samples, 1)
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        return Estimate(np.broadcast_to(means[:, None], question.shape).copy())
