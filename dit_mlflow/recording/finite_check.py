"""Warn while training is recorded that a number is not finite, with its step and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dit_mlflow.recording.watched_loader import Drawn
from dit_mlflow.replay.not_finite import are_finite, named, not_finite
from dit_mlflow.told import logger_of
from dit_mlflow.workload.batches import tensors_of

_log = logger_of(__name__)

_WHAT_FOLLOWS = "No influence can be computed from there on. Training goes on, and is recorded"


class FiniteCheck:
    """Warns once of a number that is not finite.

    It checks logged losses, stored states and, after every step, the smallest parameter on the CPU: a loss that is not
    finite makes every parameter that it depends on so.

    Args:
        parameters: the model's, by name.

    Cost: some microseconds per step.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        floating = {name: value for name, value in parameters.items() if value.is_floating_point() and value.numel()}
        trained = [name for name, value in floating.items() if value.requires_grad and value.device.type == "cpu"]
        self._name = min(trained, key=lambda name: floating[name].numel(), default="")
        self._smallest = floating.get(self._name)
        self._warned = False

    def step(self, index: int, drawn: Sequence[Drawn]) -> None:
        """Step ``index`` has been made, of these batches."""
        if self._warned or self._smallest is None or math.isfinite(self._smallest.detach().sum().item()):
            return
        if are_finite([self._smallest.detach()]):
            return  # Only its sum overflows.
        samples = np.concatenate([part.indices for part in drawn])
        culprits = [sample for part in drawn for sample in _not_finite_data(part)]
        data = f". The data of {named(culprits)} are not finite either" if culprits else ""
        self._warn(f"step {index} (its batch: {named(samples)}) made parameter {self._name!r} not finite{data}")

    def loss(self, index: int, value: float, samples: np.ndarray) -> None:
        """A loss has been logged."""
        if not math.isfinite(value):
            self._warn(f"the loss of step {index} (its batch: {named(samples)}) is {value}")

    def state(self, before: int, index: int, parameters: Mapping[str, Tensor]) -> None:
        """A state ``s_index`` is stored; the one before was ``s_before``."""
        if not self._warned and (name := not_finite(parameters)) is not None:
            self._warn(f"parameter {name!r} is not finite at step {index}; at step {before}, all were")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s. %s", what, _WHAT_FOLLOWS)


def _not_finite_data(drawn: Drawn) -> list[int]:
    """The samples of a batch whose rows in one of its tensors are not finite."""
    size = len(drawn.indices)
    rows = np.zeros(size, dtype=bool)
    tensors: list[Any] = [] if drawn.batch is None else tensors_of(drawn.batch)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dim() and len(tensor) == size:
            rows |= ~tensor.reshape(size, -1).isfinite().all(dim=1).cpu().numpy()
    return [int(sample) for sample in np.asarray(drawn.indices)[rows]]
