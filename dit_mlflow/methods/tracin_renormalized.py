"""TracIn that gives every presentation of a sample the same weight, however large its gradient was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.sample_gradients import GRADIENTS_IN_MEMORY
from dit_mlflow.methods.snapshot import Snapshot
from dit_mlflow.methods.tracin import effects, sum_over_steps
from dit_mlflow.replay.adjoint import vector_jacobian
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory.step_record import StepRecord


@dataclass(frozen=True)
class TracInRenormalized(Method):
    r"""TracIn with each sample's gradient scaled to length 1 (Diffusion-ReTrac, Xie et al. 2024, arXiv 2401.09031).

    .. math:: I_j = \sum_{t \in [a, b)} \eta_t c_{t,j}
        \left\langle \frac{\nabla l_j(\theta_t)}{|\nabla l_j(\theta_t)|}, \nabla q(\theta_t) \right\rangle

    with the sample's gradient as recorded: batch, mode, and the noise and timestep that a diffusion model drew for it.
    The norm is over the parameters that training moves there; the learning rates are not part of it. A presentation
    without gradient adds 0. The query's gradient keeps its length, which is the same for all samples.

    Sign as ``tracin``; a ranking, since the length that is divided out is part of what a step does. Where one draw
    gives a large gradient and another a small one (timesteps), a sample no longer ranks high for what it happened to
    draw; where large gradients are a sample's own (a wrong label), that signal is lost as well, so agreement with
    leave-one-out may well fall. What ``tracin`` leaves out, it leaves out too.

    Cost: that of ``tracin``, and a backward pass for each sample of each step, many at once (but one by one through
    convolutions); memory for as many gradients as fit into 256 MiB.
    """

    name: ClassVar[str] = "tracin_renormalized"
    per_window: ClassVar[bool] = True

    def estimate(self, question: Question) -> Estimate:
        return sum_over_steps(question, _renormalized)


def _renormalized(replay: Replay, step: StepRecord, snapshot: Snapshot, gradients: dict[str, Tensor]) -> np.ndarray:
    """``eta c_j <grad l_j / |grad l_j|, grad q>``, ``[queries, sum B]``."""
    norms = presented_norms(replay, step, snapshot)
    found = effects(replay, step, snapshot, gradients)
    return np.divide(found, norms, out=np.zeros_like(found), where=norms != 0)


def presented_norms(replay: Replay, step: StepRecord, snapshot: Snapshot) -> np.ndarray:
    """``|grad l_j|`` of each presentation in the step, as recorded, ``[sum B]``; 0 where its coefficient is 0.

    The loss draws for the whole batch, so samples cannot be presented one by one. ``d g / d w_j`` is ``c_j l_j`` of the
    recorded batch, from whose graph each row has its gradient.
    """
    training_step = replay.loss_step
    trained = list(snapshot.trained.values())
    parameters = {**snapshot.state.parameters, **snapshot.trained}
    buffers = {name: value.clone() for name, value in snapshot.state.buffers.items()}
    like = trained[0].detach()
    weights = torch.ones(len(step.samples), dtype=like.dtype, device=like.device, requires_grad=True)
    batches = replay.dynamics.load(step)
    at_once = max(1, GRADIENTS_IN_MEMORY // sum(parameter.nbytes for parameter in trained))
    if not training_step.batched:
        at_once = 1
    norms, first = [], 0
    for term, micro in zip(training_step.gradient.terms(step, batches), batches, strict=False):
        with sdpa_kernel(SDPBackend.MATH):
            (weighted,) = torch.autograd.grad(term(parameters, buffers, weights), [weights], create_graph=True)
            lengths = _gradient_lengths(weighted[first : first + micro.size], trained, at_once)
        factors = micro.coefficients.abs().to(lengths)
        norms.append(torch.where(factors != 0, lengths / factors, 0))
        first += micro.size
    return torch.cat(norms).cpu().numpy()


def _gradient_lengths(values: Tensor, parameters: list[Tensor], at_once: int) -> Tensor:
    """``|d values_j / d parameters|``, ``[B]``, float64; of so many values at once."""
    lengths = []
    for rows in torch.eye(len(values), dtype=values.dtype, device=values.device).split(at_once):
        found = vector_jacobian([values], parameters, [rows], len(rows), batched=True)
        squares = [part.double().flatten(1).square().sum(dim=1) for part in found]
        lengths.append(torch.stack(squares).sum(dim=0).sqrt())
    return torch.cat(lengths)
