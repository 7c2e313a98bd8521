"""TracIn over stored checkpoints alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.influence.window import Window
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.objective import mean_coefficients
from dit_mlflow.methods.snapshot import snapshot_at
from dit_mlflow.methods.tracin import learning_rates


@dataclass(frozen=True)
class TracInCheckpoints(Method):
    r"""TracInCP (Pruthi et al. 2020, arXiv 2002.08484, section 3.2): as if every checkpoint met the whole training set.

    .. math:: I_j = \sum_{t \text{ stored}} \eta_t c_j \langle \nabla l_j(\theta_t), \nabla q(\theta_t) \rangle

    over the checkpoints with ``a <= t < b``, in evaluation mode, with the sample's mean coefficient over training (``1
    / n`` for a mean loss). Sign as ``tracin``; a ranking, since it does not know how often a sample was met. A window
    without a checkpoint has no scores (NaN). Cost: three passes over the training set for each checkpoint and query, no
    replay.
    """

    name: ClassVar[str] = "tracin_checkpoints"
    per_window: ClassVar[bool] = True

    def estimate(self, question: Question) -> Estimate:
        trajectory = question.trajectory
        replay = trajectory.replay(question.workload)
        weights = mean_coefficients(replay, Window(0, trajectory.num_steps))
        scores = np.full(question.shape, np.nan)
        for t in trajectory.checkpoint_steps:
            counting = [k for k, window in enumerate(question.windows) if t in window]
            if not counting:
                continue
            step = trajectory.step(t)
            snapshot = snapshot_at(replay, replay.checkpoint(t), step)
            rates = learning_rates(replay, step)
            gradients = snapshot.query_gradients(question.queries)
            effects = snapshot.products({name: rates[name] * value for name, value in gradients.items()})
            for k in counting:
                scores[k] = np.nan_to_num(scores[k]) + weights * effects
        return Estimate(scores)
