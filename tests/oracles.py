"""Slow, obviously right references. Nothing here uses the replay, the sweep or the ground truth of dit_mlflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow import Trajectory, Window, Workload
from dit_mlflow.workload import to_like

WeightOf = Callable[[int, int], float]
"""(step, sample index) -> weight of the sample's loss there."""


def train_again(
    workload: Workload,
    trajectory: Trajectory,
    weight_of: WeightOf,
    until: int,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Plain PyTorch training in ``dtype`` on the recorded batches, each sample's loss times its weight."""
    assert workload.optimizer is not None
    model = trajectory.checkpoint(0).load_into(workload.build_model()).to(dtype)
    optimizer = workload.optimizer(model)
    scheduler = workload.scheduler(optimizer) if workload.scheduler else None
    model.train()
    for t in range(until):
        model.zero_grad()
        for indices in trajectory.step(t).indices:
            batch = to_like(workload.batch(indices), torch.device("cpu"), dtype)
            weights = torch.tensor([weight_of(t, int(i)) for i in indices], dtype=dtype)
            if workload.coefficients is None:
                factor: Tensor | float = 1 / (len(indices) * workload.accumulate)
            else:
                factor = workload.coefficients(batch).to(dtype)
            (weights * factor * workload.loss(model, batch)).sum().backward()
        if workload.regularizer is not None:
            workload.regularizer(model).backward()
        if workload.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), workload.clip_grad_norm)
        if workload.clip_grad_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), workload.clip_grad_value)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model.eval()


def validation_loss(workload: Workload, model: nn.Module) -> float:
    """Mean validation loss."""
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    batch = workload.collate(workload.validation_set, range(len(workload.validation_set)))
    return float(workload.loss(model, to_like(batch, torch.device("cpu"), dtype)).detach().double().mean())


def window_value(
    workload: Workload,
    trajectory: Trajectory,
    window: Window,
    kind: str,
    sample: int,
    weight: float,
    query: Callable[[nn.Module], float] | None = None,
) -> float:
    """What the kind measures, when the sample has ``weight`` instead of 1 where the kind says so."""
    ask = query or (lambda model: validation_loss(workload, model))

    def value(until: int, first: int, last: int) -> float:
        return ask(
            train_again(workload, trajectory, lambda t, i: weight if i == sample and first <= t < last else 1.0, until)
        )

    if kind == "local":
        return value(window.end, window.start, window.end)
    if kind == "final":
        return value(trajectory.num_steps, window.start, window.end)
    return value(window.end, 0, window.end) - value(window.start, 0, window.start)


def window_effect(
    workload: Workload,
    trajectory: Trajectory,
    window: Window,
    kind: str,
    sample: int,
    weight: float,
    query: Callable[[nn.Module], float] | None = None,
) -> float:
    """Change of what the kind measures when the sample has ``weight`` instead of 1 where the kind says so."""
    changed, unchanged = (
        window_value(workload, trajectory, window, kind, sample, given, query) for given in (weight, 1.0)
    )
    return changed - unchanged


def finite_difference(
    workload: Workload,
    trajectory: Trajectory,
    window: Window,
    kind: str,
    samples: Sequence[int],
    step: float,
    query: Callable[[nn.Module], float] | None = None,
) -> np.ndarray:
    """``-dq/dw_j`` by central differences through the whole training, ``[samples]``."""

    def value(sample: int, weight: float) -> float:
        return window_value(workload, trajectory, window, kind, sample, weight, query)

    return np.array([value(j, 1 - step) - value(j, 1 + step) for j in samples]) / (2 * step)


def quadratic_influence(
    hessians: np.ndarray,
    linear: np.ndarray,
    start: np.ndarray,
    batches: Sequence[np.ndarray],
    rates: Sequence[float],
    query: np.ndarray,
    window: Window,
    until: int,
) -> np.ndarray:
    """Closed form for losses ``theta' A_i theta / 2 - b_i' theta`` under SGD, query ``q' theta``, ``[samples]``.

    ``theta_{t+1} = theta_t - eta_t mean_i (A_i theta_t - b_i)``; the derivative in a sample's weight is carried forward
    with dense matrices.
    """
    theta = start.copy()
    sensitivity = np.zeros((len(hessians), len(start)))
    for t in range(until):
        batch, rate = batches[t], rates[t]
        mean_hessian = hessians[batch].mean(axis=0)
        sensitivity = sensitivity @ (np.eye(len(theta)) - rate * mean_hessian).T
        if t in window:
            for i in batch:
                sensitivity[i] += rate / len(batch) * (hessians[i] @ theta - linear[i])
        theta = theta - rate * (mean_hessian @ theta - linear[batch].mean(axis=0))
    return sensitivity @ query
