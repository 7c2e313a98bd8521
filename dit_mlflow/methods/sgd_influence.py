"""SGD-influence: the whole run, for plain SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence import track
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method


@dataclass(frozen=True)
class SgdInfluence(Method):
    r"""Influence on the final model through every step of plain SGD (Hara et al. 2019, arXiv 1906.08473).

    .. math:: I_j = \sum_t \eta_t c_{t,j} \langle \lambda_{t+1}, \nabla l_j(\theta_t) \rangle, \quad
              \lambda_t = (1 - \eta_t H_t) \lambda_{t+1}, \quad \lambda_T = \nabla q(\theta_T)

    That is the sweep of :func:`dit_mlflow.track` on ``[0, T)``, and is computed by it. Sign: positive = removal raises
    the query. Cost: two to four trainings. It is derived for SGD without momentum, and refused for anything else.
    """

    name: ClassVar[str] = "sgd_influence"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    dtype: torch.dtype | None = None

    def estimate(self, question: Question) -> Estimate:
        layout, workload = question.trajectory.manifest.optimizer, question.workload
        steps = map(question.trajectory.step, range(question.trajectory.num_steps))
        momentum = layout.name == "SGD" and any(group["momentum"] for step in steps for group in step.hyperparameters)
        clips = workload.clip_grad_norm is not None or workload.clip_grad_value is not None
        if layout.name != "SGD" or momentum or clips:
            what = " and ".join([layout.name, *["momentum"] * momentum, *["clipped gradients"] * clips])
            raise UnsupportedError(f"sgd_influence is derived for plain SGD; the training used {what}. Use dit")
        found = track(question.trajectory, workload, question.windows, "final", question.queries, dtype=self.dtype)
        return Estimate(found.scores, found.metadata["dtype"], {"max_drift": found.metadata["max_drift"]})
