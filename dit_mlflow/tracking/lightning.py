"""Record what a Lightning trainer does: ``Trainer(callbacks=[TrajectoryCallback()])``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import mlflow
import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.tracking.recording.recorded_training import RecordedTraining
from dit_mlflow.workload import Workload


def _bases() -> tuple[type, ...]:
    """``Callback`` of every installed Lightning: ``lightning`` and ``pytorch_lightning`` each have their own."""
    homes = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    bases = tuple(import_module(module).Callback for name, module in homes.items() if find_spec(name))
    if not bases:
        raise ImportError("the Lightning callback needs Lightning: pip install 'dit-mlflow[lightning]'")
    return bases


class TrajectoryCallback(*_bases()):  # type: ignore[misc]
    """Records the training of a ``LightningModule`` as ``trajectory/`` of an MLflow run::

        trainer = Trainer(callbacks=[TrajectoryCallback()])
        trainer.fit(module, train_dataloaders=loader)

    For trainers of ``lightning`` and of ``pytorch_lightning``. The run is the active one (such as that of
    ``mlflow.pytorch.autolog()``), or that of the trainer's ``MLFlowLogger``, or else a new one that ends with the
    training. The samples of each step are read from the loader that the trainer iterates, with the samplers that it has
    put there. Training gives the same result, bit for bit, as without the callback. If it fails, the recording is kept
    as an incomplete trajectory.

    The workload for what was recorded:

    - ``model``: the ``LightningModule`` (parameters are matched by name), or a factory of it;
    - ``loss(model, batch)``: what ``training_step`` returns, before the mean over the batch;
    - ``accumulate``: the trainer's ``accumulate_grad_batches``. Lightning divides by it even in the last, shorter group
      of an epoch, so ``c_i = 1 / (B * accumulate)``, the default, holds for all. Where a
      ``GradientAccumulationScheduler`` changes it, the factors are recorded, and the workload needs none;
    - ``clip_grad_norm`` (or ``clip_grad_value``, with ``gradient_clip_algorithm="value"``): ``gradient_clip_val``.

    Random augmentation in the main process is replayed if nothing is drawn between the batch and its forward pass; in
    worker processes (``num_workers > 0``) it needs ``store_batches=True``. A ``training_step`` that returns ``None``
    leaves its batch out of the step. Trainings resumed from a checkpoint (``ckpt_path``) are recorded from there on.

    Args:
        workload: describes the training; if given, the first step is replayed, as a check, before the second is made.
        run_id: the run; default: as above.
        options: ``live`` (influence while training runs) and ``resume`` of
            :func:`~dit_mlflow.tracking.record_trajectory`; further arguments of :class:`dit_mlflow.TrajectoryRecorder`:
            ``checkpoint_every``, ``store_batches``, ``low_precision``, …

    Raises, from ``fit`` and before a parameter changes:
        InputError: the loader's dataset is not map-style; ``live`` with a workload that has no name to load it by.
        UnsupportedError: several optimizers, loaders or processes; low precision without ``low_precision``.
    """

    def __init__(self, workload: Workload | None = None, run_id: str | None = None, **options: Any) -> None:
        super().__init__()
        self._arguments = (workload, run_id, options)
        self._training: RecordedTraining | None = None
        self._accumulate: int | None = None
        self._accumulated: list[int] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Before every on_fit_start: that of LearningRateFinder has the trainer make its loaders.
        if stage != "fit":
            return
        self._end(trainer, UnsupportedError("another training began"))
        training = self._training = RecordedTraining(*self._arguments)
        self._accumulate, self._accumulated = None, []
        process = trainer.strategy.process_dataloader

        def process_and_watch(loader: Any) -> Any:
            # The trainer's last step before it iterates a loader, and the first place where we see the loader. Those
            # that a search for the batch size makes before the first step are of trials, or of validation.
            loader = process(loader)
            if trainer.training and isinstance(loader, DataLoader):
                (training.watch if training.begun else training.watch_if_used)(loader)
            return loader

        trainer.strategy.process_dataloader = process_and_watch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        training = self._training
        if training is None or training.closed:
            return
        if not training.begun:
            self._begin(training, trainer, pl_module)
        training.next_batch()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self._training is not None:
            self._training.used(loss)
            self._accumulated.append(trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        if self._training is None or not self._training.begun:
            return
        self._training.settle()
        counts, self._accumulated = self._accumulated, []
        if self._accumulate is None and counts:
            self._accumulate = 0 if any(map(_is_schedule, trainer.callbacks)) else counts[0]
        shares = None
        if any(count != self._accumulate for count in counts):
            shares = [np.full(size, 1 / (size * n)) for size, n in zip(self._training.sizes, counts, strict=True)]
        self._training.before_step(shares)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._training is not None:
            self._training.settle()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._training is not None:
            self._training.end_epoch()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if self._training is not None:
            self._training.checkpoint()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(trainer, exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end(trainer)

    def _begin(self, training: RecordedTraining, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise UnsupportedError(
                f"{type(pl_module).__name__} trains with {len(trainer.optimizers)} optimizers; a trajectory is that of "
                "one model with one optimizer"
            )
        if not training.choose(trainer.train_dataloader):
            raise UnsupportedError(
                f"the trainer draws its batches from {type(trainer.train_dataloader).__name__}; recording needs one "
                "torch.utils.data.DataLoader, from which all samples of a step come"
            )
        training.begin(pl_module, trainer.optimizers[0], _logger_run_id(trainer))

    def _end(self, trainer: Any, error: BaseException | None = None) -> None:
        training, self._training = self._training, None
        if training is not None:
            vars(trainer.strategy).pop("process_dataloader", None)
            training.close(error)


def _is_schedule(callback: Any) -> bool:
    """Whether it changes ``accumulate_grad_batches`` from epoch to epoch."""
    return any(base.__name__ == "GradientAccumulationScheduler" for base in type(callback).__mro__)


def _logger_run_id(trainer: Any) -> str | None:
    """The run of the trainer's MLflow logger, if it is in the same store; it is not the active run."""
    for logger in trainer.loggers:
        if type(logger).__name__ == "MLFlowLogger" and logger.experiment.tracking_uri == mlflow.get_tracking_uri():
            return logger.run_id
    return None
