"""A model at one state of training, and the gradients of single samples there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.influence import Query
from dit_mlflow.influence.adjoint import vector_jacobian
from dit_mlflow.trajectory import State, to_like
from dit_mlflow.trajectory.dynamics import Dynamics
from dit_mlflow.trajectory.manifest import OptimizerLayout
from dit_mlflow.trajectory.replay import Replay

CHUNK = 256
"""Training samples per forward pass."""

Vectors = dict[str, Tensor]
"""Parameter name -> ``[rows, *shape]``."""


class Snapshot:
    """A recorded state in evaluation mode; gradients are those of the parameters that the optimizer holds.

    Args:
        dynamics: of the trajectory.
        layout: of its optimizer.
        state: ``s_t``.
    """

    def __init__(self, dynamics: Dynamics, layout: OptimizerLayout, state: State) -> None:
        self.dynamics = dynamics
        self.state = state
        held = [name for group in layout.groups for name in group]
        self.trained = {name: state.parameters[name].detach().requires_grad_() for name in held}
        self._parameters = {**{name: value.detach() for name, value in state.parameters.items()}, **self.trained}

    def query_gradients(self, queries: Sequence[Query]) -> Vectors:
        """``grad q`` of each query; zeros where it does not depend on a parameter."""
        rows = []
        for query in queries:
            value = self.dynamics.evaluate(self._parameters, self.state.buffers, query)
            found = torch.autograd.grad(value, list(self.trained.values()), allow_unused=True, materialize_grads=True)
            rows.append(found)
        return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(self.trained)}

    def losses(self) -> np.ndarray:
        """Loss of every training sample, ``[n]``."""
        with torch.no_grad():
            return np.concatenate([losses.double().cpu().numpy() for _, losses in self.batches()])

    def products(self, vectors: Vectors) -> np.ndarray:
        """``<grad l_i, v>`` for every row ``v`` and training sample, ``[rows, n]``.

        No gradient of a single sample is formed: with ``g(u) = sum_i u_i grad l_i``, it is ``d <g, v> / d u_i``. Cost:
        a forward and a backward pass of the training set, and one more backward pass for each row.
        """
        cotangents = [vectors[name] for name in self.trained]
        rows = len(cotangents[0])
        parts = []
        for _, losses in self.batches():
            weights = torch.ones_like(losses, requires_grad=True)
            gradients = torch.autograd.grad(
                losses, list(self.trained.values()), weights, create_graph=True, allow_unused=True
            )
            pairs = [(g, v) for g, v in zip(gradients, cotangents, strict=True) if g is not None]
            (found,) = vector_jacobian([g for g, _ in pairs], [weights], [v for _, v in pairs], rows, batched=False)
            parts.append(found.double().cpu().numpy())
        return np.concatenate(parts, axis=1)

    def norms(self) -> np.ndarray:
        """``|grad l_i|`` of every training sample, ``[n]``. Cost: a backward pass for each."""
        norms = []
        for _, losses in self.batches():
            for loss in losses:
                found = torch.autograd.grad(loss, list(self.trained.values()), retain_graph=True, allow_unused=True)
                norms.append(np.sqrt(sum(float(part.double().square().sum()) for part in found if part is not None)))
        return np.array(norms)

    def batches(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Indices and losses ``[B]`` of the training set, part by part."""
        workload = self.dynamics.workload
        like = next(iter(self._parameters.values()))
        for indices in np.array_split(np.arange(workload.num_samples), -(-workload.num_samples // CHUNK)):
            batch = to_like(workload.batch(indices), like.device, like.dtype)
            loss = partial(workload.sample_losses, batch=batch, size=len(indices))
            with sdpa_kernel(SDPBackend.MATH):
                yield indices, self.dynamics.evaluate(self._parameters, self.state.buffers, loss)


def snapshots(replay: Replay, steps: Sequence[int]) -> Iterator[tuple[int, Snapshot]]:
    """``(t, snapshot of s_t)`` for each of ``steps``, in order, each once. Cost: replay from the first to the last."""
    wanted = set(steps)
    for t, state in enumerate(replay.forward(min(wanted), max(wanted)), start=min(wanted)):
        if t in wanted:
            yield t, Snapshot(replay.dynamics, replay.trajectory.manifest.optimizer, state)


def inner(a: Vectors, b: Vectors) -> Tensor:
    """``<a, b>`` row by row, ``[rows]``."""
    return torch.stack([(a[name] * b[name]).flatten(1).sum(dim=1) for name in a]).sum(dim=0)
