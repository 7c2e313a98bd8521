"""Products with the Hessian of the training loss at a recorded state, and Newton steps by way of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.window import Window
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.objective import mean_coefficients
from dit_mlflow.methods.snapshot import Snapshot, Vectors, snapshots
from dit_mlflow.replay.adjoint import grad_or_zeros

Solver = Callable[[float], np.ndarray | None]
"""``damping -> (H + damping)^{-1}`` of some rows, ``[rows, P]``; ``None`` = it cannot be had."""


@dataclass(frozen=True)
class NewtonStep(Method):
    r"""Methods that take the Newton step of removing a sample from a minimum, and differ in how they solve for it.

    .. math:: I_j = c_j \langle (H + \delta)^{-1} \nabla q, \nabla l_j \rangle

    at the final model, in evaluation mode; ``H`` is the Hessian of ``sum_i c_i l_i`` (and the regularizer; not of an
    optimizer's weight decay), with the samples' mean coefficients over training: ``1 / n`` for a mean loss. Where the
    system cannot be solved, the damping is raised tenfold until it can; the result's metadata hold the damping, and the
    largest relative residual ``|(H + delta) x - grad q| / |grad q|``.

    Attributes:
        damping: ``delta`` to begin with.
        attempts: dampings to try.

    Raises:
        InputError: a damping that is not positive, or no attempts.
        UnsupportedError: no damping led to a finite solution.
    """

    damping: float = 0.01
    attempts: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.damping < np.inf or self.attempts < 1:
            raise InputError(
                f"{self.name} with damping={self.damping}, attempts={self.attempts}; expected a positive damping, and "
                "1 attempt or more"
            )

    @abstractmethod
    def _solver(self, curvature: Curvature, rows: np.ndarray) -> Solver:
        """Of the systems with the right-hand sides ``rows``, ``[rows, P]``."""

    def estimate(self, question: Question) -> Estimate:
        replay, steps = question.trajectory.replay(question.workload), question.trajectory.num_steps
        ((_, snapshot),) = snapshots(replay, [steps])
        curvature = Curvature(snapshot, mean_coefficients(replay, Window(0, steps)))
        rows = flattened(snapshot.query_gradients(question.queries))
        solve = self._solver(curvature, rows)
        for attempt in range(self.attempts):
            damping = self.damping * 10**attempt
            solutions = solve(damping)
            if solutions is not None and np.isfinite(solutions).all():
                break
        else:
            raise UnsupportedError(
                f"the Hessian of the final model cannot be inverted with a damping up to {damping:g}; training is far "
                "from a minimum. Give a larger damping, or use dit, which needs none"
            )
        residual = max(curvature.residual(*pair, damping) for pair in zip(rows, solutions, strict=True))
        scores = curvature.weights * snapshot.products(by_parameter(snapshot, solutions))
        return Estimate(scores[None], details={"damping": damping, "residual": residual, "max_drift": replay.max_drift})


@dataclass(frozen=True, eq=False)
class Curvature:
    """The Hessian ``H`` of ``sum_i c_i l_i`` and the regularizer.

    Attributes:
        snapshot: where.
        weights: ``c``, ``[n]``.
    """

    snapshot: Snapshot
    weights: np.ndarray

    def product(self, vector: np.ndarray) -> np.ndarray:
        """``H v``, ``[P]``; see :func:`hessian_product`."""
        return hessian_product(self.snapshot, self.weights, vector)

    def residual(self, gradient: np.ndarray, solution: np.ndarray, damping: float) -> float:
        """``|(H + damping) x - gradient| / |gradient|``; 0 without a gradient."""
        norm = np.linalg.norm(gradient)
        left = self.product(solution) + damping * solution - gradient
        return float(np.linalg.norm(left) / norm) if norm else 0.0


def hessian_product(snapshot: Snapshot, weights: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """``H v``, ``[P]``, float64, for ``sum_i weights_i l_i`` and the regularizer.

    Args:
        weights: ``[n]``. Samples with weight 0 cost nothing.
        vector: ``v``, ``[P]``.

    Raises:
        UnsupportedError: it is not finite.
    """
    dynamics = snapshot.dynamics
    direction = by_parameter(snapshot, vector[None])
    inputs = list(snapshot.trained.values())
    total = [torch.zeros_like(value) for value in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        for indices, losses in snapshot.batches(np.flatnonzero(weights)):
            _add_product(total, losses @ torch.from_numpy(weights[indices]).to(losses), inputs, direction)
        if dynamics.workload.regularizer is not None:
            value = dynamics.evaluate(snapshot.parameters, snapshot.state.buffers, dynamics.workload.regularizer)
            _add_product(total, value, inputs, direction)
    found = torch.cat([part.flatten() for part in total]).double().cpu().numpy()
    if not np.isfinite(found).all():
        raise UnsupportedError(
            "a product with the Hessian of the training loss is not finite: the loss has no second derivative at a "
            "state that this method looks at, or training diverged. Use a method without Hessians (tracin, grad_dot), "
            "or leave_one_out"
        )
    return found


def _add_product(total: list[Tensor], value: Tensor, inputs: list[Tensor], direction: Vectors) -> None:
    first = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    pairs = [(g, v[0]) for g, v in zip(first, direction.values(), strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return
    for part, term in zip(total, grad_or_zeros([g for g, _ in pairs], inputs, [v for _, v in pairs]), strict=True):
        part += term


def flattened(vectors: Vectors) -> np.ndarray:
    """``[rows, P]``, float64."""
    return torch.cat([value.flatten(1) for value in vectors.values()], dim=1).double().cpu().numpy()


def by_parameter(snapshot: Snapshot, rows: np.ndarray) -> Vectors:
    """``[rows, P]`` by parameter."""
    sizes = [value.numel() for value in snapshot.trained.values()]
    parts = zip(snapshot.trained.items(), torch.from_numpy(rows).split(sizes, dim=1), strict=True)
    return {name: part.reshape(len(rows), *value.shape).to(value) for (name, value), part in parts}
