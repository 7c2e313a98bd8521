"""Influence functions: the final model taken for a minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.snapshot import Snapshot, snapshots


@dataclass(frozen=True)
class InfluenceFunction(Method):
    r"""Newton step of removing a sample from a minimum (Koh and Liang 2017, arXiv 1703.04730).

    .. math:: I_j = \frac1n \langle (H + \delta)^{-1} \nabla q, \nabla l_j \rangle

    at the final model, in evaluation mode; ``H`` is the Hessian of the mean training loss (and the regularizer; not of
    an optimizer's weight decay), and the system is solved by conjugate gradients. Sign: positive = removal raises the
    query. Where ``H + damping`` is not positive definite, or the solver does not converge, the damping is raised
    tenfold until it does; the result's metadata hold the damping, and the largest relative residual.

    Attributes:
        damping: ``delta`` to begin with.
        tolerance: of the residual, relative.
        max_iterations: of a solution.
        attempts: dampings to try.

    Raises:
        UnsupportedError: no damping led to a finite solution.

    Cost: up to ``max_iterations`` Hessian-vector products over the training set per query. It knows nothing of when
    a sample was met, and training rarely ends at a minimum.
    """

    name: ClassVar[str] = "influence_function"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "query"

    damping: float = 0.01
    tolerance: float = 1e-5
    max_iterations: int = 500
    attempts: int = 6

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        ((_, snapshot),) = snapshots(replay, [question.trajectory.num_steps])
        gradients = snapshot.query_gradients(question.queries)
        rows = torch.cat([value.flatten(1) for value in gradients.values()], dim=1).double().cpu().numpy()
        for attempt in range(self.attempts):
            damping = self.damping * 10**attempt
            solutions = [self._solve(snapshot, row, damping) for row in rows]
            if all(solution is not None for solution in solutions):
                residual = max(_residual(snapshot, *pair, damping) for pair in zip(rows, solutions, strict=True))
                break
        else:
            raise UnsupportedError(
                f"the Hessian of the final model cannot be inverted with a damping up to {damping:g}; training is far "
                "from a minimum. Give a larger damping, or use dit, which needs none"
            )
        vectors = _split(snapshot, torch.from_numpy(np.stack(solutions)))  # type: ignore[arg-type]
        scores = snapshot.products(vectors) / question.workload.num_samples
        return Estimate(scores[None], details={"damping": damping, "residual": residual, "max_drift": replay.max_drift})

    def _solve(self, snapshot: Snapshot, gradient: np.ndarray, damping: float) -> np.ndarray | None:
        """``(H + damping)^{-1} gradient``, or ``None``."""

        def product(vector: np.ndarray) -> np.ndarray:
            found = hessian_product(snapshot, vector.ravel()) + damping * vector.ravel()
            if not found @ vector.ravel() > 0 and vector.any():
                raise _NotPositive
            return found

        size = len(gradient)
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        try:
            solution, failure = cg(operator, gradient, rtol=self.tolerance, maxiter=self.max_iterations)
        except _NotPositive:
            return None
        return None if failure or not np.isfinite(solution).all() else solution


def _residual(snapshot: Snapshot, gradient: np.ndarray, solution: np.ndarray | None, damping: float) -> float:
    """``|(H + damping) x - gradient| / |gradient|``; 0 without a gradient."""
    assert solution is not None
    norm = np.linalg.norm(gradient)
    left = hessian_product(snapshot, solution) + damping * solution - gradient
    return float(np.linalg.norm(left) / norm) if norm else 0.0


class _NotPositive(Exception):
    """A direction of negative curvature was met."""


def hessian_product(snapshot: Snapshot, vector: np.ndarray) -> np.ndarray:
    """``H v`` for the mean training loss and the regularizer, ``[P]``, float64."""
    dynamics = snapshot.dynamics
    direction = _split(snapshot, torch.from_numpy(vector)[None])
    inputs = list(snapshot.trained.values())
    total = [torch.zeros_like(value) for value in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        for _, losses in snapshot.batches():
            _add_product(total, losses.sum() / dynamics.workload.num_samples, inputs, direction)
        if dynamics.workload.regularizer is not None:
            value = dynamics.evaluate(snapshot.parameters, snapshot.state.buffers, dynamics.workload.regularizer)
            _add_product(total, value, inputs, direction)
    return torch.cat([part.flatten() for part in total]).double().cpu().numpy()


def _add_product(total: list[Tensor], value: Tensor, inputs: list[Tensor], direction: dict[str, Tensor]) -> None:
    gradients = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    pairs = [(g, v[0]) for g, v in zip(gradients, direction.values(), strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return
    found = torch.autograd.grad(
        [g for g, _ in pairs], inputs, [v for _, v in pairs], allow_unused=True, materialize_grads=True
    )
    for part, term in zip(total, found, strict=True):
        part += term


def _split(snapshot: Snapshot, rows: Tensor) -> dict[str, Tensor]:
    """``[rows, P]`` by parameter."""
    sizes = [value.numel() for value in snapshot.trained.values()]
    parts = zip(snapshot.trained.items(), rows.split(sizes, dim=1), strict=True)
    return {name: part.reshape(len(rows), *value.shape).to(value) for (name, value), part in parts}
