"""Influence functions whose curvature is the second moment of the samples' gradients (the empirical Fisher matrix)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.kronecker import Captured, divided, eigen_factors, squares_one_by_one
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.sample_gradients import squares as squares_of
from dit_mlflow.methods.snapshot import Snapshot, Vectors, shares, snapshots


@dataclass(frozen=True)
class FisherStep(Method):
    r"""Newton step of removing a sample, with a Fisher matrix in place of the Hessian; subclasses say which.

    .. math:: I_j = p_j \langle (F + \delta)^{-1} \nabla q, \nabla l_j \rangle

    at the final model, in evaluation mode, with the samples' shares ``p_j`` of the loss (``1 / n`` for a mean). The
    gradients are those of the recorded labels, because a workload's loss need not tell a likelihood. Sign: positive =
    removal raises the query. The size of the scores means little, their order is meant.

    Attributes:
        damping: ``delta`` of a block of ``F``, as a share of its mean eigenvalue.

    Raises:
        UnsupportedError: there is a regularizer, whose curvature no sample's gradient shows.
    """

    follows_a_loss = True

    damping: float = 0.1

    def __post_init__(self) -> None:
        self._expect("a positive share: there are eigenvalues of 0", self.damping > 0, "damping")

    @abstractmethod
    def _solved(self, snapshot: Snapshot, weights: np.ndarray, gradients: Vectors) -> tuple[Vectors, dict[str, Any]]:
        """``(F + delta)^{-1} grad q``, and details; ``weights``: ``p``, ``[n]``."""

    def estimate(self, question: Question) -> Estimate:
        if question.workload.regularizer is not None:
            raise UnsupportedError(
                f"{self.name} takes the samples' gradients for the curvature, and the workload's regularizer is of no "
                "sample. Use influence_function, or add the term to each sample's loss"
            )
        replay = question.trajectory.replay(question.workload)
        ((_, snapshot),) = snapshots(replay, [question.trajectory.num_steps])
        weights = shares(replay)
        solved, details = self._solved(snapshot, weights, snapshot.query_gradients(question.queries))
        scores = weights * snapshot.products(solved)
        return Estimate(scores[None], details={"damping": self.damping, **details, "max_drift": replay.max_drift})


@dataclass(frozen=True)
class InfluenceFunctionEkfac(FisherStep):
    r""":class:`FisherStep` by eigenvalue-corrected Kronecker factors (Grosse et al. 2023, arXiv 2308.03296).

    ``F`` has a block per linear layer and convolution: the second moment of the gradients on the diagonal of the
    eigenbasis of the inputs' and the output gradients' own (George et al. 2018, arXiv 1806.03884). Parameters of other
    layers (norms, embeddings, grouped convolutions, tied weights) have the diagonal of theirs. The paper draws labels
    from the model.

    Cost: three passes forward and backward over the training set, an eigendecomposition for each side of each layer,
    a backward pass per query, and, only for parameters of other layers, one per sample.
    """

    name = "influence_function_ekfac"

    def _solved(self, snapshot: Snapshot, weights: np.ndarray, gradients: Vectors) -> tuple[Vectors, dict[str, Any]]:
        captured = Captured(snapshot, weights)
        solved: Vectors = {}
        for name, factors in eigen_factors(captured).items():
            layer = captured.layers[name]
            solved |= layer.vectors(factors.solve(layer.matrix(gradients), self.damping), gradients)
        others = [name for name in gradients if name not in solved]
        for name, squares in squares_one_by_one(snapshot, weights, others).items():
            solved[name] = divided(gradients[name].double(), squares, self.damping).to(gradients[name])
        return solved, {"diagonal": others}


@dataclass(frozen=True)
class InfluenceFunctionDatainf(FisherStep):
    r""":class:`FisherStep` with each layer's inverse in closed form (Kwon et al. 2024, arXiv 2310.00902).

    .. math:: I_j = p_j \sum_L \langle x_L, \nabla_L l_j \rangle, \quad
              x_L = \frac1{\delta_L} \Big( \nabla_L q - \sum_i p_i
              \frac{\langle \nabla_L q, \nabla_L l_i \rangle}{\delta_L + |\nabla_L l_i|^2} \nabla_L l_i \Big)

    ``F`` has a block per layer, and the inverse of a mean is taken for the mean of the inverses. It applies where the
    loss is a negative log-likelihood (otherwise gradients say nothing of curvature) and each layer trains few
    parameters, as adapters (LoRA) do: swapping mean and inverse is off by the order of a layer's parameters squared.

    Attributes:
        damping: see there.
        largest_layer: parameters of a layer above which it is refused.

    Raises:
        UnsupportedError: a layer is larger, or there is a regularizer.

    Cost: a pass forward and backward over the training set for single samples' norms, and two more for each layer and
    query; no system is solved, and single samples' gradients are not kept.
    """

    name = "influence_function_datainf"

    largest_layer: int = 100_000

    def _solved(self, snapshot: Snapshot, weights: np.ndarray, gradients: Vectors) -> tuple[Vectors, dict[str, Any]]:
        squares = dict(zip(snapshot.trained, squares_of(snapshot), strict=True))
        solved: Vectors = {}
        for names in self._layers(snapshot):
            own = np.sum([squares[name] for name in names], axis=0)
            solved |= self._solve(snapshot, weights, {name: gradients[name] for name in names}, own)
        return solved, {}

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
