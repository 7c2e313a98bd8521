"""How much of each training sample was learned in a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from dit_mlflow.methods import Estimate, Method, Question


@dataclass(frozen=True)
class LossDrop(Method):
    """``l_j(theta_a) - l_j(theta_b)`` of a window ``[a, b)``, in evaluation mode: low = hardly learned = suspicious.

    Cost: a replay, and a forward pass of the training set at each end of a window.
    """

    name: ClassVar[str] = "loss_drop"
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "suspicion"

    def estimate(self, question: Question) -> Estimate:
        bounds = {step for window in question.windows for step in (window.start, window.end)}
        losses = {step: self._losses(question, step) for step in bounds}
        scores = np.empty(question.shape)  # [windows, queries, samples]
        for k, window in enumerate(question.windows):
            scores[k] = losses[window.start] - losses[window.end]
        return Estimate(scores)

    def _losses(self, question: Question, step: int) -> np.ndarray:
        workload = question.workload
        (state,) = question.trajectory.states(workload, step, step)
        model = state.load_into(workload.build_model()).eval()
        with torch.no_grad():
            return workload.loss(model, workload.batch(range(workload.num_samples))).double().numpy()
