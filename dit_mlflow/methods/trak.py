"""TRAK: a linearised model with randomly projected gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow.errors import UnsupportedError, WorkloadError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.last_layer import training_labels
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.sample_gradients import Output, sample_gradients
from dit_mlflow.methods.snapshot import Snapshot, shares, snapshot_at
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.trajectory import State
from dit_mlflow.workload import Batch, Workload

LARGEST_PROJECTION = 2048
"""Projected dimensions by default, at most."""

BLOCK = 2**24
"""Elements of the projection matrix in memory at once."""


@dataclass(frozen=True)
class Trak(Method):
    r"""Newton step of removing a sample in a linear model of the network (Park et al. 2023, arXiv 2303.14186).

    .. math:: I_j = -\frac{w_j}{M} \sum_m \langle (\Phi^T W \Phi + \delta)^{-1} R^T \nabla q, \phi_j \rangle \cdot
        \frac1M \sum_m Q_j, \qquad \phi_j = R^T \nabla f_j, \quad Q_j = - \frac{\partial l_j}{\partial f_j}

    over ``M`` pairs of a stored checkpoint and a random projection ``R``, in evaluation mode; ``w_j`` are the samples'
    mean coefficients over training, 1 on average (and 1 each for a mean loss). For a classification
    ``f_j = log(p / (1 - p))`` of the sample's own class and ``Q_j = 1 - p`` (section 3.2; its last step, setting small
    scores to 0, is left out). For any other training ``f_j = -l_j`` and ``Q_j = 1``. Sign: positive = removal raises
    the query, which may be any, not only the ``f`` of a sample. A ranking: projection and damping shrink the scores.

    The paper averages over models trained anew on halves of the data; here, checkpoints of one training take their
    place, and share its peculiarities. The authors' library (traker) is not used: it scores test *samples* through a
    class written for each task, where a query here is any scalar of the model, needs batches that ``vmap`` takes,
    writes its features to disk, and scales each checkpoint's kernel separately. Without projection and damping, both
    give the same numbers but for that scale.

    Attributes:
        dim: projected dimensions ``k``; default: a quarter of the training samples, 2048 at most, since the kernel of
            ``n`` samples cannot be inverted in more than ``n`` dimensions without damping. There is no projection if
            ``k`` is the number of parameters or more.
        checkpoints: to average over: the last ones stored, ``s_T`` among them.
        projections: of each checkpoint.
        damping: ``delta``, as a share of the kernel's mean eigenvalue; with 0, the pseudoinverse is taken.
        output: ``f``: ``margin`` = the log-odds, ``loss``; default: ``margin`` where the labels are classes.
        seed: of the projections.

    Raises:
        UnsupportedError: log-odds are asked of what is no classification, or a gradient is not finite.

    Cost, for each checkpoint: the gradient of every sample (one pass each, side by side where the model allows it), ``n
    P k`` multiplications for each projection, an eigendecomposition of ``k x k``, and a backward pass per query. It
    knows nothing of when a sample was met nor of a regularizer's curvature, and fails where the model is far from
    linear in its parameters over the removal.
    """

    name = "trak"

    dim: int | None = None
    checkpoints: int = 3
    projections: int = 2
    damping: float = 0.1
    output: Literal["margin", "loss"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = 1 if self.dim is None else self.dim, self.checkpoints, self.projections
        expected = "1 or more of each, and a damping of 0 or more"
        allowed = min(counts) >= 1 and self.damping >= 0
        self._expect(expected, allowed, "dim", "checkpoints", "projections", "damping")
        self._expect("'margin', 'loss', or None to choose by labels", self.output in (None, "margin", "loss"), "output")

    def estimate(self, question: Question) -> Estimate:
        trajectory = question.trajectory
        replay = trajectory.replay(question.workload)
        dim = self.dim or min(LARGEST_PROJECTION, max(1, question.workload.num_samples // 4))
        steps = trajectory.checkpoint_steps[-self.checkpoints :]
        labels = self._labels(replay.dynamics, replay.checkpoint(steps[-1]))
        output = partial(_log_odds if labels is not None else _minus_loss, question.workload)
        given = torch.zeros(question.workload.num_samples) if labels is None else labels
        weights = torch.from_numpy(shares(replay)) * question.workload.num_samples
        size, inner, pulls = 0, [], []
        for t in steps:
            snapshot = snapshot_at(replay, replay.checkpoint(t), trajectory.step(max(t - 1, 0)))
            gradients = snapshot.query_gradients(question.queries)
            asked = torch.cat([rows.reshape(len(rows), -1) for rows in gradients.values()], dim=1)
            size = asked.shape[1]
            every = [RandomProjection(size, dim, (self.seed, t, k)) for k in range(self.projections)]
            values, features = _features(snapshot, output, given, every)
            pulls.append(torch.sigmoid(-values) if labels is not None else torch.ones_like(values))
            for project, phi in zip(every, features, strict=True):
                inner.append(_solved(phi, weights.to(phi.device), project(asked), self.damping))
        scores = -torch.stack(inner).mean(dim=0) * torch.stack(pulls).mean(dim=0)
        details: dict[str, Any] = {
            "dim": min(dim, size),
            "checkpoints": list(steps),
            "projections": self.projections,
            "damping": self.damping,
            "output": "loss" if labels is None else "margin",
        }
        return Estimate(scores.cpu().numpy()[None], details=details)

    def _labels(self, dynamics: Dynamics, state: State) -> Tensor | None:
        """Class of every training sample, ``[n]``; ``None`` for the loss as output."""
        if self.output == "loss":
            return None
        try:
            return training_labels(dynamics, state)
        except (UnsupportedError, WorkloadError):
            if self.output == "margin":
                raise
            return None


@dataclass(frozen=True)
class RandomProjection:
    """Multiplication by ``R``, ``[P, k]``, of independent ``+-1 / sqrt(k)``: inner products survive on average.

    Attributes:
        size: ``P``.
        dim: ``k``; if it is ``P`` or more, vectors stay as they are.
        seed: numbers that choose ``R``; the same on every device.
    """

    size: int
    dim: int
    seed: Sequence[int]

    def __call__(self, rows: Tensor) -> Tensor:
        """``[B, P] -> [B, min(k, P)]``, float64. Cost: ``B P k``, and ``P k`` random signs for each call."""
        if self.dim >= self.size:
            return rows.double()
        total = rows.new_zeros(len(rows), self.dim, dtype=torch.float64)
        columns = max(1, BLOCK // self.dim)
        for block, part in enumerate(rows.split(columns, dim=1)):
            (seed,) = np.random.SeedSequence([*self.seed, block]).generate_state(1)
            generator = torch.Generator().manual_seed(int(seed))
            signs = torch.randint(0, 2, (part.shape[1], self.dim), generator=generator, dtype=torch.int8)
            total += (part @ (2 * signs - 1).to(part)).double()
        return total / self.dim**0.5


def _log_odds(workload: Workload, model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of each sample's own class, ``[B]``."""
    logits = workload.class_logits(model, batch, len(labels))
    own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return (logits * own).sum(dim=1) - logits.masked_fill(own, -torch.inf).logsumexp(dim=1)


def _minus_loss(workload: Workload, model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
    return -workload.sample_losses(model, batch, len(labels))


def _features(
    snapshot: Snapshot, output: Output, labels: Tensor, projections: Sequence[RandomProjection]
) -> tuple[Tensor, list[Tensor]]:
    """``f`` of every training sample, ``[n]``, and ``phi`` under each projection, ``[n, k]``; float64."""
    values: list[Tensor] = []
    features: list[list[Tensor]] = [[] for _ in projections]
    for found, rows in sample_gradients(snapshot, output, labels):
        if not rows.isfinite().all():
            raise UnsupportedError(
                "the gradient of a training sample's output is not finite: the training has diverged, or the model's "
                "derivative does not exist there. Trak(output='loss') or dit may do"
            )
        values.append(found.double())
        for project, parts in zip(projections, features, strict=True):
            parts.append(project(rows))
    return torch.cat(values), [torch.cat(parts) for parts in features]


def _solved(features: Tensor, weights: Tensor, asked: Tensor, damping: float) -> Tensor:
    """``w_j <(Phi^T W Phi + delta)^{-1} a, phi_j>`` of each query ``a``, ``[queries, n]``; 0 outside the kernel."""
    eigenvalues, basis = torch.linalg.eigh(features.T @ (weights[:, None] * features))
    damped = eigenvalues + damping * eigenvalues.mean()
    kept = damped > 1e-12 * damped.amax()
    inverse = torch.where(kept, 1 / damped.where(kept, 1), 0)
    return weights * ((asked @ basis * inverse) @ (features @ basis).T)
