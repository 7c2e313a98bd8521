"""One training inside a trainer, recorded into an MLflow run: what the callbacks have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import mlflow
import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.tracking.recording import record_trajectory
from dit_mlflow.trajectory import TrajectoryRecorder, Workload
from dit_mlflow.trajectory.tap import Handed, LoaderTap

logger = logging.getLogger(__name__)


class RecordedTraining:
    """Follows a trainer by the calls of its callback, from the first batch to the end.

    In this order: :meth:`watch` before the loader is iterated, :meth:`begin` before the first gradient, then for each
    micro-batch :meth:`next_batch` before its forward pass and :meth:`used` once its gradient is being computed;
    :meth:`close` in the end, or when training has failed.

    Args:
        workload: what the trainer does, if at hand.
        run_id: the run; default: the active one, or a new one that ends with the training.
        options: further arguments of :class:`dit_mlflow.TrajectoryRecorder`.
    """

    def __init__(self, workload: Workload | None, run_id: str | None, options: Mapping[str, Any]) -> None:
        self._workload, self._run_id, self._options = workload, run_id, options
        self._stack = ExitStack()
        self._recorder: TrajectoryRecorder | None = None
        self._tap: LoaderTap | None = None
        self._unused = False
        self._loss: Tensor | None = None
        self.closed = False
        self.in_epoch = False

    @property
    def begun(self) -> bool:
        return self._recorder is not None

    @property
    def tap(self) -> LoaderTap | None:
        """The loader that is watched."""
        return self._tap

    def watch(self, loader: DataLoader[Any]) -> None:
        """Know the samples of the batches that ``loader`` hands out from now on; ends the watch on another loader.

        Raises:
            InputError: ``loader`` does not know its samples by index.
        """
        if self._tap is not None and self._tap.loader is loader:
            return
        if self._tap is not None:
            self._tap.remove()
        # Where an exception leaves no trace but the loader's iterator, which is thrown away with the trainer's frames.
        self._tap = LoaderTap(loader, self.broken)

    def begin(self, model: nn.Module, optimizer: Optimizer, run_id: str | None = None) -> None:
        """Enter the recorder. ``run_id``: the run to use if none was given and none is active."""
        with ExitStack() as stack:
            run_id = self._run_id or _active_run_id() or run_id
            if run_id is None:
                # Ours, so it ends with the training: as FAILED, if that is how the training ends.
                run_id = stack.enter_context(mlflow.start_run()).info.run_id
            self._recorder = stack.enter_context(
                record_trajectory(model, optimizer, self._workload, run_id, **self._options)
            )
            self._stack = stack.pop_all()

    def at_close(self, function: Callable[[], None]) -> None:
        """Call ``function`` when the recorder is left."""
        self._stack.callback(function)

    def next_batch(self, handed: Handed | None = None) -> None:
        """The trainer turns to the next batch (``handed``, or the first in the queue).

        Raises:
            TrajectoryError: there is none.
        """
        assert self._recorder is not None and self._tap is not None
        self.settle()
        handed = handed or self._tap.take()
        if handed is None:
            raise TrajectoryError(
                "the trainer uses a batch that did not come from the training loader it was watched on; batches taken "
                "inside training_step (dataloader_iter), or from a loader of one's own, cannot be recorded"
            )
        self._recorder.receive(self._tap.loader, handed)
        self._unused = True

    def used(self, loss: Tensor | None = None) -> None:
        """The gradient of the batch at hand is being computed; ``loss``: its part of the step's objective."""
        self._unused = False
        if loss is not None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def settle(self) -> None:
        """A batch that was not used by now will not be."""
        if self._unused and self._recorder is not None:
            self._recorder.take_back()
        self._unused = False

    def before_step(self, coefficients: list[np.ndarray] | None = None, loss: float | None = None) -> None:
        """The trainer is about to step the optimizer; ``c_i`` per micro-batch and the objective, if they are known."""
        assert self._recorder is not None
        self.settle()
        if coefficients is not None:
            self._recorder.weigh(coefficients)
        objective = self._loss if loss is None else loss
        if objective is not None:
            self._recorder.log(objective)
        self._loss = None

    def checkpoint(self) -> None:
        """Store the present state, unless something else than the optimizer has changed it."""
        if self._recorder is None:
            return
        try:
            self._recorder.checkpoint()
        except TrajectoryError as error:
            logger.warning("no state of the trajectory was stored here: %s", error)

    def broken(self, error: BaseException) -> None:
        """An iteration over the training loader has been broken off; within an epoch, training has failed."""
        if self.in_epoch:
            self.close(error if isinstance(error, Exception) else TrajectoryError("training was broken off"))

    def close(self, error: BaseException | None = None) -> None:
        """Leave the recorder, once; with ``error``, the trajectory is incomplete."""
        if self.closed:
            return
        self.closed = True
        if self._tap is not None:
            self._tap.remove()
        if self._recorder is None:
            return
        if error is None:
            try:
                self._recorder.checkpoint()
            except TrajectoryError as changed:
                logger.warning("the trajectory ends before training did: %s", changed)
                error = changed
        recorder, self._recorder = self._recorder, None
        del recorder
        # Passed on, not raised: contexts of ours let it through, and who called knows of it.
        self._stack.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def abandon(self) -> None:
        """Close what no callback has closed: training has failed, and nobody is left to be told."""
        if self.closed:
            return
        try:
            self.close(TrajectoryError("training did not end"))
        except Exception as error:
            logger.warning("the trajectory of a training that did not end could not be saved: %r", error)


def _active_run_id() -> str | None:
    run = mlflow.active_run()
    return run.info.run_id if run is not None else None
