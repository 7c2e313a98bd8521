"""Influence functions: the final model taken for a minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

from dit_mlflow.errors import InputError
from dit_mlflow.methods.hessian import Curvature, NewtonStep, Solver


@dataclass(frozen=True)
class InfluenceFunction(NewtonStep):
    r"""Newton step of removing a sample from a minimum (Koh and Liang 2017, arXiv 1703.04730), by conjugate gradients.

    .. math:: I_j = c_j \langle (H + \delta)^{-1} \nabla q, \nabla l_j \rangle

    at the final model, in evaluation mode; ``H`` is the Hessian of ``sum_i c_i l_i`` (and the regularizer; not of an
    optimizer's weight decay), with the samples' mean coefficients over training: ``1 / n`` for a mean loss. Sign:
    positive = removal raises the query. Where ``H + damping`` is not positive definite, or the solver does not
    converge, the damping is raised tenfold until it does; the result's metadata hold the damping, and the largest
    relative residual.

    Attributes:
        damping: ``delta`` to begin with.
        tolerance: of the residual, relative.
        max_iterations: of a solution.
        attempts: dampings to try.

    Raises:
        InputError: a setting that cannot be used.
        UnsupportedError: no damping led to a finite solution.

    Cost: up to ``max_iterations`` Hessian-vector products over the training set per query. It knows nothing of when
    a sample was met, and training rarely ends at a minimum.
    """

    name: ClassVar[str] = "influence_function"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    tolerance: float = 1e-5
    max_iterations: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerance > 0 or self.max_iterations < 1:
            raise InputError(
                f"{self.name} with tolerance={self.tolerance}, max_iterations={self.max_iterations}; expected a "
                "positive tolerance, and 1 iteration or more"
            )

    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        def solve(damping: float) -> np.ndarray | None:
            solutions = []
            for row in rows:
                solution = self._solve(curvature, row, damping)
                if solution is None:
                    return None
                solutions.append(solution)
            return np.stack(solutions)

        return solve

    def _solve(self, curvature: Curvature, gradient: np.ndarray, damping: float) -> np.ndarray | None:
        """``(H + damping)^{-1} gradient``, or ``None``."""

        def product(vector: np.ndarray) -> np.ndarray:
            found = curvature.product(vector.ravel()) + damping * vector.ravel()
            if not found @ vector.ravel() > 0 and vector.any():
                raise _NotPositive
            return found

        size = len(gradient)
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        try:
            solution, failure = cg(operator, gradient, rtol=self.tolerance, maxiter=self.max_iterations)
        except _NotPositive:
            return None
        return None if failure else solution


class _NotPositive(Exception):
    """A direction of negative curvature was met."""
