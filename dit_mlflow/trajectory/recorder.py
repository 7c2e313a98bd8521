"""Record the trajectory of a training loop that the user already has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from dit_mlflow.errors import InputError, TrajectoryError, UnsupportedError
from dit_mlflow.trajectory.dataset import dataset_digest, is_inert
from dit_mlflow.trajectory.manifest import ModelLayout, TensorLayout, WorkloadReference
from dit_mlflow.trajectory.optimizers import describe_optimizer, hyperparameters, optimizer_state
from dit_mlflow.trajectory.random_state import RandomState
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step import Hyperparameters, Step
from dit_mlflow.trajectory.watch import Drawn, WatchedLoader
from dit_mlflow.trajectory.workload import Workload
from dit_mlflow.trajectory.writer import TrajectoryWriter


class TrajectoryRecorder:
    """Records every optimizer step made inside its ``with`` block.

    Three lines in an existing loop::

        with TrajectoryRecorder(model, optimizer, "trajectory") as recorder:    # 1
            for epoch in range(epochs):
                for x, y in recorder.watch(loader):                             # 2
                    optimizer.zero_grad()
                    loss = criterion(model(x), y).mean()
                    loss.backward()
                    optimizer.step()
                    recorder.log(loss=loss)                                     # 3, optional

    Training comes out bit for bit as without it: parameters, random streams and batches are only read.

    Args:
        model: the module in training.
        optimizer: one of the supported ``torch.optim`` classes, over parameters of ``model``.
        directory: a new folder.
        workload: what the loop does, if at hand; its reference and coefficients are then recorded too.
        checkpoint_every: ``"sqrt"`` stores ``s_t`` at ``t = 0, 1, 4, 9, … k*k …`` and at the end, about
            ``sqrt(T)`` states without knowing ``T``; ``n > 0`` stores every ``n``-th; ``0`` first and last only.

    Raises:
        InputError: ``checkpoint_every`` is none of these.
        TrajectoryError: the folder already holds a trajectory, or the optimizer is over another model.
        UnsupportedError: the optimizer's step cannot be differentiated.

    Cost: a copy of the batch's indices and hyperparameters per step, a copy of the state per checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        directory: str | Path,
        workload: Workload | None = None,
        checkpoint_every: str | int = "sqrt",
    ) -> None:
        self._is_checkpoint = _checkpoint_rule(checkpoint_every)
        self._model = model
        self._optimizer = optimizer
        self._workload = workload
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        reference = None
        if workload is not None and workload.reference is not None:
            reference = WorkloadReference(reference=workload.reference, settings=dict(workload.settings))
        self._writer = TrajectoryWriter(
            Path(directory), _describe_model(model), describe_optimizer(optimizer, model), reference
        )
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._dataset: Dataset[Any] | None = None
        self._drawn: list[Drawn] = []
        self._settings: tuple[Hyperparameters, ...] = ()
        self._loss: float | None = None
        self._row: dict[str, Any] | None = None
        self._due: State | None = None
        self._epoch = -1
        self._loaders: dict[int, tuple[DataLoader[Any], WatchedLoader]] = {}

    @property
    def directory(self) -> Path:
        return self._writer.directory

    @property
    def num_steps(self) -> int:
        """Steps recorded so far."""
        return self._writer.num_steps + (self._row is not None)

    def __enter__(self) -> TrajectoryRecorder:
        self._initial = self._snapshot()
        # Written now, so that what cannot be stored is refused before training, and a killed run leaves its start.
        self._writer.add_checkpoint(0, self._initial)
        self._writer.flush()
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None and self._due is None and self.num_steps > 0:
            self._due = self._snapshot()
        self._commit()
        if self._writer.dataset is None and self._dataset is not None:
            self._writer.dataset = dataset_digest(self._dataset)
        self._writer.flush(complete=kind is None)

    def watch(self, loader: DataLoader[Any]) -> WatchedLoader:
        """An iterable over the loader's own batches that tells the recorder which samples they hold.

        Raises:
            InputError: not a DataLoader over a map-style dataset.
        """
        _, watched = self._loaders.get(id(loader), (None, None))
        if watched is None:
            watched = WatchedLoader(loader, self._begin_epoch, self._drawn.append)
            self._loaders[id(loader)] = (loader, watched)
            self._note_dataset(loader)
        return watched

    def log(self, loss: float | Tensor) -> None:
        """Note the loss of the step at hand: the one whose batch was drawn last. Optional."""
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if self._drawn or self._row is None:
            self._loss = value
        else:
            self._row["loss"] = value

    def _note_dataset(self, loader: DataLoader[Any]) -> None:
        dataset = loader.dataset
        size = len(dataset)  # type: ignore[arg-type]
        if self._workload is not None and size != self._workload.num_samples:
            raise InputError(
                f"watch() was given a loader over {size} samples; the workload's train_set has "
                f"{self._workload.num_samples}, and sample indices must mean the same in both"
            )
        digest = dataset_digest(dataset) if is_inert(dataset) else None
        another = self._dataset is not None and self._dataset is not dataset
        if another and (digest is None or digest != self._writer.dataset):
            raise InputError("watch() was given a second dataset; a trajectory has one training set")
        self._dataset, self._writer.num_samples, self._writer.dataset = dataset, size, digest

    def _begin_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._drawn:
            raise TrajectoryError(
                "optimizer.step() without a batch from recorder.watch(loader): the samples of this step are "
                "not known; iterate over recorder.watch(loader) instead of loader"
            )
        if self.num_steps == 0:
            self._check_untouched()
        self._commit()
        if [len(group["params"]) for group in optimizer.param_groups] != self._group_sizes:
            raise UnsupportedError(
                "the optimizer's parameter groups changed during recording (add_param_group); begin a new "
                "recorder after the change"
            )
        self._settings = hyperparameters(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        now = RandomState.capture()
        later = [*(drawn.random_state for drawn in self._drawn[1:]), now]
        states = [drawn.random_state.used_since(end) for drawn, end in zip(self._drawn, later, strict=True)]
        self._row = {
            "index": self._writer.num_steps,
            "epoch": self._drawn[-1].epoch,
            "indices": tuple(drawn.indices for drawn in self._drawn),
            "coefficients": self._coefficients(),
            "hyperparameters": self._settings,
            "loss": self._loss,
            "random_states": tuple(states),
            "evaluation_mode": frozenset(name for name, module in self._model.named_modules() if not module.training),
            "no_gradient": frozenset(name for name, value in self._model.named_parameters() if value.grad is None),
        }
        self._drawn.clear()
        self._loss = None
        if self._is_checkpoint(self.num_steps):
            self._due = self._snapshot()

    def _commit(self) -> None:
        """Hand the last step (its loss can no longer change) and the state after it to the writer."""
        if self._row is not None:
            self._writer.add_step(Step(**self._row))
            self._row = None
        if self._due is not None:
            self._writer.add_checkpoint(self._writer.num_steps, self._due)
            self._due = None

    def _coefficients(self) -> tuple[np.ndarray, ...] | None:
        if self._workload is None:
            return None
        return tuple(
            self._workload.batch_coefficients(drawn.batch, len(drawn.indices)).double().cpu().numpy()
            for drawn in self._drawn
        )

    def _check_untouched(self) -> None:
        current = State.of_model(self._model)
        if any(not torch.equal(self._initial.parameters[k], v) for k, v in current.parameters.items()):
            raise TrajectoryError(
                "parameters changed between entering the recorder and the first optimizer step; load weights "
                "and make earlier steps before the with block, so that the trajectory starts where training does"
            )

    def _snapshot(self) -> State:
        state = State.of_model(self._model)
        state.optimizer.update(optimizer_state(self._optimizer, self._names))
        return state.to(torch.device("cpu"))


def _checkpoint_rule(every: str | int) -> Callable[[int], bool]:
    if every == "sqrt":
        return lambda step: math.isqrt(step) ** 2 == step
    if isinstance(every, int) and every >= 0:
        return lambda step: every > 0 and step % every == 0
    raise InputError(f"checkpoint_every is {every!r}; expected 'sqrt', or a number of steps (0: only the ends)")


def _describe_model(model: nn.Module) -> ModelLayout:
    def layout(value: Tensor) -> TensorLayout:
        return TensorLayout(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))

    return ModelLayout(
        name=type(model).__name__,
        parameters={name: layout(value) for name, value in model.named_parameters()},
        buffers={name: layout(value) for name, value in model.named_buffers()},
    )
