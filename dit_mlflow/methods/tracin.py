"""TracIn over every recorded step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.snapshot import Snapshot
from dit_mlflow.replay.adjoint import vector_jacobian
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory.step_record import StepRecord

Effects = Callable[[Replay, StepRecord, Snapshot, dict[str, Tensor]], np.ndarray]
"""``(replay, step, s_t, grad q by parameter [queries, *shape]) -> [queries, sum B]``: what each presentation did."""


@dataclass(frozen=True)
class TracIn(Method):
    r"""Sum of a sample's own first-order effects, step by step (Pruthi et al. 2020, arXiv 2002.08484, "ideal").

    .. math:: I_j = \sum_{t \in [a, b)} \eta_t c_{t,j} \langle \nabla l_j(\theta_t), \nabla q(\theta_t) \rangle

    with the sample's gradient as recorded (batch, mode, random draws) and the learning rate of each param group. Sign:
    positive = its steps lowered the query, so removal raises it. Cost: a replay, and two backward passes per step and
    query. It leaves out what a step changes in all later steps (the Hessians), and all of the optimizer but its
    learning rate: far off with momentum or Adam.
    """

    name: ClassVar[str] = "tracin"
    per_window: ClassVar[bool] = True
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    def estimate(self, question: Question) -> Estimate:
        return sum_over_steps(question, effects)


def sum_over_steps(question: Question, effects: Effects) -> Estimate:
    """Add up the effects of every presentation of a sample, in each window. Cost: a replay, besides the effects."""
    replay = question.trajectory.replay(question.workload)
    first, last = min(w.start for w in question.windows), max(w.end for w in question.windows)
    scores = np.zeros(question.shape)
    for t, state in enumerate(replay.forward(first, last), start=first):
        counting = [k for k, window in enumerate(question.windows) if t in window]
        if not counting:
            continue
        step = question.trajectory.step(t)
        snapshot = Snapshot(replay.dynamics, replay.trajectory.manifest.optimizer, state, step)
        found = effects(replay, step, snapshot, snapshot.query_gradients(question.queries))
        for k in counting:
            np.add.at(scores[k].T, step.samples, found.T)
    return Estimate(scores, details={"max_drift": replay.max_drift})


def effects(replay: Replay, step: StepRecord, snapshot: Snapshot, gradients: dict[str, Tensor]) -> np.ndarray:
    """``eta c_j <grad l_j, grad q>`` of each presentation in the step, ``[queries, sum B]``."""
    gradient, batches = replay.loss_step.gradient, replay.dynamics.load(step)
    parameters = {**snapshot.state.parameters, **snapshot.trained}
    like = next(iter(snapshot.trained.values())).detach()
    weights = torch.ones(len(step.samples), dtype=like.dtype, device=like.device, requires_grad=True)
    buffers = {name: value.clone() for name, value in snapshot.state.buffers.items()}
    with sdpa_kernel(SDPBackend.MATH):
        found = gradient(parameters, buffers, step, batches, weights, create_graph=True)
    rates = learning_rates(replay, step)
    pairs = [(found[name], rates[name] * gradients[name]) for name in snapshot.trained if name in found]
    rows = len(next(iter(gradients.values())))
    (products,) = vector_jacobian([g for g, _ in pairs], [weights], [v for _, v in pairs], rows, batched=False)
    return products.double().cpu().numpy()


def learning_rates(replay: Replay, step: StepRecord) -> dict[str, float]:
    """Learning rate of each parameter that the optimizer holds."""
    groups = zip(replay.trajectory.manifest.optimizer.groups, step.hyperparameters, strict=True)
    return {name: float(settings["lr"]) for names, settings in groups for name in names}
