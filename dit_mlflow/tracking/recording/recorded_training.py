"""Records one training of a trainer into an MLflow run: the common part of the callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import mlflow
import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.recording import TrajectoryRecorder
from dit_mlflow.recording.loader_patch import Handed, LoaderPatch
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.recording.record_trajectory import record_trajectory
from dit_mlflow.workload import Workload

logger = logger_of(__name__)


class RecordedTraining:
    """Follows a trainer by the calls of its callback, from the first batch to the end.

    Call :meth:`watch` before the loader is iterated and :meth:`begin` before the first gradient; then, for each
    micro-batch, :meth:`next_batch` before its forward pass and :meth:`used` when its gradient is computed; finally, or
    when training has failed, :meth:`close`.

    Args:
        workload: describes the training; optional.
        run_id: the run; default: the active one, or a new one that ends with the training.
        options: further arguments of :class:`dit_mlflow.TrajectoryRecorder`.

    Attributes:
        patch: the loader that is watched.
        closed: whether the recorder has been left.
        num_steps: that were recorded, once it has been.
        sizes: of the micro-batches of the next step.
    """

    def __init__(self, workload: Workload | None, run_id: str | None, options: Mapping[str, Any]) -> None:
        self._workload, self._run_id, self._options = workload, run_id, options
        self._stack = ExitStack()
        self._recorder: TrajectoryRecorder | None = None
        self.patch: LoaderPatch | None = None
        self._candidates: dict[int, LoaderPatch | InputError] = {}
        self._unused = False
        self._loss: Tensor | None = None
        self.closed = False
        self.num_steps = 0
        self.sizes: list[int] = []
        self._pass: int | None = None
        self._thread = threading.current_thread()

    @property
    def begun(self) -> bool:
        return self._recorder is not None

    def watch(self, loader: DataLoader[Any]) -> None:
        """Note the samples of the batches that ``loader`` hands out from now on, and stop watching any other loader.

        Raises:
            InputError: ``loader`` does not know its samples by index.
        """
        for number in [*self._candidates]:
            self._drop(number)
        if self.patch is not None and self.patch.loader is loader:
            return
        if self.patch is not None:
            self.patch.remove()
        self.patch = self._patched(loader)

    def watch_if_used(self, loader: DataLoader[Any]) -> None:
        """:meth:`watch` it, beside others, until :meth:`choose` tells which of them training uses."""
        self._drop(id(loader))
        try:
            self._candidates[id(loader)] = self._patched(loader)
        except InputError as error:
            self._candidates[id(loader)] = error

    def choose(self, loader: Any) -> bool:
        """Stop watching the other loaders; ``False`` if ``loader`` is not watched.

        Raises:
            InputError: it does not know its samples by index.
        """
        chosen = self._candidates.pop(id(loader), None)
        for number in [*self._candidates]:
            self._drop(number)
        if isinstance(chosen, InputError):
            raise chosen
        self.patch = chosen
        return chosen is not None

    def _patched(self, loader: DataLoader[Any]) -> LoaderPatch:
        patch: LoaderPatch

        def gone(number: int) -> None:
            # Passes over other loaders have the same numbers.
            if self.patch is patch:
                self._gone(number)

        patch = LoaderPatch(loader, gone)
        return patch

    def _drop(self, number: int) -> None:
        patch = self._candidates.pop(number, None)
        if isinstance(patch, LoaderPatch):
            patch.remove()

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
        """The trainer begins the next batch (``handed``, or the first in the queue).

        Raises:
            TrajectoryError: there is no such batch.
        """
        assert self._recorder is not None and self.patch is not None
        self.settle()
        handed = handed or self.patch.take()
        if handed is None:
            raise TrajectoryError(
                "the trainer uses a batch that did not come from the watched training loader; batches taken inside "
                "training_step (dataloader_iter), or from another loader, cannot be recorded"
            )
        self._recorder.receive(self.patch.loader, handed)
        self._pass = handed.iteration
        self.sizes.append(len(handed.indices))
        self._unused = True

    def used(self, loss: Tensor | None = None) -> None:
        """The gradient of the current batch is being computed; ``loss``: its part of the step's objective."""
        self._unused = False
        if loss is not None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def settle(self) -> None:
        """Take back the current batch if it has not been used: it will not be."""
        if self._unused and self._recorder is not None:
            self._recorder.take_back()
            self.sizes.pop()
        self._unused = False

    def before_step(self, coefficients: list[np.ndarray] | None = None, loss: float | None = None) -> None:
        """The trainer is about to step the optimizer; ``c_i`` per micro-batch and the objective, if known."""
        assert self._recorder is not None
        self.settle()
        if coefficients is not None:
            self._recorder.weigh(coefficients)
        objective = self._loss if loss is None else loss
        if objective is not None:
            self._recorder.log(objective)
        self._loss = None
        self.sizes = []

    def checkpoint(self) -> None:
        """Store the present state, unless something other than the optimizer has changed it."""
        if self._recorder is None:
            return
        try:
            self._recorder.checkpoint()
        except TrajectoryError as error:
            logger.warning("no state of the trajectory was stored here: %s", error)

    def end_epoch(self) -> None:
        """The pass over the loader has ended normally."""
        self._pass = None

    def _gone(self, number: int) -> None:
        """A loader's iterator was freed; if that is before the epoch's end, training has failed."""
        if number == self._pass:
            self.abandon()

    def close(self, error: BaseException | None = None) -> None:
        """Leave the recorder, once; with ``error``, the trajectory is incomplete."""
        if self.closed:
            return
        self.closed = True
        for number in [*self._candidates]:
            self._drop(number)
        if self.patch is not None:
            self.patch.remove()
        if self._recorder is None:
            return
        if error is None:
            try:
                self._recorder.checkpoint()
            except TrajectoryError as changed:
                logger.warning("the trajectory ends before training did: %s", changed)
                error = changed
        recorder, self._recorder = self._recorder, None
        self.num_steps = recorder.num_steps
        del recorder
        # Passed to the contexts, not raised: the caller knows of it.
        self._stack.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def abandon(self) -> None:
        """Close what no callback has closed, after training has failed."""
        if self.closed:
            return
        if threading.current_thread() is not self._thread:
            # Garbage is collected in any thread, even in one for which closing has to wait.
            try:
                threading.Thread(target=self._close_unfinished, name="dit-mlflow-close").start()
                return
            except RuntimeError:  # The interpreter ends.
                pass
        self._close_unfinished()

    def _close_unfinished(self) -> None:
        try:
            self.close(TrajectoryError("training was broken off"))
        except Exception as error:  # Any kind: nobody is left to handle it.
            logger.warning("the trajectory of a training that was broken off could not be saved: %r", error)
