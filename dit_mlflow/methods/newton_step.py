"""Influence functions: the final model taken for a minimum, and the Newton step of removing a sample from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.window import Window
from dit_mlflow.methods.hessian import Curvature, by_parameter, flattened
from dit_mlflow.methods.krylov import krylov_space
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.snapshot import mean_coefficients, snapshots
from dit_mlflow.workload.batches import floating_one

SPECTRUM_ITERATIONS = 40
"""Hessian-vector products to find the smallest and the largest eigenvalue with."""

DIVERGED = 1e3
"""Relative residual at which a recursion is given up."""

Solver = Callable[[np.ndarray, float], np.ndarray]
"""``(gradient [P], damping) -> (H + damping)^{-1} gradient``; raises :class:`NoSolutionError` where it finds none."""


class NoSolutionError(Exception):
    """The system cannot be solved with this damping."""


@dataclass(frozen=True)
class NewtonStep(Method):
    r"""Newton step of removing a sample from a minimum; subclasses differ in how they solve for it.

    .. math:: I_j = c_j \langle (H + \delta)^{-1} \nabla q, \nabla l_j \rangle

    at the final model, in evaluation mode; ``H`` is the Hessian of ``sum_i c_i l_i`` (and the regularizer; not of an
    optimizer's weight decay), with the samples' mean coefficients over training: ``1 / n`` for a mean loss. Sign:
    positive = removal raises the query. If the system cannot be solved, or ``H + damping`` is not positive definite,
    the damping is raised tenfold until it can; the result's metadata hold the damping, and the largest relative
    residual ``|(H + delta) x - grad q| / |grad q|``. It knows nothing of when a sample was met, and training rarely
    ends at a minimum.

    Attributes:
        damping: ``delta`` to begin with.
        attempts: dampings to try.

    Raises:
        InputError: a setting that cannot be used.
        UnsupportedError: no damping led to a finite solution.
    """

    measures = "query"
    follows_a_loss = True

    damping: float = 0.01
    attempts: int = 6

    def __post_init__(self) -> None:
        allowed = 0 < self.damping < np.inf and self.attempts >= 1
        self._expect("a positive damping, and 1 attempt or more", allowed, "damping", "attempts")

    @abstractmethod
    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        """The solver for the right-hand sides ``rows``, ``[rows, P]``."""

    def estimate(self, question: Question) -> Estimate:
        replay, steps = question.trajectory.replay(question.workload), question.trajectory.num_steps
        ((_, snapshot),) = snapshots(replay, [steps])
        curvature = Curvature(snapshot, mean_coefficients(replay, Window(0, steps)))
        rows = flattened(snapshot.query_gradients(question.queries))
        solve = self._solver(curvature, rows)
        for attempt in range(self.attempts):
            damping = self.damping * 10**attempt
            try:
                solutions = np.stack([solve(row, damping) for row in rows])
            except NoSolutionError:
                continue
            if np.isfinite(solutions).all():
                break
        else:
            raise UnsupportedError(
                f"the Hessian of the final model cannot be inverted with a damping up to {damping:g}; training is far "
                "from a minimum. Give a larger damping, or use dit, which needs none"
            )
        residual = max(curvature.residual(*pair, damping) for pair in zip(rows, solutions, strict=True))
        scores = curvature.weights * snapshot.products(by_parameter(snapshot, solutions))
        return Estimate(scores[None], details={"damping": damping, "residual": residual, "max_drift": replay.max_drift})


@dataclass(frozen=True)
class InfluenceFunction(NewtonStep):
    """:class:`NewtonStep` by conjugate gradients (Koh and Liang 2017, arXiv 1703.04730).

    Attributes:
        damping, attempts: see there.
        tolerance: of the residual, relative.
        max_iterations: of a solution.

    Cost: up to ``max_iterations`` Hessian-vector products over the training set per query.
    """

    name = "influence_function"

    tolerance: float = 1e-5
    max_iterations: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = self.tolerance > 0 and self.max_iterations >= 1
        self._expect("a positive tolerance, and 1 iteration or more", allowed, "tolerance", "max_iterations")

    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        def solve(gradient: np.ndarray, damping: float) -> np.ndarray:
            def product(vector: np.ndarray) -> np.ndarray:
                found = curvature.product(vector.ravel()) + damping * vector.ravel()
                if not found @ vector.ravel() > 0 and vector.any():
                    raise NoSolutionError
                return found

            size = len(gradient)
            operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
            solution, failure = cg(operator, gradient, rtol=self.tolerance, maxiter=self.max_iterations)
            if failure:
                raise NoSolutionError
            return solution

        return solve


@dataclass(frozen=True)
class InfluenceFunctionLissa(NewtonStep):
    r""":class:`NewtonStep` by LiSSA (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017, section 3).

    .. math:: I_j = c_j \langle x, \nabla l_j \rangle, \quad
              x \leftarrow x + \frac1s \left( \nabla q - (H_B + \delta) x \right)

    with the Hessian ``H_B`` of a batch drawn anew each time; it tends to ``influence_function``. The damping is
    also raised if the recursion diverges or ends too far off.

    Attributes:
        damping, attempts: see there.
        tolerance: of the relative residual, if the batch is the whole training set; the recursion stops there.
        noise: relative residual, by the whole Hessian, that batches drawn may leave.
        depth: steps of the recursion.
        batch_size: training samples per step, without replacement; all, if there are no more.
        repeats: recursions, whose mean is taken; one if the batch is the training set.
        scale: ``s``, more than half the largest eigenvalue of any batch; ``None`` = 1.2 times the training set's,
            found by Lanczos' iteration.
        seed: of the batches.

    Cost: up to ``depth * repeats`` Hessian-vector products over a batch per query and damping. It needs about
    ``s / damping * log(1 / tolerance)`` steps, the square of what conjugate gradients take: of use only where a
    product over the training set is too dear.
    """

    name = "influence_function_lissa"

    tolerance: float = 0.02
    noise: float = 0.3
    depth: int = 2000
    batch_size: int = 256
    repeats: int = 1
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "1 or more of the first three, and a seed of 0 or more"
        allowed = min(self.depth, self.batch_size, self.repeats) >= 1 and self.seed >= 0
        self._expect(expected, allowed, "depth", "batch_size", "repeats", "seed")
        allowed = self.tolerance > 0 and self.noise > 0 and (self.scale is None or self.scale > 0)
        self._expect("positive numbers, or scale=None to have it found", allowed, "tolerance", "noise", "scale")

    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        random = np.random.default_rng(self.seed)
        space = krylov_space(curvature.product, random.standard_normal((rows.shape[1],)), SPECTRUM_ITERATIONS)
        smallest, largest = (float(space.eigen[0][k]) for k in (0, -1))
        whole = len(curvature.weights) <= self.batch_size
        recursions, allowed = (1, self.tolerance) if whole else (self.repeats, self.noise)

        def solve(gradient: np.ndarray, damping: float) -> np.ndarray:
            if not smallest + damping > 0:
                raise NoSolutionError
            scale = self.scale or 1.2 * (largest + damping)
            ends = [self._recursion(curvature, gradient, damping, scale, random) for _ in range(recursions)]
            mean = np.mean(ends, axis=0)
            if not curvature.residual(gradient, mean, damping) <= allowed:
                raise NoSolutionError
            return mean

        return solve

    def _recursion(
        self, curvature: Curvature, gradient: np.ndarray, damping: float, scale: float, random: np.random.Generator
    ) -> np.ndarray:
        norm = np.linalg.norm(gradient)
        found = gradient / scale
        weights, size = curvature.weights, len(curvature.weights)
        for _ in range(self.depth):
            if size > self.batch_size:
                drawn = random.choice(size, self.batch_size, replace=False)
                weights = np.zeros(size)
                weights[drawn] = curvature.weights[drawn] * size / self.batch_size
            left = gradient - Curvature(curvature.snapshot, weights).product(found) - damping * found
            length = np.linalg.norm(left)
            if not length <= DIVERGED * norm:
                raise NoSolutionError
            if size <= self.batch_size and length <= self.tolerance * norm:
                break
            found = found + left / scale
        return found


@dataclass(frozen=True)
class InfluenceFunctionArnoldi(NewtonStep):
    r""":class:`NewtonStep` in the Hessian's leading eigenvectors alone (Schioppa et al. 2022, arXiv 2112.03052).

    .. math:: I_j = c_j \sum_k \frac{\langle \nabla q, u_k \rangle \langle u_k, \nabla l_j \rangle}
              {\sigma_k + \delta}

    where ``u_k`` and ``sigma_k`` are the eigenvectors and eigenvalues of largest size that the Hessian has in a Krylov
    space, begun at random; what lies outside their span counts as 0. With all of them it is ``influence_function``.
    The damping is raised until every ``sigma_k + damping`` is positive; the part of ``grad q`` outside the span makes
    the residual large.

    Attributes:
        damping, attempts: see there.
        iterations: dimension of the Krylov space.
        rank: eigenvectors kept.
        seed: of the vector to begin with.

    Raises:
        UnsupportedError: no damping is enough, or the Hessian is 0 or not finite.

    Cost: ``iterations`` Hessian-vector products over the training set, whatever the number of queries, and as many
    vectors of the model's size (8 bytes a parameter) in memory. It fails where small eigenvalues matter: they are what
    the space finds last, and what an inverse weighs most.
    """

    name = "influence_function_arnoldi"

    iterations: int = 200
    rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "1 or more of the first two, and a seed of 0 or more"
        self._expect(expected, min(self.iterations, self.rank) >= 1 and self.seed >= 0, "iterations", "rank", "seed")

    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        start = np.random.default_rng(self.seed).standard_normal((rows.shape[1],))
        space = krylov_space(curvature.product, start, self.iterations)
        values, vectors = space.eigen
        # Below rounding, an eigenvalue is 0 and its vector arbitrary.
        rounding = np.abs(values).max() * torch.finfo(floating_one(curvature.snapshot.trained.values()).dtype).eps
        kept = [k for k in np.argsort(-np.abs(values), kind="stable")[: self.rank] if np.abs(values[k]) > rounding]
        if not kept:
            raise UnsupportedError(
                "the Hessian of the final model is 0, so that influence_function_arnoldi has no eigenvectors to work "
                "with: the loss is linear in the parameters there. Use dit, which needs no inverse"
            )
        values, leading = values[kept], vectors[:, kept].T @ np.stack(space.vectors)

        def solve(gradient: np.ndarray, damping: float) -> np.ndarray:
            if not (values + damping > 0).all():
                raise NoSolutionError
            return (leading @ gradient / (values + damping)) @ leading

        return solve
