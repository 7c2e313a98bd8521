"""Methods that look at the model at the end of a window, and at nothing before."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.snapshot import Snapshot, snapshots


class AtWindowEnd(Method):
    """Scores of a window ``[a, b)`` are those of the model at ``s_b``, in evaluation mode."""

    per_window: ClassVar[bool] = True

    @abstractmethod
    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        """``[queries, n]``, or ``[n]`` if the queries make no difference."""

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        ends = [window.end for window in question.windows]
        found = {t: self.scores(snapshot, question) for t, snapshot in snapshots(replay, ends)}
        scores = np.stack([np.broadcast_to(found[end], question.shape[1:]) for end in ends])
        return Estimate(scores, details={"max_drift": replay.max_drift})
