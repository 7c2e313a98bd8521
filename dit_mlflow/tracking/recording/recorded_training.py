"""One training inside a trainer, recorded into an MLflow run: what the callbacks have in common."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import mlflow
import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.recording import TrajectoryRecorder
from dit_mlflow.recording.loader_patch import Handed, LoaderPatch
from dit_mlflow.tracking.recording.record_trajectory import record_trajectory
from dit_mlflow.workload import Workload

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
        self._patch: LoaderPatch | None = None
        self._unused = False
        self._loss: Tensor | None = None
        self.closed = False
        self._pass: int | None = None
        self._thread = threading.current_thread()

    @property
    def begun(self) -> bool:
        return self._recorder is not None

    @property
    def patch(self) -> LoaderPatch | None:
        """The loader that is watched."""
        return self._patch

    def watch(self, loader: DataLoader[Any]) -> None:
        """Know the samples of the batches that ``loader`` hands out from now on; ends the watch on another loader.

        Raises:
            InputError: ``loader`` does not know its samples by index.
        """
        if self._patch is not None and self._patch.loader is loader:
            return
        if self._patch is not None:
            self._patch.remove()
        self._patch = LoaderPatch(loader, self._gone)

    def begin(self, model: nn.Module, optimizer: Optimizer, run_id: str | None = None) -> None:
        """Enter the recorder. ``run_id``: the run to use if none was given and none is active."""
        if mlflow.active_run() is not None:
            run_id = None
        recording = record_trajectory(model, optimizer, self._workload, self._run_id or run_id, **self._options)
        self._recorder = self._stack.enter_context(recording)

    def at_close(self, function: Callable[[], None]) -> None:
        """Call ``function`` when the recorder is left."""
        self._stack.callback(function)

    def next_batch(self, handed: Handed | None = None) -> None:
        """The trainer turns to the next batch (``handed``, or the first in the queue).

        Raises:
            TrajectoryError: there is none.
        """
        assert self._recorder is not None and self._patch is not None
        self.settle()
        handed = handed or self._patch.take()
        if handed is None:
            raise TrajectoryError(
                "the trainer uses a batch that did not come from the training loader it was watched on; batches taken "
                "inside training_step (dataloader_iter), or from a loader of one's own, cannot be recorded"
            )
        self._recorder.receive(self._patch.loader, handed)
        self._pass = handed.iteration
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

    def end_epoch(self) -> None:
        """The pass over the loader is over, as it should be."""
        self._pass = None

    def _gone(self, number: int) -> None:
        """A loader's iterator is gone, with the frames that held it; before the epoch's end, training has failed."""
        if number == self._pass:
            self.abandon()

    def close(self, error: BaseException | None = None) -> None:
        """Leave the recorder, once; with ``error``, the trajectory is incomplete."""
        if self.closed:
            return
        self.closed = True
        if self._patch is not None:
            self._patch.remove()
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
        if threading.current_thread() is not self._thread:
            # Garbage is collected in any thread, also in one that closing has to wait for.
            try:
                threading.Thread(target=self._close_unfinished, name="dit-mlflow-close").start()
                return
            except RuntimeError:  # The interpreter ends.
                pass
        self._close_unfinished()

    def _close_unfinished(self) -> None:
        try:
            self.close(TrajectoryError("training was broken off"))
        except Exception as error:  # Of whatever kind: there is nobody to handle it.
            logger.warning("the trajectory of a training that was broken off could not be saved: %r", error)
