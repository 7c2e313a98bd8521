"""A classifier as a linear layer on features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.data import Dataset

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.replay.not_finite import named, refuse_diverged
from dit_mlflow.trajectory import State
from dit_mlflow.workload import Batch, Workload, floating_one, to_like

FEATURES_PER_PASS = 256
"""Samples per forward pass."""

Call = tuple[str, Tensor, Tensor]
"""A layer's name, what it was given, what it gave."""


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Samples at the last layer: features ``[n, F]`` and logits ``[n, classes]``, float64, labels ``[n]``."""

    features: Tensor
    labels: Tensor
    logits: Tensor


class LastLayer:
    """The linear layer that is called last on the way to a model's class logits, in evaluation mode.

    Args:
        dynamics: of the trajectory.
        state: the model's.
        t: its step.

    Raises:
        UnsupportedError: there is none, or it is not called with one row per sample.
        TrajectoryError: training diverged before.
    """

    def __init__(self, dynamics: Dynamics, state: State, t: int) -> None:
        refuse_diverged(state, t)
        self.dynamics = dynamics
        self.state = state
        self._linear = {n: m for n, m in dynamics.model.named_modules() if isinstance(m, nn.Linear)}
        self._size = min(FEATURES_PER_PASS, dynamics.workload.num_samples)
        self._batch = first_samples(dynamics, state, self._size)
        name, features, _ = self._pass(state, self._batch, self._size)
        if not name or features.dim() != 2 or len(features) != self._size:
            found = f"its last one, {name!r}, is given {list(features.shape)}" if name else "it calls none"
            raise UnsupportedError(
                f"the penultimate layer's features of {type(dynamics.model).__name__} are the rows [samples, features] "
                f"that its last torch.nn.Linear is given; {found} for {self._size} samples"
            )
        self.name = name

    @property
    def module(self) -> nn.Linear:
        return self._linear[self.name]

    @property
    def weight(self) -> str:
        """The weight's name, ``[O, F]``."""
        return self._own_name("weight")

    @property
    def bias(self) -> str | None:
        """The bias's name, ``[O]``, if there is one."""
        computed = parametrize.is_parametrized(self.module, "bias")
        return self._own_name("bias") if computed or self.module.bias is not None else None

    def of(self, dataset: Dataset[Any]) -> LabelledFeatures:
        """All of ``dataset``; raises :class:`UnsupportedError` if labels are no classes, or features not finite."""
        samples = np.arange(len(dataset))  # type: ignore[arg-type]
        features, labels, logits = [], [], []
        for batch, size in _batches(self.dynamics.workload, self.state, dataset, samples):
            _, rows, found = self._pass(self.state, batch, size)
            features.append(rows.double())
            labels.append(self.dynamics.workload.class_labels(batch, found.shape[1]).to(found.device))
            logits.append(found.double())
        joined = LabelledFeatures(torch.cat(features), torch.cat(labels), torch.cat(logits))
        refuse_rows(torch.cat([joined.features, joined.logits], dim=1), dataset, self.dynamics.workload)
        return joined

    def check_linear(self) -> None:
        """Raise :class:`UnsupportedError` unless the logits are the layer's output, and only it uses its weights."""
        _, features, _ = self._pass(self.state, self._batch, self._size)
        moved = State(dict(self.state.parameters), self.state.buffers)
        moved.parameters[self.weight] = 2 * moved.parameters[self.weight]
        bias = None if self.bias is None else moved.parameters[self.bias]
        expected = as_logits(nn.functional.linear(features, moved.parameters[self.weight], bias))
        logits = class_logits(self.dynamics, moved, self._batch, self._size)
        if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
            raise UnsupportedError(
                f"the logits of {type(self.dynamics.model).__name__} are not those of its last linear layer, "
                f"{self.name!r}, alone: something follows it, or its weights are used elsewhere too. This method needs "
                "a model that ends in a linear layer; use influence_function or trak, which do not"
            )

    def _own_name(self, key: str) -> str:
        own = dict(self.module.named_parameters(recurse=False)).get(key)
        for name, value in self.dynamics.model.named_parameters():
            if value is own:
                return name
        raise UnsupportedError(
            f"the last linear layer of {type(self.dynamics.model).__name__}, {self.name!r}, computes its weights from "
            "other parameters (weight_norm or another parametrization); this method needs a layer whose weights are "
            "parameters themselves. Use influence_function or trak, which do not"
        )

    def _pass(self, state: State, batch: Batch, size: int) -> tuple[str, Tensor, Tensor]:
        """The last linear layer called, what it was given, and the logits."""
        with listening(self._linear) as calls:
            logits = class_logits(self.dynamics, state, batch, size)
        name, features, _ = calls[-1] if calls else ("", torch.empty(0), None)
        return name, features, logits


def refuse_rows(rows: Tensor, dataset: Dataset[Any], workload: Workload) -> None:
    """Raise :class:`UnsupportedError` for features ``[n, F]`` that are not finite; the message names the samples."""
    wrong = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if wrong:
        of = "training" if dataset is workload.train_set else "validation"
        raise UnsupportedError(
            f"features of {of} {named(wrong)} are not finite. Look for NaN and infinity in their data, and for a root, "
            "a norm or a standard deviation at 0 in the model"
        )


@contextmanager
def listening(modules: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """A list that every call of a module is added to."""
    calls: list[Call] = []

    def keep(name: str, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Tensor) -> Tensor:
        given = arguments[0] if arguments else named["input"]
        calls.append((name, given.detach().clone(), output))
        return output.clone()  # what follows may work in place, on this as on the input

    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_hook(
                lambda _, arguments, named, output, name=name: keep(name, arguments, named, output), with_kwargs=True
            )
            hooks.callback(hook.remove)
        yield calls


def class_logits(dynamics: Dynamics, state: State, batch: Batch, size: int) -> Tensor:
    """Logits ``[size, classes]`` of the model at ``state``, in evaluation mode, without a graph."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return dynamics.evaluate(
            state.parameters, state.buffers, lambda model: dynamics.workload.class_logits(model, batch, size)
        )


def training_labels(dynamics: Dynamics, state: State) -> Tensor:
    """Class of every training sample, ``[n]``; raises :class:`UnsupportedError` if the labels are no classes."""
    workload, labels = dynamics.workload, []
    for batch, size in _batches(workload, state, workload.train_set, np.arange(workload.num_samples)):
        labels.append(workload.class_labels(batch, class_logits(dynamics, state, batch, size).shape[1]))
    return torch.cat(labels)


def training_logits(dynamics: Dynamics, state: State, samples: np.ndarray) -> Tensor:
    """Logits ``[R, classes]`` of the training samples ``[R]`` of the model at ``state``, in evaluation mode."""
    batches = _batches(dynamics.workload, state, dynamics.workload.train_set, samples)
    return torch.cat([class_logits(dynamics, state, batch, size) for batch, size in batches])


def first_samples(dynamics: Dynamics, state: State, size: int) -> Batch:
    """The first training samples, on the device and in the dtype of ``state``."""
    return next(_batches(dynamics.workload, state, dynamics.workload.train_set, np.arange(size)))[0]


def _batches(
    workload: Workload, state: State, dataset: Dataset[Any], samples: np.ndarray
) -> Iterator[tuple[Batch, int]]:
    """Batches for one forward pass each, on the device and in the dtype of ``state``, and their sizes."""
    like = floating_one(state.parameters.values())
    for indices in np.array_split(samples, -(-len(samples) // FEATURES_PER_PASS)):
        yield to_like(workload.unvarying(dataset, indices), like.device, like.dtype), len(indices)


def as_logits(output: Tensor) -> Tensor:
    """Logits ``[n, classes]`` of a last layer's output; a single output ``z`` becomes ``(-z / 2, z / 2)``."""
    return torch.cat([-output / 2, output / 2], dim=1) if output.shape[1] == 1 else output
