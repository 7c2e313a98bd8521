"""The record of a step, from its first batch until it is final."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dit_mlflow.errors import InputError
from dit_mlflow.recording.recorded_model import RecordedModel
from dit_mlflow.recording.watched_loader import Drawn
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.step_record import Hyperparameters, StepFields
from dit_mlflow.workload.batches import tensors_of
from dit_mlflow.workload.random_state import RandomState
from dit_mlflow.workload.workload import Workload

_log = logger_of(__name__)


class MadeStep(NamedTuple):
    """The fields of a step, and the tensors of its micro-batches if they are stored."""

    row: StepFields
    tensors: list[list[Tensor]]


class PendingStep:
    """Collects the batches of the next step, and keeps the last step made until its draws and its loss are known.

    Args:
        store_batches: keep the batches' tensors.
        workload: computes ``c_i`` of batches that come without; ``None`` = unknown.
    """

    def __init__(self, store_batches: bool, workload: Workload | None) -> None:
        self._store_batches = store_batches
        self._workload = workload
        self._drawn: list[Drawn] = []
        self._tensors: list[list[Tensor]] = []
        self._loss: float | None = None
        self._made: MadeStep | None = None
        self._began: RandomState | None = None
        self._warned = False

    @property
    def has_batches(self) -> bool:
        return bool(self._drawn)

    @property
    def drawn(self) -> list[Drawn]:
        """The batches added since the last step."""
        return list(self._drawn)

    @property
    def samples(self) -> np.ndarray:
        """Samples of the next step if it has batches, else of the last step made, in batch order."""
        last = [] if self._made is None else self._made.row["indices"]
        parts = [drawn.indices for drawn in self._drawn] or last
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]) if parts else np.zeros(0, np.int64)

    def add(self, drawn: Drawn) -> None:
        """Add a batch that the loop is about to get."""
        self.settle(drawn.random_state)
        if self._store_batches:
            # Now, since the loop may change its batch in place. Replay repeats only later draws.
            tensors = [tensor.detach().cpu().clone() for tensor in tensors_of(drawn.batch)]
            if not tensors:
                raise InputError(
                    f"store_batches found no tensor in a batch, which is a {type(drawn.batch).__name__}; give the "
                    "loader a collate_fn that returns tensors or NumPy arrays, alone or in tuples, lists or dicts"
                )
            self._tensors.append(tensors)
            drawn = drawn._replace(random_state=drawn.drawn or RandomState.capture())
        self._drawn.append(drawn)

    def take_back(self) -> None:
        """Forget the batch added last."""
        if self._drawn:
            self._drawn.pop()
            self._tensors = self._tensors[: len(self._drawn)]

    def discard(self) -> None:
        """Forget all batches added since the last step."""
        self._drawn.clear()
        self._tensors = []
        self._loss = None

    def weigh(self, coefficients: list[np.ndarray]) -> None:
        """Note ``c_i``, one array for each batch."""
        self._drawn = [drawn._replace(coefficients=part) for drawn, part in zip(self._drawn, coefficients, strict=True)]

    def log(self, loss: float) -> None:
        """Note the loss of the step whose batch was added last."""
        if self._drawn or self._made is None:
            self._loss = loss
        else:
            self._made.row["loss"] = loss

    def make(
        self,
        index: int,
        settings: tuple[Hyperparameters, ...],
        recorded_model: RecordedModel,
        modes: list[str] | None = None,
    ) -> None:
        """Make the record of the step that has just been made: by an optimizer, or as a whole,
        begun with the modules ``modes`` in evaluation mode."""
        drawn = self._drawn
        if drawn[0].epoch != drawn[-1].epoch and not self._warned:
            self._warned = True
            _log.warning(
                "step %d is made of batches of two passes over the loader. If the loop left the first pass (break) "
                "without using its last batch, call recorder.discard() there; otherwise replay includes that batch",
                index,
            )
        absent, zero = recorded_model.missing_gradients() if modes is None else ([], [])
        row: StepFields = {
            "index": index,
            "epoch": drawn[-1].epoch,
            "indices": [part.indices for part in drawn],
            "coefficients": self._weights(),
            "hyperparameters": settings,
            "loss": self._loss,
            "random_states": [a.random_state.used_since(b.random_state) for a, b in pairwise(drawn)],
            "evaluation_mode": recorded_model.in_evaluation_mode() if modes is None else modes,
            "no_gradient": absent,
            "zero_gradient": zero,
        }
        # The last batch's draws end where the next batch's begin, so one capture of the generators serves both.
        self._began = drawn[-1].random_state
        self._made = MadeStep(row, self._tensors)
        self._drawn, self._tensors, self._loss = [], [], None

    def settle(self, state: RandomState) -> None:
        """The last step made no draws after ``state``."""
        if self._made is not None and self._began is not None:
            self._made.row["random_states"].append(self._began.used_since(state))
            self._began = None

    @property
    def made(self) -> MadeStep | None:
        """The last step made; it is final when the step's loss is."""
        return self._made

    def forget(self) -> None:
        """Forget the last step made."""
        self._made = None

    def _weights(self) -> list[np.ndarray] | None:
        known = [drawn.coefficients for drawn in self._drawn if drawn.coefficients is not None]
        if len(known) == len(self._drawn) and (self._workload is None or self._workload.coefficients is None):
            return known
        if self._workload is None:
            return None
        return [
            self._workload.batch_coefficients(drawn.batch, len(drawn.indices)).double().cpu().numpy()
            for drawn in self._drawn
        ]
