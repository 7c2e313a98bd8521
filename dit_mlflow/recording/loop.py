"""A plain training loop around the recorder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from dit_mlflow.errors import InputError, TrainingError, TrajectoryError, WorkloadError
from dit_mlflow.progress import progress_bar
from dit_mlflow.recording.recorder import TrajectoryRecorder
from dit_mlflow.replay.not_finite import named
from dit_mlflow.replay.trajectory import Trajectory
from dit_mlflow.workload.batches import Batch, floating_one, to_like
from dit_mlflow.workload.random_state import preserved_random_state
from dit_mlflow.workload.workload import Optimizers, Workload

Recording = Callable[[nn.Module, Optimizers], AbstractContextManager[TrajectoryRecorder]]
"""Makes the recorder of a model and its optimizer."""


def train(
    workload: Workload,
    directory: str | Path,
    init_seed: int = 0,
    order_seed: int = 0,
    checkpoint_every: str | int = "sqrt",
    max_steps: int | None = None,
) -> Trajectory:
    """Train ``workload`` and record it; the caller's random state is left alone.

    Args:
        workload: with ``optimizer``, ``batch_size`` and ``epochs``.
        directory: a new folder for the trajectory.
        init_seed: seed of the weight initialisation.
        order_seed: seed of the batch order and of the random draws in training.
        checkpoint_every: see :class:`TrajectoryRecorder`.
        max_steps: number of steps after which to stop; default: the workload's plan.

    Returns:
        The trajectory; it replays bit for bit on the same machine. Its last state is the trained model:
        ``trajectory.checkpoint(trajectory.num_steps).load_into(model)``.

    Raises:
        InputError: a seed that torch does not take.
        WorkloadError: the workload lacks what training needs.
        TrainingError: a loss is not finite. The steps before it are kept, as an incomplete trajectory.
        TrajectoryError: the trajectory could not be written; training ran to its end.
    """
    train_recorded(
        workload,
        lambda model, optimizer: TrajectoryRecorder(model, optimizer, directory, workload, checkpoint_every),
        init_seed,
        order_seed,
        max_steps,
    )
    return Trajectory.open(directory)


def train_recorded(
    workload: Workload, recording: Recording, init_seed: int = 0, order_seed: int = 0, max_steps: int | None = None
) -> nn.Module:
    """:func:`train` with a recorder of the caller's; returns the trained model.

    Raises:
        TrajectoryError: the trajectory could not be written; training ran to its end.
    """
    try:
        model, recorder = _train(workload, recording, init_seed, order_seed, max_steps)
    except TrainingError as error:
        raise TrainingError(f"{error}. The steps before it are recorded") from error
    if recorder is not None and recorder.failure is not None:
        raise TrajectoryError(
            f"the trajectory could not be written to {recorder.directory}: {recorder.failure}; what is there ends "
            "earlier than training did"
        ) from recorder.failure
    return model


def check_seeds(init_seed: int, order_seed: int) -> None:
    """Raise :class:`InputError` for seeds that torch's generators do not take."""
    for name, seed in (("init_seed", init_seed), ("order_seed", order_seed)):
        if not -(2**63) <= seed < 2**64:
            raise InputError(f"{name}={seed}; expected a whole number of 64 bits, such as 0")


def train_unrecorded(
    workload: Workload, init_seed: int = 0, order_seed: int = 0, weights: np.ndarray | None = None
) -> nn.Module:
    """:func:`train` without a record and without a progress bar; returns the same model, bit for bit.

    Args:
        workload, init_seed, order_seed: see :func:`train`.
        weights: of the samples' losses, ``[samples]``; ``None`` = 1 for each. They change nothing else.

    Raises:
        WorkloadError: the workload lacks what training needs.
        TrainingError: a loss is not finite.
    """
    return _train(workload, None, init_seed, order_seed, weights=weights)[0]


class _Numbered(Dataset[Any]):
    """A data set whose samples come with their numbers."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._dataset[index], index


def _numbered(collate: Callable[[list[Any]], Batch], items: list[tuple[Any, int]]) -> tuple[Batch, list[int]]:
    return collate([sample for sample, _ in items]), [index for _, index in items]


def _train(
    workload: Workload,
    recording: Recording | None,
    init_seed: int,
    order_seed: int,
    max_steps: int | None = None,
    weights: np.ndarray | None = None,
) -> tuple[nn.Module, TrajectoryRecorder | None]:
    check_seeds(init_seed, order_seed)
    plan = workload.plan
    assert workload.optimizer is not None
    with preserved_random_state():
        torch.manual_seed(init_seed)
        model = workload.build_model().train()
        try:
            optimizer: Any = workload.optimizer(model)
        except (TypeError, ValueError) as error:
            raise WorkloadError(f"Workload.optimizer cannot be built: {error}") from error
        scheduler = workload.scheduler(optimizer) if workload.scheduler is not None else None
        collate = workload.collate_fn
        loader: DataLoader[Any] = DataLoader(
            workload.train_set if weights is None else _Numbered(workload.train_set),
            batch_size=workload.batch_size,
            shuffle=True,
            collate_fn=collate if weights is None else partial(_numbered, collate or default_collate),
            generator=torch.Generator().manual_seed(order_seed),
        )
        torch.manual_seed(order_seed)
        made = 0
        with (
            nullcontext() if recording is None else recording(model, optimizer) as recorder,
            progress_bar(plan.num_steps, "training", shown=recording is not None) as progress,
        ):
            for epoch in range(len(plan.epoch_ends)):
                if made == max_steps:
                    break
                last = len(loader) - 1
                total, rows = 0.0, []
                for position, found in enumerate(loader if recorder is None else recorder.watch(loader)):
                    batch, samples = (found, None) if weights is None else found
                    given = None if weights is None else torch.from_numpy(weights[samples])
                    if workload.step is not None:
                        with nullcontext() if recorder is None else recorder.one_step():
                            total = _whole_step(workload, model, optimizer, batch, position, given)
                            _refuse_not_finite(total, made, epoch)
                    else:
                        losses, value = _backward(workload, model, batch, position, given)
                        total += value
                        rows.append(losses)
                        if (position + 1) % workload.accumulate and position != last:
                            continue
                        total += _finish_gradient(workload, model)
                        _refuse_not_finite(total, made, epoch, rows, recorder)
                        optimizer.step()
                        # The model's, not the optimizer's: clipping uses every gradient.
                        model.zero_grad()
                    made += 1
                    if recorder is not None:
                        recorder.log(total)
                    if scheduler is not None:
                        scheduler.step()
                    total, rows = 0.0, []
                    progress.update()
                    if made == max_steps:
                        break
    return model, recorder


def _refuse_not_finite(
    loss: float, step: int, epoch: int, rows: Sequence[Tensor] = (), recorder: TrajectoryRecorder | None = None
) -> None:
    """Raise :class:`TrainingError`, with the samples whose losses are not finite, if a recorder knows them."""
    if math.isfinite(loss):
        return
    whose = ""
    if recorder is not None and len(rows):
        broken = ~torch.cat(list(rows)).isfinite().cpu().numpy()
        if broken.any() and len(broken) == len(recorder.drawn_samples):
            whose = f", by {named(recorder.drawn_samples[broken])}"
    raise TrainingError(
        f"the loss is {loss} at step {step} (epoch {epoch}){whose}; try a lower learning rate, or look for infinite "
        "inputs"
    )


def _whole_step(
    workload: Workload, model: nn.Module, optimizer: Any, batch: Batch, position: int, given: Tensor | None
) -> float:
    """Make :attr:`Workload.step` of the epoch's batch number ``position``; returns its loss, 0 if it says none."""
    assert workload.step is not None
    like = floating_one(model.parameters())
    weights = like.new_ones(_size(workload, position)) if given is None else given.to(like)
    loss: Any = workload.step(model, optimizer, to_like(batch, like.device, None), weights)
    if loss is None:
        return 0.0
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, (int, float)):
        return float(loss)
    raise WorkloadError(f"Workload.step returned a {type(loss).__name__}; expected its loss, one number, or None")


def _size(workload: Workload, position: int) -> int:
    """Samples of the epoch's micro-batch number ``position``."""
    assert workload.batch_size is not None
    return min(workload.batch_size, workload.num_samples - position * workload.batch_size)


def _backward(
    workload: Workload, model: nn.Module, batch: Batch, position: int, given: Tensor | None
) -> tuple[Tensor, float]:
    """Accumulate the gradient of the epoch's micro-batch number ``position``; returns its losses and objective."""
    size = _size(workload, position)
    device = floating_one(model.parameters()).device
    coefficients = workload.batch_coefficients(batch, size).to(device)
    losses = workload.sample_losses(model, to_like(batch, device, None), size)
    if given is not None:
        coefficients = coefficients * given.to(coefficients)
    objective = (coefficients.to(losses.dtype) * losses).sum()
    objective.backward()
    return losses.detach(), objective.item()


def _finish_gradient(workload: Workload, model: nn.Module) -> float:
    """Add the regularizer's gradient and clip; returns the regularizer's value."""
    penalty = 0.0
    if workload.regularizer is not None:
        term = workload.regularizer(model)
        term.backward()
        penalty = term.item()
    if workload.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), workload.clip_grad_norm)
    if workload.clip_grad_value is not None:
        nn.utils.clip_grad_value_(model.parameters(), workload.clip_grad_value)
    return penalty
