"""Data value embeddings: the sweep, with gradients in place of Hessians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.sweep import in_parts
from dit_mlflow.methods.method import Estimate, WindowMethod
from dit_mlflow.methods.snapshot import refuse_ascent
from dit_mlflow.replay.adjoint import vector_jacobian
from dit_mlflow.replay.dynamics import MicroBatch
from dit_mlflow.replay.loss_step import LossStep, Objective
from dit_mlflow.replay.not_finite import NotFiniteError
from dit_mlflow.trajectory import State, StepRecord


@dataclass(frozen=True)
class Dvemb(WindowMethod):
    r"""Trajectory-specific leave-one-out by data value embeddings (Wang et al. 2025, arXiv 2412.09538).

    A sample met at step ``t`` has the embedding

    .. math:: v_{t,j} = \Big[ \prod_{s > t} (1 - \eta_s G_s) \Big] \eta_t c_{t,j} \nabla l_j(\theta_t), \quad
              G_s = \sum_i c_{s,i} \nabla l_i(\theta_s) \nabla l_i(\theta_s)^\top, \quad
              I_j = \sum_t \langle \nabla q, v_{t,j} \rangle.

    The one approximation is ``G_s`` in place of the Hessian of the step's loss. The two are equal in expectation for a
    log-likelihood if the model is right, and exactly for ``-log`` of what is linear in the parameters, where this is
    the sweep (``dit``). The product is computed from the right: an adjoint runs backwards and ``G_s`` acts on it, so
    that no embeddings are stored, and windows, kinds and optimizers are those of :func:`dit_mlflow.track` (the paper
    has plain SGD and the end of training). A regularizer keeps its own Hessian. Sign: positive = removal raises the
    query.

    Attributes:
        dtype: ``None`` = as recorded.
        memory_budget: bytes, see :func:`dit_mlflow.track`.

    Raises:
        UnsupportedError: the embeddings overflow, training climbed (``maximize=True``), or as :func:`dit_mlflow.track`.

    Cost: as ``dit``, and for each query a forward pass more per step. The paper's embeddings answer later queries by an
    inner product each, but take a vector of the model's size for every sample of every step. It fails where gradients
    say little of curvature: squared losses, wrong labels, early training.
    """

    name = "dvemb"
    follows_a_loss = True

    dtype: torch.dtype | None = None
    memory_budget: int | None = None

    def estimate(self, question: Question) -> Estimate:
        refuse_ascent(question.trajectory.step(0))
        replay = question.trajectory.replay(question.workload, self.dtype, _GradientsForHessians)
        engine = Engine(replay, self.memory_budget)
        try:
            scores = np.concatenate([part for _, part in in_parts(engine, question)], axis=1)
        except NotFiniteError as error:
            raise UnsupportedError(
                "the data value embeddings of this training overflow: learning rates times squared gradients are so "
                "large that gradients in place of Hessians drive every step apart. Use dit, or shorter local windows"
            ) from error
        return Estimate(scores, str(self.dtype or "recorded"), {"max_drift": replay.max_drift})


class _GradientsForHessians(LossStep):
    def derivatives(
        self, objective: Objective, state: State, record: StepRecord, batches: list[MicroBatch]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        by_weight, *by_moving = objective.derivatives([objective.weights, *objective.moving], batched=False)
        # by_weight is c_i <g_i, v>; G v = sum of c_i <g_i, v> g_i is the step's gradient with the weights <g_i, v>.
        coefficients = torch.cat([micro.coefficients for micro in batches]).to(by_weight)
        along = torch.where(coefficients == 0, 0.0, by_weight / coefficients)
        products = []
        for row, weights in enumerate(along):
            vectors = {name: part[row] for name, part in zip(objective.gradients, objective.by_gradient, strict=True)}
            products.append(self._product(objective.held, vectors, weights, state, record, batches))
        return by_weight, [torch.stack(parts) for parts in zip(*products, strict=True)], by_moving

    def _product(
        self,
        held: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
        weights: Tensor,
        state: State,
        record: StepRecord,
        batches: list[MicroBatch],
    ) -> list[Tensor]:
        """``G v``, and the regularizer's Hessian times ``v``, for the held parameters."""
        moved = [name for name in held if name in vectors and name not in record.zero_gradient]
        inputs = [held[name] for name in moved]
        parameters = {**state.parameters, **held}
        buffers = {name: value.clone() for name, value in state.buffers.items()}
        total = {name: torch.zeros_like(value) for name, value in held.items()}
        with sdpa_kernel(SDPBackend.MATH):
            for position, term in enumerate(self.gradient.terms(record, batches)):
                value, of_data = term(parameters, buffers, weights), position < len(batches)
                found = torch.autograd.grad(value, inputs, create_graph=not of_data, allow_unused=True)
                if not of_data:
                    pairs = [
                        (part, vectors[name][None]) for name, part in zip(moved, found, strict=True) if part is not None
                    ]
                    rows = vector_jacobian([p for p, _ in pairs], inputs, [v for _, v in pairs], 1, batched=False)
                    found = tuple(part[0] for part in rows)
                for name, part in zip(moved, found, strict=True):
                    if part is not None:
                        total[name] += part
        return list(total.values())
