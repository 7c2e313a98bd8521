"""Products with the Hessian of the training loss at a recorded state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.methods.snapshot import Snapshot, Vectors
from dit_mlflow.replay.adjoint import grad_or_zeros


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
        """``H v``, ``[P]``, float64. Samples with weight 0 cost nothing.

        Raises:
            UnsupportedError: it is not finite.
        """
        dynamics = self.snapshot.dynamics
        direction = by_parameter(self.snapshot, vector[None])
        inputs = list(self.snapshot.trained.values())
        total = [torch.zeros_like(value) for value in inputs]
        with sdpa_kernel(SDPBackend.MATH):
            for indices, losses in self.snapshot.batches(np.flatnonzero(self.weights)):
                _add_product(total, losses @ torch.from_numpy(self.weights[indices]).to(losses), inputs, direction)
            if (regularizer := dynamics.workload.regularizer) is not None:
                value = dynamics.evaluate(self.snapshot.parameters, self.snapshot.state.buffers, regularizer)
                _add_product(total, value, inputs, direction)
        found = torch.cat([part.flatten() for part in total]).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise UnsupportedError(
                "a product with the Hessian of the training loss is not finite: the loss has no second derivative at a "
                "state that this method looks at, or training diverged. Use a method without Hessians (tracin, "
                "grad_dot), or leave_one_out"
            )
        return found

    def residual(self, gradient: np.ndarray, solution: np.ndarray, damping: float) -> float:
        """``|(H + damping) x - gradient| / |gradient|``; 0 without a gradient."""
        norm = np.linalg.norm(gradient)
        left = self.product(solution) + damping * solution - gradient
        return float(np.linalg.norm(left) / norm) if norm else 0.0


def _add_product(total: list[Tensor], value: Tensor, inputs: list[Tensor], direction: Vectors) -> None:
    first = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    pairs = [(g, v[0]) for g, v in zip(first, direction.values(), strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return
    for part, term in zip(total, grad_or_zeros([g for g, _ in pairs], inputs, [v for _, v in pairs]), strict=True):
        part += term


def flattened(vectors: Vectors) -> np.ndarray:
    """``[rows, P]``, float64."""
    return torch.cat([value.reshape(len(value), -1) for value in vectors.values()], dim=1).double().cpu().numpy()


def by_parameter(snapshot: Snapshot, rows: np.ndarray) -> Vectors:
    """``[rows, P]`` by parameter."""
    sizes = [value.numel() for value in snapshot.trained.values()]
    parts = zip(snapshot.trained.items(), torch.from_numpy(rows).split(sizes, dim=1), strict=True)
    return {name: part.reshape(len(rows), *value.shape).to(value) for (name, value), part in parts}
