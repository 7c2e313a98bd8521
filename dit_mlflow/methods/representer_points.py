"""A model's last layer as a sum over training samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence import Query
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.last_layer import LastLayer, as_logits
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.replay.double_backward import DerivativesInside
from dit_mlflow.replay.loss_step import leaves
from dit_mlflow.replay.right_queries import RightQueries

TOLERANCE = 1e-4
"""Largest relative residual of the representer theorem."""


@dataclass(frozen=True)
class RepresenterPoints(Method):
    r"""A sample's term in the last layer's weights (Yeh et al. 2018, arXiv 1811.09720).

    At a stationary point of ``mean CE(W a_i, y_i) + l2 |W|^2``, with ``a_i`` the features that the final model gives
    its last layer (a 1 at the end for the bias), the outputs are a sum over training samples (theorem 3.1):

    .. math:: W a = \sum_i \alpha_i k(a_i, a), \qquad k(a, b) = \langle a, b \rangle, \qquad
        \alpha_i = -\frac{1}{2 l_2 n} \frac{\partial CE_i}{\partial (W a_i)}

    Training hardly ends there, so a copy of the last layer is fine-tuned to it, as in the paper. A sample's score is
    what removing its term does to the query, to first order:

    .. math:: I_j = - \langle \nabla_W q, \alpha_j a_j^T \rangle

    which for a logit is minus its term, exactly. Sign: positive = removal raises the query. Units are not the query's:
    training without the sample would let the others' ``alpha`` change.

    Attributes:
        l2: of the fine-tuned layer (the paper's 0.003). Small values concentrate the scores on few samples.
        targets: ``labels``, or ``model`` = the final model's probabilities, so that the copy stays as near to it as it
            can (the paper's choice for a given model; labels that the model has not learned then do not count).

    Raises:
        UnsupportedError: the workload is no classification, the model does not end in a linear layer, or no
            stationary point was found.

    Cost: two passes over the training set, a convex problem of the last layer's size (Newton steps by conjugate
    gradients), a backward pass per query. It sees only the last layer, and takes the workload's loss for plain
    cross-entropy, without weights and smoothing. The metadata hold the residual, and ``agreement``: the share of
    training samples that the fine-tuned layer puts into the model's class.
    """

    name = "representer_points"

    l2: float = 0.003
    targets: Literal["labels", "model"] = "labels"

    def __post_init__(self) -> None:
        expected = "a positive l2, and targets 'labels' or 'model'"
        self._expect(expected, self.l2 > 0 and self.targets in ("labels", "model"), "l2", "targets")

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        last = question.trajectory.num_steps
        layer = LastLayer(replay.dynamics, replay.checkpoint(last), last)
        layer.check_linear()
        train = layer.of(question.workload.train_set)
        features = train.features
        if layer.bias is not None:
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        wanted = train.logits.softmax(dim=1)
        if self.targets == "labels":
            wanted = torch.nn.functional.one_hot(train.labels, train.logits.shape[1]).double()
        problem = _LastLayerProblem(features, wanted, self.l2, outputs=layer.module.out_features)
        weights = problem.solve()
        alphas = -problem.slopes(weights) / (2 * self.l2 * len(features))
        residual = float((weights - alphas.T @ features).norm() / weights.norm().clamp_min(1e-300))
        if not residual <= TOLERANCE:
            raise UnsupportedError(
                f"no stationary point of the last layer was found: its weights differ from the sum over samples by "
                f"{residual:.1g} of their size, more than {TOLERANCE:g}. Give RepresenterPoints(l2=...) a larger one"
            )
        queries = replay.right_queries(last - 1, last)
        gradients = torch.stack([_query_gradient(layer, weights, query, queries) for query in question.queries])
        scores = -torch.einsum("no,qod,nd->qn", alphas, gradients, features)
        same = as_logits(features @ weights.T).argmax(dim=1) == train.logits.argmax(dim=1)
        details = {
            "l2": self.l2,
            "targets": self.targets,
            "layer": layer.name,
            "residual": residual,
            "agreement": float(same.double().mean()),
        }
        return Estimate(scores.cpu().numpy()[None], details=details)


@dataclass(frozen=True, eq=False)
class _LastLayerProblem:
    """``F(W) = mean CE(W a_i, y_i) + l2 |W|^2``, float64.

    Attributes:
        features: ``a``, ``[n, D]``.
        targets: ``y`` as probabilities, ``[n, classes]``.
        l2: of all weights, the bias among them.
        outputs: ``O``, rows of ``W``.
    """

    features: Tensor
    targets: Tensor
    l2: float
    outputs: int

    def solve(self) -> Tensor:
        """The minimum, ``[O, D]``, as near as rounding lets it come."""
        gradient = torch.func.grad(self._value)

        def product(w: np.ndarray, v: np.ndarray) -> Tensor:
            return torch.func.jvp(gradient, (self._matrix(w),), (self._matrix(v),))[1]

        found = minimize(
            lambda w: float(self._value(self._matrix(w))),
            np.zeros(self.outputs * self.features.shape[1]),
            jac=lambda w: gradient(self._matrix(w)).cpu().numpy().ravel(),
            hessp=lambda w, v: product(w, v).cpu().numpy().ravel(),
            method="trust-ncg",
            options={"gtol": 1e-9, "maxiter": 1000},
        )
        return self._matrix(found.x)

    def slopes(self, weights: Tensor) -> Tensor:
        """``d CE_i / d (W a_i)``, ``[n, O]``."""
        return torch.func.grad(self._losses)(self.features @ weights.T)

    def _losses(self, outputs: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(as_logits(outputs), self.targets, reduction="sum")

    def _value(self, weights: Tensor) -> Tensor:
        outputs = self.features @ weights.T
        return self._losses(outputs) / len(outputs) + self.l2 * weights.square().sum()

    def _matrix(self, flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat).to(self.features).reshape(self.outputs, -1)


def _query_gradient(layer: LastLayer, weights: Tensor, query: Query, queries: RightQueries) -> Tensor:
    """``grad_W q`` of the model with the fine-tuned layer, ``[O, D]``, float64; raises :class:`InputError` if none."""
    state = layer.state
    columns = layer.module.in_features
    like = state.parameters[layer.weight]
    moved: dict[str, Any] = {layer.weight: weights[:, :columns].to(like).requires_grad_()}
    if layer.bias is not None:
        moved[layer.bias] = weights[:, columns].to(like).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), DerivativesInside(graphs=True):
        value = queries.ask({**leaves(state.parameters), **moved}, state.buffers, query)
    wanted = list(moved.values())
    found = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else ()
    if all(part is None for part in found):
        raise InputError(
            f"query {query.name!r} does not depend on the last layer, {layer.name!r}, by differentiable operations; "
            "representer points explain what that layer makes of its features. Expected a query on the model's outputs"
        )
    parts = [torch.zeros_like(one) if part is None else part for one, part in zip(wanted, found, strict=True)]
    return torch.cat([part.double().reshape(len(weights), -1) for part in parts], dim=1)
