"""A model at one state of training, the gradients of single samples there, and the objective that was minimised."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence import Query, Window
from dit_mlflow.influence.query import refuse_not_finite
from dit_mlflow.replay.adjoint import grad_or_zeros, vector_jacobian
from dit_mlflow.replay.double_backward import DerivativesInside
from dit_mlflow.replay.dynamics import Parameters
from dit_mlflow.replay.not_finite import named, refuse_diverged
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory import State, StepRecord
from dit_mlflow.workload import Batch, floating_one, to_like
from dit_mlflow.workload.without_graph import without_graph

LOSSES_PER_PASS = 256
"""Training samples per forward pass."""

Vectors = dict[str, Tensor]
"""Parameter name -> ``[rows, *shape]``."""


class Snapshot:
    """A recorded state in evaluation mode; gradients are those of the parameters that training moves there.

    These are the parameters that the optimizer holds, without the frozen ones, since optimizers are often given layers
    that are not trained. (If all are frozen, all that it holds.)

    Args:
        replay: of the trajectory.
        state: ``s_t``.
        step: that led to the state, or that leaves it.
        frozen: names of parameters; default: those that had no gradient in this one step.

    Raises:
        UnsupportedError: the step climbed (``maximize=True``), so that signs would be turned.
    """

    def __init__(
        self,
        replay: Replay,
        state: State,
        step: StepRecord,
        frozen: frozenset[str] | None = None,
    ) -> None:
        refuse_ascent(step)
        self.dynamics = replay.dynamics
        self._queries = replay.right_queries(step.index, step.index + 1)
        self.state = state
        self._at = step.index
        layout = replay.trajectory.manifest.optimizer
        held = {name: state.parameters[name].detach().requires_grad_() for group in layout.groups for name in group}
        still = step.no_gradient | step.zero_gradient if frozen is None else frozen
        self.trained = {name: value for name, value in held.items() if name not in still} or held
        self.parameters = {**{name: value.detach() for name, value in state.parameters.items()}, **held}
        self._step = step
        # Known before anyone listens to the model's calls.
        self._graphs = self._graphs_in_training_alone()

    def query_gradients(self, queries: Sequence[Query]) -> Vectors:
        """``grad q`` of each query; zeros where it does not depend on a parameter.

        Raises:
            InputError: it depends on none that the optimizer holds.
        """
        rows = []
        for query in queries:
            with DerivativesInside(graphs=True):
                value = self._queries.ask(self.parameters, self.state.buffers, query)
            if not value.requires_grad:
                raise InputError(
                    f"query {query.name!r} does not depend on the trained parameters by differentiable operations; "
                    "expected a tensor computed from the model, without .item(), .detach() or no_grad()"
                )
            refuse_not_finite(query, value, self.state, self._at, self.dynamics)
            rows.append(grad_or_zeros(value, list(self.trained.values())))
        return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(self.trained)}

    def losses(self) -> np.ndarray:
        """Loss of every training sample, ``[n]``."""

        def losses() -> np.ndarray:
            return np.concatenate([losses.detach().double().cpu().numpy() for _, losses in self.batches()])

        return without_graph(losses)

    def products(self, vectors: Vectors) -> np.ndarray:
        """``<grad l_i, v>`` for every row ``v`` and training sample, ``[rows, n]``; parameters left out count as 0.

        It is ``d <g, v> / d u_i`` of ``g(u) = sum_i u_i grad l_i``, so that no single gradient is formed. Cost: a
        forward and a backward pass of the training set, and one more backward pass for each row.
        """
        inputs = [value for name, value in self.trained.items() if name in vectors]
        cotangents = [vectors[name] for name in self.trained if name in vectors]
        rows = len(cotangents[0])
        parts = []
        for indices, losses in self.batches():
            weights = torch.ones_like(losses, requires_grad=True)
            gradients = torch.autograd.grad(losses, inputs, weights, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(gradients, cotangents, strict=True) if g is not None]
            (found,) = vector_jacobian([g for g, _ in pairs], [weights], [v for _, v in pairs], rows, batched=False)
            self._refuse(~found.isfinite().all(dim=0), indices, "have gradients that are not finite")
            parts.append(found.double().cpu().numpy())
        return np.concatenate(parts, axis=1)

    def combinations(self, coefficients: np.ndarray, names: Sequence[str]) -> Vectors:
        """``sum_i c_i grad l_i`` of some parameters, for every row of ``coefficients`` ``[rows, n]``.

        Cost: a forward pass of the training set, and a backward pass for each row.
        """
        inputs = [self.trained[name] for name in names]
        total = [torch.zeros((len(coefficients), *value.shape)).to(value) for value in inputs]
        for indices, losses in self.batches():
            weights = torch.from_numpy(coefficients[:, indices]).to(losses)
            for part, found in zip(
                total, vector_jacobian([losses], inputs, [weights], len(weights), batched=False), strict=True
            ):
                part += found
        return dict(zip(names, total, strict=True))

    def batches(self, samples: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Indices and losses ``[B]`` of some training samples (default: all), part by part."""
        chosen = np.arange(self.dynamics.workload.num_samples) if samples is None else samples
        parts = -(-len(chosen) // LOSSES_PER_PASS)
        for indices in np.array_split(chosen, parts) if parts else ():
            loss = partial(self.dynamics.workload.sample_losses, batch=self.batch(indices), size=len(indices))
            losses = self.evaluate(loss, self.parameters)
            self._refuse(~losses.detach().isfinite(), indices, "have losses that are not finite")
            yield indices, losses

    def _refuse(self, wrong: Tensor, indices: np.ndarray, what: str) -> None:
        if bool(wrong.any()):
            refuse_diverged(self.state, self._at)
            raise UnsupportedError(
                f"training {named(indices[wrong.cpu().numpy()])} {what} at the state that step {self._at} leads to or "
                "leaves. Look for NaN and infinity in their data, and for a root, a norm or a standard deviation at 0 "
                "in the loss; leave_one_out takes no derivative"
            )

    def batch(self, indices: np.ndarray) -> Batch:
        """Training samples as the model takes them, the same every time."""
        like = floating_one(self.parameters.values())
        workload = self.dynamics.workload
        return to_like(workload.unvarying(workload.train_set, indices), like.device, like.dtype)

    def evaluate(self, function: Callable[[nn.Module], Tensor], parameters: Parameters) -> Tensor:
        """``function`` of the model with ``parameters``, by attention that can be differentiated twice."""
        graphs = DerivativesInside(graphs=True) if self._graphs else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), graphs:
            return self.dynamics.evaluate(parameters, self.state.buffers, function)

    def _graphs_in_training_alone(self) -> bool:
        """Whether the loss takes derivatives of its own (forces), and their graph in training mode only.

        Without it, a part of the gradient that training followed is missing in evaluation mode.
        """
        dynamics, some = self.dynamics, np.arange(min(2, self.dynamics.workload.num_samples))
        batch = self.batch(some)
        buffers = {name: value.clone() for name, value in self.state.buffers.items()}

        def loss(model: nn.Module) -> Tensor:
            return dynamics.workload.sample_losses(model, batch, len(some))

        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), DerivativesInside() as evaluating:
            dynamics.evaluate(self.parameters, buffers, loss)
        if not evaluating.without_graph:
            return False
        dynamics.set_modes(self._step)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), DerivativesInside() as training, dynamics.as_recorded():
            dynamics.call(self.parameters, buffers, loss)
        return training.with_graph and not training.without_graph


def snapshots(replay: Replay, steps: Sequence[int]) -> Iterator[tuple[int, Snapshot]]:
    """``(t, snapshot of s_t)`` for each of ``steps``, in order, each once. Cost: replay from the first to the last."""
    wanted = set(steps)
    for t, state in enumerate(replay.forward(min(wanted), max(wanted)), start=min(wanted)):
        if t in wanted:
            yield t, snapshot_at(replay, state, replay.trajectory.step(max(t - 1, 0)))


def snapshot_at(replay: Replay, state: State, step: StepRecord) -> Snapshot:
    """The snapshot of a state; a parameter is frozen if no step of ``step``'s epoch gave it a gradient.

    In a single step, it may only not have been used (an expert, one head of several).
    """
    trajectory = replay.trajectory
    ends = (0, *trajectory.epoch_ends)
    epoch = bisect_right(ends, step.index)
    frozen = step.no_gradient | step.zero_gradient
    for t in range(ends[epoch - 1], ends[epoch]):
        if not frozen:
            break
        other = trajectory.step(t)
        frozen &= other.no_gradient | other.zero_gradient
    return Snapshot(replay, state, step, frozen)


def inner(a: Vectors, b: Vectors) -> Tensor:
    """``<a, b>`` row by row, ``[rows]``."""
    return torch.stack([(a[name] * b[name]).reshape(len(a[name]), -1).sum(dim=1) for name in a]).sum(dim=0)


def refuse_ascent(step: StepRecord) -> None:
    """Raise :class:`UnsupportedError` for a step uphill."""
    if any(settings.get("maximize") for settings in step.hyperparameters):
        raise UnsupportedError(
            "the training climbed (maximize=True), and this method follows the descent of a loss. Use dit, or train on "
            "the loss with its sign turned"
        )


def mean_coefficients(replay: Replay, steps: Window) -> np.ndarray:
    """Mean weights ``c_j`` of the samples in the objective over some steps, ``[n]``.

    ``1 / n`` for the mean loss and whole epochs; class weights, sums and samplers change them.

    Raises:
        UnsupportedError: some are not finite.
    """
    found = np.mean(
        [replay.dynamics.coefficients(replay.trajectory.step(t)) for t in range(steps.start, steps.end)], axis=0
    )
    if not np.isfinite(found).all():
        raise UnsupportedError(
            f"coefficients of {named(np.flatnonzero(~np.isfinite(found)))} in the loss are not finite; look for a "
            "division by 0 in Workload.coefficients"
        )
    return found


def shares(replay: Replay) -> np.ndarray:
    """The mean coefficients over all of training, ``[n]``, scaled to a sum of 1, for rankings.

    Raises:
        UnsupportedError: some are negative, or all 0.
    """
    found = mean_coefficients(replay, Window(0, replay.trajectory.num_steps))
    if found.min() < 0 or not found.any():
        raise UnsupportedError(
            f"the samples' coefficients in the loss are {found.min():g} to {found.max():g}; this method takes them for "
            "weights, and needs them 0 or more. Use influence_function or dit"
        )
    return found / found.sum()
