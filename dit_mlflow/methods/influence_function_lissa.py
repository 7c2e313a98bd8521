"""Influence functions by stochastic recursion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dit_mlflow.errors import InputError
from dit_mlflow.methods.hessian import Curvature, NewtonStep, Solver, hessian_product
from dit_mlflow.methods.krylov import krylov_space

SPECTRUM_ITERATIONS = 40
"""Hessian-vector products to find the smallest and the largest eigenvalue with."""

DIVERGED = 1e3
"""Relative residual at which a recursion is given up."""


@dataclass(frozen=True)
class InfluenceFunctionLissa(NewtonStep):
    r"""Newton step of removing a sample, by LiSSA (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017,
    arXiv 1703.04730, section 3).

    .. math:: I_j = c_j \langle x, \nabla l_j \rangle, \quad
              x \leftarrow x + \frac1s \left( \nabla q - (H_B + \delta) x \right)

    with the Hessian ``H_B`` of a batch drawn anew each time, at the final model, in evaluation mode. It tends to
    ``influence_function``, whose ``H``, ``c`` and ``damping`` it shares. Sign: positive = removal raises the query.
    Where ``H + damping`` is not positive definite, or the recursion diverges or ends too far off, the damping is raised
    tenfold; the metadata hold it, and the largest relative residual.

    Attributes:
        damping: ``delta`` to begin with.
        attempts: dampings to try.
        tolerance: of the residual, relative, where the batch is the whole training set; the recursion stops there.
        noise: relative residual, by the whole Hessian, that batches drawn may leave.
        depth: steps of the recursion.
        batch_size: training samples per step, without replacement; all, if there are no more.
        repeats: recursions, whose mean is taken; one if the batch is the training set.
        scale: ``s``, more than half the largest eigenvalue of any batch; ``None`` = 1.2 times the training set's,
            found by Lanczos' iteration.
        seed: of the batches.

    Raises:
        InputError: a setting that cannot be used.
        UnsupportedError: no damping led to a solution.

    Cost: up to ``depth * repeats`` Hessian-vector products over a batch per query and damping. It needs about
    ``s / damping * log(1 / tolerance)`` steps, the square of what conjugate gradients take: of use only where a
    product over the training set is too dear.
    """

    name: ClassVar[str] = "influence_function_lissa"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    tolerance: float = 0.02
    noise: float = 0.3
    depth: int = 2000
    batch_size: int = 256
    repeats: int = 1
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.depth, self.batch_size, self.repeats) < 1 or self.seed < 0:
            raise InputError(
                f"{self.name} with depth={self.depth}, batch_size={self.batch_size}, repeats={self.repeats}, "
                f"seed={self.seed}; expected 1 or more of the first three, and a seed of 0 or more"
            )
        if not (self.tolerance > 0 and self.noise > 0 and (self.scale is None or self.scale > 0)):
            raise InputError(
                f"{self.name} with tolerance={self.tolerance}, noise={self.noise}, scale={self.scale}; expected "
                "positive numbers, or scale=None to have it found"
            )

    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        random = np.random.default_rng(self.seed)
        start = random.standard_normal((rows.shape[1],))
        space = krylov_space(curvature.product, start, SPECTRUM_ITERATIONS)
        smallest, largest = (float(space.eigen[0][k]) for k in (0, -1))

        def solve(damping: float) -> np.ndarray | None:
            if not smallest + damping > 0:
                return None
            scale = self.scale or 1.2 * (largest + damping)
            solutions = []
            for row in rows:
                solution = self._solve(curvature, row, damping, scale, random)
                if solution is None:
                    return None
                solutions.append(solution)
            return np.stack(solutions)

        return solve

    def _solve(
        self, curvature: Curvature, gradient: np.ndarray, damping: float, scale: float, random: np.random.Generator
    ) -> np.ndarray | None:
        whole = len(curvature.weights) <= self.batch_size
        found = []
        for _ in range(1 if whole else self.repeats):
            solution = self._recursion(curvature, gradient, damping, scale, None if whole else random)
            if solution is None:
                return None
            found.append(solution)
        mean = np.mean(found, axis=0)
        allowed = self.tolerance if whole else self.noise
        return mean if curvature.residual(gradient, mean, damping) <= allowed else None

    def _recursion(
        self,
        curvature: Curvature,
        gradient: np.ndarray,
        damping: float,
        scale: float,
        random: np.random.Generator | None,
    ) -> np.ndarray | None:
        """Where the recursion ends; ``None`` if it diverges. ``random`` is ``None`` if no batches are drawn."""
        norm = np.linalg.norm(gradient)
        found = gradient / scale
        size = len(curvature.weights)
        for _ in range(self.depth):
            weights = curvature.weights
            if random is not None:
                drawn = random.choice(size, self.batch_size, replace=False)
                weights = np.zeros(size)
                weights[drawn] = curvature.weights[drawn] * size / self.batch_size
            left = gradient - hessian_product(curvature.snapshot, weights, found) - damping * found
            length = np.linalg.norm(left)
            if not length <= DIVERGED * norm:
                return None
            if random is None and length <= self.tolerance * norm:
                return found
            found = found + left / scale
        return found
