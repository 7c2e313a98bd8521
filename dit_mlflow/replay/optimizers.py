"""PyTorch's optimizers by parameter name: read them, build them again, know which can be differentiated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.trajectory.manifest import OptimizerLayout
from dit_mlflow.trajectory.step_record import Hyperparameters

SUPPORTED: dict[str, type[Optimizer]] = {
    cls.__name__: cls
    for cls in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.ASGD,
    )
}
"""Optimizers whose step the sweep has been checked to differentiate, against finite differences: all of
``torch.optim`` that accept ``differentiable=True``, except Rprop."""

_REFUSED = {
    "Rprop": "its step depends on the gradient's sign alone, so that every influence would be 0 or undefined",
    "Muon": "torch.optim.Muon has no differentiable=True",
    "LBFGS": "it evaluates the loss several times per step, and its line search is not differentiable",
    "Adafactor": "torch.optim.Adafactor has no differentiable=True",
    "SparseAdam": "torch.optim.SparseAdam has no differentiable=True; use dense gradients with Adam",
}


def optimizer_class(name: str) -> type[Optimizer]:
    """The class named by a manifest or an optimizer; raises :class:`UnsupportedError` for any other."""
    if name not in SUPPORTED:
        reason = _REFUSED.get(name, "influence needs the derivative of its step")
        raise UnsupportedError(
            f"optimizer {name} is not supported: {reason}. Supported are "
            f"{', '.join('torch.optim.' + known for known in SUPPORTED)}"
        )
    return SUPPORTED[name]


def describe_optimizer(optimizer: Optimizer, model: nn.Module) -> OptimizerLayout:
    """Class, defaults and parameter names per group.

    Raises:
        UnsupportedError: a class (or subclass) whose step is not known.
        TrajectoryError: the optimizer holds tensors that are not parameters of ``model``.
    """
    name = type(optimizer).__name__
    if type(optimizer) is not optimizer_class(name):
        raise UnsupportedError(f"optimizer {type(optimizer)} is not torch.optim.{name}; its step is not known")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if foreign:
        raise TrajectoryError(
            f"the optimizer holds {len(foreign)} tensors (first shape {list(foreign[0].shape)}) that are not "
            "parameters of the recorded model; record one model with one optimizer"
        )
    return OptimizerLayout(
        name=name,
        defaults={key: _plain(value) for key, value in optimizer.defaults.items()},
        groups=tuple(tuple(names[id(parameter)] for parameter in group["params"]) for group in optimizer.param_groups),
    )


def hyperparameters(optimizer: Optimizer) -> tuple[Hyperparameters, ...]:
    """Per group, every setting that a scheduler or the loop can change."""
    return tuple(
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names", "initial_lr")}
        for group in optimizer.param_groups
    )


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Detached dense copies of the state, by parameter name (``names``: ``id(parameter) -> name``).

    Absent values (SGD's momentum before its first step) are left out.
    """
    return {
        names[id(parameter)]: {
            key: value.detach().to_dense().clone() if isinstance(value, Tensor) else value
            for key, value in entry.items()
            if value is not None
        }
        for parameter, entry in optimizer.state.items()
    }


def build_optimizer(layout: OptimizerLayout) -> Optimizer:
    """PyTorch's optimizer as recorded, over no parameters yet: one empty group for each of the layout."""
    cls = optimizer_class(layout.name)
    known = inspect.signature(cls).parameters
    defaults = {key: value for key, value in layout.defaults.items() if key in known}
    defaults = {key: tuple(value) if isinstance(value, list) else value for key, value in defaults.items()}
    try:
        return cls([{"params": []} for _ in layout.groups], **defaults)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TrajectoryError(
            f"torch.optim.{layout.name} cannot be built with the settings that are recorded, {defaults}: {error}"
        ) from error


def set_hyperparameters(optimizer: Optimizer, recorded: Sequence[Hyperparameters]) -> None:
    """Give each group its recorded settings, as the scheduler had left them."""
    if len(recorded) != len(optimizer.param_groups):
        raise TrajectoryError(
            f"a step has settings for {len(recorded)} parameter groups; the optimizer was recorded with "
            f"{len(optimizer.param_groups)}"
        )
    for group, settings in zip(optimizer.param_groups, recorded, strict=True):
        group.update(settings)


def _plain(value: Any) -> Any:
    """Numbers as Python has them, also inside tuples."""
    if isinstance(value, (Tensor, np.generic)):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
