"""Optimizers by parameter name: describe, read and rebuild them."""

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
from dit_mlflow.trajectory.state import COUNTERS
from dit_mlflow.trajectory.step_record import Hyperparameters
from dit_mlflow.workload.workload import Workload

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
"""Optimizers that the sweep differentiates through PyTorch's own code, as tested against finite differences: all of
``torch.optim`` that accept ``differentiable=True``, except Rprop."""

_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.Rprop: "its step depends on the gradient's sign alone, so that every influence would be 0 or undefined",
    torch.optim.LBFGS: "it evaluates the loss several times per step, and its line search is not differentiable",
    torch.optim.SparseAdam: "it takes sparse gradients alone; use dense ones with Adam",
}


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of ``torch.optim`` that a manifest names; raises :class:`UnsupportedError` for any other."""
    if name not in SUPPORTED:
        raise UnsupportedError(
            f"the trajectory names the optimizer {name!r}; expected one of "
            f"{', '.join('torch.optim.' + known for known in SUPPORTED)}, or another's module and class"
        )
    return SUPPORTED[name]


def is_others(name: str) -> bool:
    """Whether a manifest's name, then ``module.class``, is of an optimizer that is not in :data:`SUPPORTED`."""
    return "." in name


def _name(cls: type[Optimizer]) -> str:
    return cls.__name__ if SUPPORTED.get(cls.__name__) is cls else f"{cls.__module__}.{cls.__qualname__}"


def describe_optimizer(optimizer: Optimizer, model: nn.Module) -> OptimizerLayout:
    """Class, defaults and parameter names per group.

    Raises:
        UnsupportedError: a class in :data:`_REFUSED`.
        TrajectoryError: the optimizer holds tensors that are not parameters of ``model``.
    """
    if (reason := _REFUSED.get(type(optimizer))) is not None:
        raise UnsupportedError(f"optimizer {type(optimizer).__name__} is not supported: {reason}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if foreign:
        raise TrajectoryError(
            f"the optimizer holds {len(foreign)} tensors (first shape {list(foreign[0].shape)}) that are not "
            "parameters of the recorded model; record one model with one optimizer"
        )
    return OptimizerLayout(
        name=_name(type(optimizer)),
        defaults={key: _plain(value) for key, value in optimizer.defaults.items()},
        groups=tuple(tuple(names[id(parameter)] for parameter in group["params"]) for group in optimizer.param_groups),
    )


def hyperparameters(optimizer: Optimizer) -> tuple[Hyperparameters, ...]:
    """Per group, all settings but ``initial_lr``."""
    return tuple(
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names", "initial_lr")}
        for group in optimizer.param_groups
    )


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Detached dense copies of the state, by parameter name (``names``: ``id(parameter) -> name``).

    Absent values (SGD's momentum before its first step) are left out.

    Raises:
        UnsupportedError: the state belongs to no parameter, or is neither tensor nor number.
    """
    kind = type(optimizer).__name__
    found: dict[str, dict[str, Any]] = {}
    for parameter, entry in optimizer.state.items():
        if id(parameter) not in names or not isinstance(entry, Mapping):
            raise UnsupportedError(
                f"the optimizer {kind} keeps state that belongs to no parameter ({str(parameter)[:50]!r}), which a "
                "record cannot hold; keep it with a parameter"
            )
        kept = found[names[id(parameter)]] = {}
        for key, value in entry.items():
            if value is None:
                continue
            if key in COUNTERS and isinstance(value, Tensor) and value.dim():
                raise UnsupportedError(
                    f"the optimizer {kind} keeps {key!r} as a tensor of shape {list(value.shape)}, and {key!r} is the "
                    "name of a number in torch's optimizers; give it another name"
                )
            if not isinstance(value, (Tensor, int, float)):
                raise UnsupportedError(
                    f"the optimizer {kind} keeps its state {key!r} of {names[id(parameter)]!r} "
                    f"as a {type(value).__name__}; expected tensors and numbers. Keep it in one tensor"
                )
            kept[key] = value.detach().to_dense().clone() if isinstance(value, Tensor) else value
    return found


def build_optimizer(layout: OptimizerLayout, workload: Workload) -> Optimizer:
    """The recorded optimizer, over no parameters yet: one empty param group for each in the layout.

    If it is not in :data:`SUPPORTED`, the workload builds it: a record is data, and none of its code is run.

    Raises:
        TrajectoryError: it cannot be built, or the workload builds another one.
    """
    if is_others(layout.name):
        return _emptied(layout, workload)
    cls = optimizer_class(layout.name)
    known = inspect.signature(cls).parameters
    defaults = {key: value for key, value in layout.defaults.items() if key in known}
    defaults = {key: tuple(value) if isinstance(value, list) else value for key, value in defaults.items()}
    try:
        return cls([{"params": []} for _ in layout.groups], **defaults)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TrajectoryError(
            f"torch.optim.{layout.name} cannot be built with the recorded settings {defaults}: {error}"
        ) from error


def _emptied(layout: OptimizerLayout, workload: Workload) -> Optimizer:
    if workload.optimizer is None:
        raise TrajectoryError(
            f"the trajectory was recorded with the optimizer {layout.name}, which is none of torch.optim's "
            "differentiable ones, so its code must come from the workload; give Workload(optimizer=lambda model: …)"
        )
    optimizer = workload.optimizer(workload.build_model())
    if _name(type(optimizer)) != layout.name or len(optimizer.param_groups) != len(layout.groups):
        raise TrajectoryError(
            f"the workload's optimizer is {_name(type(optimizer))} with {len(optimizer.param_groups)} parameter "
            f"groups; the trajectory was recorded with {layout.name} and {len(layout.groups)}"
        )
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = []
    return optimizer


def set_hyperparameters(optimizer: Optimizer, recorded: Sequence[Hyperparameters]) -> None:
    """Give each param group its recorded settings."""
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
