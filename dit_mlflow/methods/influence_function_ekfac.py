"""Influence functions by an eigenvalue-corrected Kronecker factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dit_mlflow.errors import InputError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.kronecker import Captured, divided, eigen_factors, squares_one_by_one
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.objective import refuse_regularizer, shares
from dit_mlflow.methods.snapshot import Vectors, snapshots


@dataclass(frozen=True)
class InfluenceFunctionEkfac(Method):
    r"""Newton step of removing a sample, with a factored Fisher matrix (Grosse et al. 2023, arXiv 2308.03296).

    .. math:: I_j = p_j \langle (F + \delta)^{-1} \nabla q, \nabla l_j \rangle

    at the final model, in evaluation mode, with the samples' shares ``p_j`` of the loss (``1 / n`` for a mean). ``F``
    has a block per linear layer and convolution: the second moment of the gradients on the diagonal of the eigenbasis
    of the inputs' and the output gradients' own (George et al. 2018, arXiv 1806.03884). Parameters of other layers
    (norms, embeddings, grouped convolutions, tied weights) have the diagonal of theirs. Sign: positive = removal raises
    the query.

    The gradients are those of the recorded labels (the empirical Fisher matrix), because a workload's loss need not
    tell a likelihood; the paper draws labels from the model. The size of the scores means little, their order is meant.

    Attributes:
        damping: ``delta`` of a block, as a share of its mean eigenvalue.

    Raises:
        UnsupportedError: there is a regularizer, whose curvature no sample's gradient shows.

    Cost: three passes forward and backward over the training set, an eigendecomposition for each side of each layer,
    a backward pass per query, and, only for parameters of other layers, one per sample.
    """

    name: ClassVar[str] = "influence_function_ekfac"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "ranking"

    damping: float = 0.1

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"damping={self.damping}; expected a positive share: there are eigenvalues of 0")

    def estimate(self, question: Question) -> Estimate:
        refuse_regularizer(self, question.workload)
        replay = question.trajectory.replay(question.workload)
        ((_, snapshot),) = snapshots(replay, [question.trajectory.num_steps])
        weights = shares(replay)
        gradients = snapshot.query_gradients(question.queries)
        captured = Captured(snapshot, weights)
        solved: Vectors = {}
        for name, factors in eigen_factors(captured).items():
            layer = captured.layers[name]
            solved |= layer.vectors(factors.solve(layer.matrix(gradients), self.damping), gradients)
        others = [name for name in gradients if name not in solved]
        for name, squares in squares_one_by_one(snapshot, weights, others).items():
            solved[name] = divided(gradients[name].double(), squares, self.damping).to(gradients[name])
        scores = weights * snapshot.products(solved)
        details = {"damping": self.damping, "diagonal": others, "max_drift": replay.max_drift}
        return Estimate(scores[None], details=details)
