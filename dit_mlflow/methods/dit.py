"""The sweep over the trajectory as methods among others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence import Influence, expected_influence, self_influence, track
from dit_mlflow.influence.draws import DRAWS_AGREE, check_draws
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method, WindowMethod
from dit_mlflow.replay.compiled_step import Compile, check_compile


@dataclass(frozen=True)
class Dit(WindowMethod):
    """Dynamic Influence Tracking: :func:`dit_mlflow.track` (Xu and Wu 2025, arXiv 2502.10793).

    Attributes:
        dtype: ``None`` = as recorded.
        memory_budget, compile: see :func:`dit_mlflow.track`.

    Cost: two to four trainings. Fails where removing a sample is far from its first-order effect (fast training, long
    windows), and where an operation has no second derivative.
    """

    name = "dit"

    dtype: torch.dtype | None = None
    memory_budget: int | None = None
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        check_compile(self.compile)

    def estimate(self, question: Question) -> Estimate:
        asked = question.trajectory, question.workload, question.windows, question.kind, question.queries
        found = track(*asked, dtype=self.dtype, memory_budget=self.memory_budget, compile=self.compile)
        return Estimate(found.scores, found.metadata["dtype"], _of_sweep(found))


@dataclass(frozen=True)
class Expected(WindowMethod):
    """The mean derivative over random sample weights: :func:`dit_mlflow.expected_influence`.

    Attributes:
        draws, seed, dtype, memory_budget, compile: see there.

    Cost: ``draws`` times that of ``dit``. For the removal of many samples; for a few, ``dit`` is often nearer. It
    predicts little of Adam's first steps and of early ``final`` windows.
    """

    name = "expected"
    of_many = True

    draws: int = 16
    seed: int = 0
    dtype: torch.dtype | None = None
    memory_budget: int | None = None
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        check_draws(self.draws, self.seed)
        check_compile(self.compile)

    def estimate(self, question: Question) -> Estimate:
        asked = question.trajectory, question.workload, question.windows, question.kind, question.queries
        found = expected_influence(*asked, self.draws, self.seed, self.dtype, self.memory_budget, compile=self.compile)
        names = ("draws", "seed", "draws_left_out", DRAWS_AGREE)
        details = {name: found.metadata[name] for name in names} | _of_sweep(found)
        return Estimate(found.scores, found.metadata["dtype"], details, found.standard_error, found.degrees_of_freedom)


@dataclass(frozen=True)
class SgdInfluence(Method):
    r"""Influence on the final model through every step of plain SGD (Hara et al. 2019, arXiv 1906.08473).

    .. math:: I_j = \sum_t \eta_t c_{t,j} \langle \lambda_{t+1}, \nabla l_j(\theta_t) \rangle, \quad
              \lambda_t = (1 - \eta_t H_t) \lambda_{t+1}, \quad \lambda_T = \nabla q(\theta_T)

    :func:`dit_mlflow.track` on ``[0, T)`` computes the same, and is called for it. Sign: positive = removal raises
    the query. Cost: two to four trainings. It is derived for SGD without momentum, and refused for anything else.
    """

    name = "sgd_influence"
    measures = "query"

    dtype: torch.dtype | None = None

    def estimate(self, question: Question) -> Estimate:
        layout, workload = question.trajectory.manifest.optimizer, question.workload
        steps = map(question.trajectory.step, range(question.trajectory.num_steps))
        momentum = layout.name == "SGD" and any(group["momentum"] for step in steps for group in step.hyperparameters)
        clips = workload.clip_grad_norm is not None or workload.clip_grad_value is not None
        own = workload.step is not None
        if layout.name != "SGD" or momentum or clips or own:
            said = [layout.name, *["momentum"] * momentum, *["clipped gradients"] * clips, *["a step of its own"] * own]
            what = " and ".join(said)
            raise UnsupportedError(f"sgd_influence is derived for plain SGD; the training used {what}. Use dit")
        found = track(question.trajectory, workload, question.windows, "final", question.queries, dtype=self.dtype)
        return Estimate(found.scores, found.metadata["dtype"], _of_sweep(found))


@dataclass(frozen=True)
class SelfInfluence(WindowMethod):
    """Minus :func:`dit_mlflow.self_influence`: low = its own loss would be much higher without it = suspicious.

    How much the model had to memorise a sample. Cost: one adjoint per training sample (as many at once as memory
    allows). Rare but right samples look like wrong ones (Feldman and Zhang 2020, arXiv 2008.03703).
    """

    name = "self_influence"
    measures = "suspicion"

    dtype: torch.dtype | None = None

    def estimate(self, question: Question) -> Estimate:
        found = self_influence(question.trajectory, question.workload, question.windows, question.kind, self.dtype)
        scores = np.broadcast_to(-found.scores, question.shape).copy()
        return Estimate(scores, found.metadata["dtype"], _of_sweep(found))


OF_SWEEP = ("max_drift", "derivative", "compile")
"""Keys of a result's metadata."""


def _of_sweep(found: Influence) -> dict[str, Any]:
    """What a result says of the sweep that made it."""
    return {key: found.metadata[key] for key in OF_SWEEP if key in found.metadata}
