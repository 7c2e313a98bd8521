"""TracIn: the sum of what a sample's own steps did to the query, and two variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.influence.question import Question
from dit_mlflow.influence.window import Window
from dit_mlflow.methods.method import Estimate, Measure, Method
from dit_mlflow.methods.sample_gradients import GRADIENTS_IN_MEMORY
from dit_mlflow.methods.snapshot import Snapshot, Vectors, mean_coefficients, snapshot_at
from dit_mlflow.replay.adjoint import vector_jacobian
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import floating_one


@dataclass(frozen=True)
class TracIn(Method):
    r"""Sum of a sample's own first-order effects, step by step (Pruthi et al. 2020, arXiv 2002.08484, "ideal").

    .. math:: I_j = \sum_{t \in [a, b)} \eta_t c_{t,j} \langle \nabla l_j(\theta_t), \nabla q(\theta_t) \rangle

    with the sample's gradient as recorded (batch, mode, random draws) and the learning rate of each param group. Sign:
    positive = its steps lowered the query, so removal raises it. Cost: a replay, and two backward passes per step and
    query. It leaves out what a step changes in all later steps (the Hessians), and all of the optimizer but its
    learning rate, so it is far off with momentum or Adam.
    """

    name = "tracin"
    per_window = True
    measures: ClassVar[Measure] = "query"

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        first, last = min(w.start for w in question.windows), max(w.end for w in question.windows)
        scores = np.zeros(question.shape)
        for t, state in enumerate(replay.forward(first, last), start=first):
            counting = [k for k, window in enumerate(question.windows) if t in window]
            if not counting:
                continue
            step = question.trajectory.step(t)
            snapshot = Snapshot(replay, state, step)
            found = self._effects(replay, step, snapshot, snapshot.query_gradients(question.queries))
            for k in counting:
                np.add.at(scores[k].T, step.samples, found.T)
        return Estimate(scores, details={"max_drift": replay.max_drift})

    def _effects(self, replay: Replay, step: StepRecord, snapshot: Snapshot, gradients: Vectors) -> np.ndarray:
        """``eta c_j <grad l_j, grad q>`` of each presentation in the step, ``[queries, sum B]``."""
        parameters, buffers, weights = _inputs(step, snapshot)
        with sdpa_kernel(SDPBackend.MATH):
            batches = replay.dynamics.load(step)
            found = replay.loss_step.gradient(parameters, buffers, step, batches, weights, create_graph=True)
        rates = learning_rates(replay, step)
        pairs = [(found[name], rates[name] * gradients[name]) for name in snapshot.trained if name in found]
        rows = len(next(iter(gradients.values())))
        (products,) = vector_jacobian([g for g, _ in pairs], [weights], [v for _, v in pairs], rows, batched=False)
        return products.double().cpu().numpy()


@dataclass(frozen=True)
class TracInCheckpoints(Method):
    r"""TracInCP (Pruthi et al. 2020, arXiv 2002.08484, section 3.2): each checkpoint takes a step on all of the data.

    .. math:: I_j = \sum_{t \text{ stored}} \eta_t c_j \langle \nabla l_j(\theta_t), \nabla q(\theta_t) \rangle

    over the checkpoints with ``a <= t < b``, in evaluation mode, with the sample's mean coefficient over training (``1
    / n`` for a mean loss). Sign as ``tracin``; a ranking, since it does not know how often a sample was met. A window
    without a checkpoint has no scores (NaN). Cost: three passes over the training set for each checkpoint and query, no
    replay.
    """

    name = "tracin_checkpoints"
    per_window = True
    skips = True

    def estimate(self, question: Question) -> Estimate:
        trajectory = question.trajectory
        replay = trajectory.replay(question.workload)
        weights = mean_coefficients(replay, Window(0, trajectory.num_steps))
        scores = np.full(question.shape, np.nan)
        for t in trajectory.checkpoint_steps:
            counting = [k for k, window in enumerate(question.windows) if t in window]
            if not counting:
                continue
            step = trajectory.step(t)
            snapshot = snapshot_at(replay, replay.checkpoint(t), step)
            rates = learning_rates(replay, step)
            gradients = snapshot.query_gradients(question.queries)
            effects = snapshot.products({name: rates[name] * value for name, value in gradients.items()})
            for k in counting:
                scores[k] = np.nan_to_num(scores[k]) + weights * effects
        return Estimate(scores)


@dataclass(frozen=True)
class TracInRenormalized(TracIn):
    r"""TracIn with each sample's gradient scaled to length 1 (Diffusion-ReTrac, Xie et al. 2024, arXiv 2401.09031).

    .. math:: I_j = \sum_{t \in [a, b)} \eta_t c_{t,j}
        \left\langle \frac{\nabla l_j(\theta_t)}{|\nabla l_j(\theta_t)|}, \nabla q(\theta_t) \right\rangle

    with the sample's gradient as recorded: batch, mode, and the noise and timestep that a diffusion model drew for it.
    The norm is over the parameters that training moves there, without the learning rates. A presentation without
    gradient adds 0. The query's gradient keeps its length, which is the same for all samples.

    Sign as ``tracin``; a ranking, since the length that is divided out is part of a step's effect. If the length
    depends on the draw (timesteps), a sample no longer ranks high by chance; if it is the sample's own (a wrong label),
    that signal is lost as well, so agreement with leave-one-out may fall. It leaves out what ``tracin`` leaves out.

    Cost: that of ``tracin``, and a backward pass for each sample of each step, many at once (but one by one through
    convolutions); memory for as many gradients as fit into 256 MiB.
    """

    name = "tracin_renormalized"
    measures = "ranking"

    def _effects(self, replay: Replay, step: StepRecord, snapshot: Snapshot, gradients: Vectors) -> np.ndarray:
        norms = presented_norms(replay, step, snapshot)
        found = super()._effects(replay, step, snapshot, gradients)
        return np.divide(found, norms, out=np.zeros_like(found), where=norms != 0)


def learning_rates(replay: Replay, step: StepRecord) -> dict[str, float]:
    """Learning rate of each parameter that the optimizer holds."""
    groups = zip(replay.trajectory.manifest.optimizer.groups, step.hyperparameters, strict=True)
    return {name: float(settings["lr"]) for names, settings in groups for name in names}


def _inputs(step: StepRecord, snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Parameters, buffers that the step may write to, and sample weights 1 ``[sum B]`` to differentiate by."""
    like = floating_one(snapshot.trained.values()).detach()
    weights = torch.ones(len(step.samples), dtype=like.dtype, device=like.device, requires_grad=True)
    buffers = {name: value.clone() for name, value in snapshot.state.buffers.items()}
    return {**snapshot.state.parameters, **snapshot.trained}, buffers, weights


def presented_norms(replay: Replay, step: StepRecord, snapshot: Snapshot) -> np.ndarray:
    """``|grad l_j|`` of each presentation in the step, as recorded, ``[sum B]``; 0 where its coefficient is 0.

    Random draws are the whole batch's, so samples cannot be presented one by one. The derivative of the batch's loss by
    ``w_j`` is ``c_j l_j``, whose gradient each row of the graph gives.
    """
    trained, batches = list(snapshot.trained.values()), replay.dynamics.load(step)
    parameters, buffers, weights = _inputs(step, snapshot)
    in_memory = max(1, GRADIENTS_IN_MEMORY // sum(parameter.nbytes for parameter in trained))
    at_once = in_memory if replay.loss_step.batched else 1
    norms, first = [], 0
    for term, micro in zip(replay.loss_step.gradient.terms(step, batches), batches, strict=False):
        with sdpa_kernel(SDPBackend.MATH):
            (weighted,) = torch.autograd.grad(term(parameters, buffers, weights), [weights], create_graph=True)
            lengths = _gradient_lengths(weighted[first : first + micro.size], trained, at_once)
        factors = micro.coefficients.abs().to(lengths)
        norms.append(torch.where(factors != 0, lengths / factors, 0))
        first += micro.size
    return torch.cat(norms).cpu().numpy()


def _gradient_lengths(values: Tensor, parameters: list[Tensor], at_once: int) -> Tensor:
    """``|d values_j / d parameters|``, ``[B]``, float64, ``at_once`` values at a time."""
    lengths = []
    for rows in torch.eye(len(values), dtype=values.dtype, device=values.device).split(at_once):
        found = vector_jacobian([values], parameters, [rows], len(rows), batched=True)
        squares = [part.double().reshape(len(part), -1).square().sum(dim=1) for part in found]
        lengths.append(torch.stack(squares).sum(dim=0).sqrt())
    return torch.cat(lengths)
