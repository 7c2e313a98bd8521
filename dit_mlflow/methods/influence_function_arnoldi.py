"""Influence functions in the space of the Hessian's leading eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.methods.hessian import Curvature, NewtonStep, Solver
from dit_mlflow.methods.krylov import krylov_space


@dataclass(frozen=True)
class InfluenceFunctionArnoldi(NewtonStep):
    r"""Newton step of removing a sample, in the leading eigenvectors alone (Schioppa et al. 2022, arXiv 2112.03052).

    .. math:: I_j = c_j \sum_k \frac{\langle \nabla q, u_k \rangle \langle u_k, \nabla l_j \rangle}
              {\sigma_k + \delta}

    where ``u_k`` and ``sigma_k`` are the eigenvectors and eigenvalues of largest size that the Hessian has in a Krylov
    space, begun at random; what lies outside their span counts as 0. With all of them it is ``influence_function``,
    whose ``H``, ``c`` and ``damping`` it shares. Sign: positive = removal raises the query. The damping is raised
    tenfold until every ``sigma_k + damping`` is positive; the metadata hold it, and the relative residual, which the
    part of ``grad q`` outside the span makes large.

    Attributes:
        damping: ``delta`` to begin with.
        attempts: dampings to try.
        iterations: dimension of the Krylov space.
        rank: eigenvectors kept.
        seed: of the vector to begin with.

    Raises:
        InputError: a setting that cannot be used.
        UnsupportedError: no damping is enough, or the Hessian is 0 or not finite.

    Cost: ``iterations`` Hessian-vector products over the training set, whatever the number of queries, and as many
    vectors of the model's size (8 bytes a parameter) in memory. It fails where small eigenvalues matter: they are what
    the space finds last, and what an inverse weighs most.
    """

    name: ClassVar[str] = "influence_function_arnoldi"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    iterations: int = 200
    rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.iterations, self.rank) < 1 or self.seed < 0:
            raise InputError(
                f"{self.name} with iterations={self.iterations}, rank={self.rank}, seed={self.seed}; expected 1 or "
                "more of the first two, and a seed of 0 or more"
            )

    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        start = np.random.default_rng(self.seed).standard_normal((rows.shape[1],))
        space = krylov_space(curvature.product, start, self.iterations)
        values, vectors = space.eigen
        # Below rounding, an eigenvalue is 0 and its vector arbitrary.
        rounding = np.abs(values).max() * torch.finfo(next(iter(curvature.snapshot.trained.values())).dtype).eps
        kept = [k for k in np.argsort(-np.abs(values), kind="stable")[: self.rank] if np.abs(values[k]) > rounding]
        if not kept:
            raise UnsupportedError(
                "the Hessian of the final model is 0, so that influence_function_arnoldi has no eigenvectors to work "
                "with: the loss is linear in the parameters there. Use dit, which needs no inverse"
            )
        values, leading = values[kept], vectors[:, kept].T @ np.stack(space.vectors)
        inside = rows @ leading.T

        def solve(damping: float) -> np.ndarray | None:
            return (inside / (values + damping)) @ leading if (values + damping > 0).all() else None

        return solve
