"""Influence functions in closed form, for layers with few parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.objective import refuse_regularizer, shares
from dit_mlflow.methods.sample_gradients import squares as squares_of
from dit_mlflow.methods.snapshot import Snapshot, Vectors, snapshots


@dataclass(frozen=True)
class InfluenceFunctionDatainf(Method):
    r"""Newton step of removing a sample, each layer's inverse in closed form (Kwon et al. 2024, arXiv 2310.00902).

    .. math:: I_j = p_j \sum_L \langle x_L, \nabla_L l_j \rangle, \quad
              x_L = \frac1{\delta_L} \Big( \nabla_L q - \sum_i p_i
              \frac{\langle \nabla_L q, \nabla_L l_i \rangle}{\delta_L + |\nabla_L l_i|^2} \nabla_L l_i \Big)

    at the final model, in evaluation mode, with the samples' shares ``p_j`` of the loss (``1 / n`` for a mean): the
    layer's Hessian is taken for the second moment of the gradients, and the inverse of a mean for the mean of the
    inverses. Sign: positive = removal raises the query.

    It applies where the loss is a negative log-likelihood (otherwise gradients say nothing of curvature) and each layer
    moves few parameters, as adapters (LoRA) do: swapping mean and inverse is off by the order of a layer's parameters
    squared. The size of the scores means little, their order is meant.

    Attributes:
        damping: ``delta`` of a layer, as a share of the mean eigenvalue of its second moment, as in the paper and in
            ``influence_function_ekfac``.
        largest_layer: parameters of a layer above which it is refused.

    Raises:
        UnsupportedError: a layer is larger, or there is a regularizer, whose curvature no sample's gradient shows.

    Cost: a pass forward and backward over the training set for single samples' norms, and two more for each layer and
    query; no system is solved, and single samples' gradients are not kept.
    """

    name: ClassVar[str] = "influence_function_datainf"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "ranking"

    damping: float = 0.1
    largest_layer: int = 100_000

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"damping={self.damping}; expected a positive share: the closed form divides by it")

    def estimate(self, question: Question) -> Estimate:
        refuse_regularizer(self, question.workload)
        replay = question.trajectory.replay(question.workload)
        ((_, snapshot),) = snapshots(replay, [question.trajectory.num_steps])
        weights = shares(replay)
        gradients = snapshot.query_gradients(question.queries)
        squares = dict(zip(snapshot.trained, squares_of(snapshot), strict=True))
        solved: Vectors = {}
        for names in self._layers(snapshot):
            own = sum(squares[name] for name in names)
            part = {name: gradients[name] for name in names}
            solved |= self._solve(snapshot, weights, part, np.asarray(own))
        scores = weights * snapshot.products(solved)
        return Estimate(scores[None], details={"damping": self.damping, "max_drift": replay.max_drift})

    def _layers(self, snapshot: Snapshot) -> list[list[str]]:
        """Names of the trained parameters, module by module."""
        layers: dict[str, list[str]] = {}
        for name in snapshot.trained:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        for layer, names in layers.items():
            size = sum(snapshot.trained[name].numel() for name in names)
            if size > self.largest_layer:
                raise UnsupportedError(
                    f"layer {layer!r} trains {size:,} parameters; influence_function_datainf is meant for at most "
                    f"largest_layer={self.largest_layer:,}, as in adapters (LoRA), and is far off for larger ones. Use "
                    "influence_function_ekfac or influence_function"
                )
        return list(layers.values())

    def _solve(self, snapshot: Snapshot, weights: np.ndarray, gradients: Vectors, squares: np.ndarray) -> Vectors:
        """A layer's ``x_L``, from its part of ``grad q`` and its samples' ``|grad l_i|^2``, ``[n]``; 0 if all are 0."""
        damping = self.damping * (weights @ squares) / sum(value[0].numel() for value in gradients.values())
        if not damping > 0:
            return {name: torch.zeros_like(value) for name, value in gradients.items()}
        within = weights * snapshot.products(gradients) / (damping + squares)
        covered = snapshot.combinations(within, list(gradients))
        return {name: (value - covered[name]) / damping for name, value in gradients.items()}
